# shellcheck shell=bash
# Functions shared by the scripts in this folder; sourced, never run.
#
# Whoever sources it gets: messages on stderr (stdout belongs to results),
# `need` for missing programs, a private temporary directory, and one exit trap
# that ends every child that was started with `background`.

# shellcheck disable=SC2034 # used by the scripts
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck disable=SC2034
cache=${POLLUX_QEMU_CACHE:-${XDG_CACHE_HOME:-${HOME:-/root}/.cache}/pollux-qemu}

say() { printf '%s: %s\n' "${0##*/}" "$*" >&2; }
die() { say "$*"; exit 1; }

# usage: prints the comment block at the head of the running script.
usage() { sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"; }

# need COMMAND PACKAGE...: makes COMMAND available, installing PACKAGEs as root.
need() {
    local command=$1
    shift
    command -v "$command" >/dev/null && return
    if [[ $EUID -ne 0 ]] || ! command -v apt-get >/dev/null; then
        die "'$command' is missing; please install: $*"
    fi
    say "installing $*"
    apt_install "$@" || { apt-get -qq update >&2 && apt_install "$@"; } ||
        die "apt-get could not install: $*"
    command -v "$command" >/dev/null ||
        die "'$command' is still missing after installing: $*"
}

apt_install() {
    DEBIAN_FRONTEND=noninteractive \
        apt-get -qq install -y --no-install-recommends "$@" >/dev/null
}

# seconds_left DEADLINE: whole seconds until DEADLINE, a value of $SECONDS.
seconds_left() { echo $(($1 > SECONDS ? $1 - SECONDS : 0)); }

# wait_until SECONDS CONDITION...: polls CONDITION; false when time is over.
wait_until() {
    local deadline=$((SECONDS + $1))
    shift
    until "$@"; do
        ((SECONDS < deadline)) || return 1
        sleep 0.1
    done
}

alive() { kill -0 "$1" 2>/dev/null; }
gone() { ! alive "$1"; }

# --- cleaning up -------------------------------------------------------------

children=()
temporary=

# private_dir: makes $temporary, short enough for the 107 bytes of a socket path.
private_dir() {
    temporary=$(mktemp -d "${TMPDIR:-/tmp}/pollux.XXXXXX")
    chmod 700 "$temporary"
}

# background LOG COMMAND...: starts a child that does not outlive this script;
# its process id is then in $!. The kernel sees to that (pdeathsig) when even
# the exit trap cannot, because somebody used SIGKILL.
background() {
    local log=$1
    shift
    setpriv --pdeathsig TERM -- "$@" >"$log" 2>&1 &
    children+=("$!")
}

# stop PID [SECONDS]: SIGTERM, then SIGKILL if that did not help in time.
stop() {
    kill "$1" 2>/dev/null || true
    wait_until "${2:-3}" gone "$1" || kill -KILL "$1" 2>/dev/null || true
}

clean_up() {
    local status=$? child
    trap - EXIT
    for child in "${children[@]}"; do
        stop "$child"
    done
    if [[ -n $temporary && $status -ne 0 && -n ${KEEP_LOGS:-} ]]; then
        say "logs are kept in $temporary"
    elif [[ -n $temporary ]]; then
        rm -rf "$temporary"
    fi
    exit "$status"
}
trap clean_up EXIT
trap 'exit 130' INT
trap 'exit 143' TERM HUP
