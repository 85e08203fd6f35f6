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

# Debian's path for ordinary users lacks the directories of some programs that they may run, such as ethtool.
PATH=$PATH:/usr/sbin:/sbin

# What `guest` needs without --kernel: QEMU, and what `initramfs` packs or unpacks with.
# shellcheck disable=SC2034 # used by the scripts
guest_programs=(qemu-system-x86_64:qemu-system-x86 /usr/share/seabios:seabios busybox:busybox-static cpio:cpio
    xz:xz-utils ethtool:ethtool)

say() { printf '%s: %s\n' "${0##*/}" "$*" >&2; }
die() { say "$*"; exit 1; }

# usage: prints the comment block at the head of the running script.
usage() { sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"; }

# need PROGRAM:PACKAGE...: makes all PROGRAMs (names or paths) available, installing as root the PACKAGEs of those that are
# missing. What cannot be had is said in one message, so that nobody installs one, waits, and hears of the next.
need() {
    local packages
    mapfile -t packages < <(missing_packages "$@")
    [[ ${#packages[@]} -gt 0 ]] || return 0
    if [[ $EUID -ne 0 ]] || ! command -v apt-get >/dev/null; then
        die "missing here; please install: ${packages[*]}"
    fi
    say "installing ${packages[*]}"
    apt_install "${packages[@]}" || { apt-get -qq update >&2 && apt_install "${packages[@]}"; } ||
        die "apt-get could not install: ${packages[*]}"
    mapfile -t packages < <(missing_packages "$@")
    [[ ${#packages[@]} -eq 0 ]] || die "installed, and still without their programs: ${packages[*]}"
}

# missing_packages PROGRAM:PACKAGE...: the PACKAGEs of which PROGRAM is not here, each on a line. Debian's `busybox` and
# `busybox-static` have a program of one name: with the former it is here, but linked dynamically.
missing_packages() {
    local pair path
    for pair in "$@"; do
        path=$(command -v "${pair%%:*}" || true)
        [[ -n $path || ! -e ${pair%%:*} ]] || path=${pair%%:*}
        if [[ -z $path ]] || { [[ $pair == *-static ]] && ldd "$path" >/dev/null 2>&1; }; then
            printf '%s\n' "${pair##*:}"
        fi
    done | sort -u
}

apt_install() {
    DEBIAN_FRONTEND=noninteractive \
        apt-get -qq install -y --no-install-recommends "$@" >/dev/null
}

# version_of QEMU: its version, as in 7.2.
version_of() { "$1" -version 2>/dev/null | sed -n '1s/.* version \([0-9]*\.[0-9]*\).*/\1/p'; }

# version_is_at_least WANTED VERSION
version_is_at_least() { [[ -n $2 && $(printf '%s\n' "$1" "$2" | sort -V | head -n 1) == "$1" ]]; }

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

# child COMMAND...: starts a child that does not outlive this script; its process
# id is then in $!. The kernel sees to that (pdeathsig) when even the exit trap
# cannot, because somebody used SIGKILL. It has a session of its own: Ctrl-C
# reaches this script alone, which then ends its children in order.
child() {
    setsid setpriv --pdeathsig TERM -- "$@" &
    children+=("$!")
}

# background LOG COMMAND...: a child that writes to LOG.
background() {
    local log=$1
    shift
    child "$@" >"$log" 2>&1
}

# stop PID [SECONDS]: SIGTERM to a child and its own children, then SIGKILL if
# that did not help in time.
stop() {
    signal_all TERM "$1"
    wait_until "${2:-3}" gone "$1" || signal_all KILL "$1"
}
# Just after its start a child may not lead its session yet.
signal_all() { kill -"$1" -- "-$2" 2>/dev/null || kill -"$1" "$2" 2>/dev/null || true; }

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
# Scripts call each other, and Ctrl-C reaches all that run in the foreground: the outermost one says so.
: "${POLLUX_OUTERMOST:=$$}"
export POLLUX_OUTERMOST
interrupted() {
    [[ $POLLUX_OUTERMOST != "$$" ]] || say interrupted
    exit 130
}
trap interrupted INT
trap 'exit 143' TERM HUP
