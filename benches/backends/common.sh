# shellcheck shell=bash
# shellcheck disable=SC2034 # used by the starters
# Shared by the backend starters in this directory; sourced, never run.
#
# Each starter runs one backend in the foreground:
#
#   NAME --dir DIR [--ports N] [--queues N] [--cpu N] [--helper-cpu N] [--mode server|client]
#
# and prints `version TEXT`, one `socket PATH` for each port, and `ready` once a frontend may attach.
# --mode is the backend's role on its sockets: as client it connects to frontends that listen.
# SIGTERM stops it: everything it started is gone and its sockets are removed, exit 0.
# Exit 3: the backend cannot run here (not installed, no hugepages), the sentence is on stderr.
# Exit 1: it failed or died; the end of its log is on stderr.
set -u
export LC_ALL=C
# Debian's path for ordinary users lacks the directories of some programs that they may run.
PATH=$PATH:/usr/sbin:/sbin

dir='' ports=2 queues=1 cpu=0 helper_cpu='' mode=server
arguments=("$@")
while [ $# -gt 0 ]; do
    case $1 in
        --dir) dir=$2 ;;
        --ports) ports=$2 ;;
        --queues) queues=$2 ;;
        --cpu) cpu=$2 ;;
        --helper-cpu) helper_cpu=$2 ;;
        --mode) mode=$2 ;;
        *) echo "unknown option $1" >&2; exit 2 ;;
    esac
    shift 2 || exit 2
done
[ -n "$dir" ] || { echo "--dir is needed" >&2; exit 2; }
# Threads that do not poll stay off the polling core; with one core only, they share it.
[ -n "$helper_cpu" ] || helper_cpu=$(( $(nproc) > 1 ? (cpu + 1) % $(nproc) : cpu ))
mkdir -p "$dir" || exit 1
log=$dir/backend.log
children=()

missing() { echo "$1" >&2; exit 3; }

need() { # need COMMAND PACKAGE
    command -v "$1" >/dev/null || missing "$1 is not installed (Debian package $2)"
}

# need_hugepages MIB: that much memory free in 2 MB hugepages.
need_hugepages() {
    local free
    free=$(cat /sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages 2>/dev/null || echo 0)
    [ $((free * 2)) -ge "$1" ] ||
        missing "needs $1 MB in free 2 MB hugepages, has $((free * 2)) (as root: echo 768 >/proc/sys/vm/nr_hugepages)"
}

# The sockets are stated by name here, so that every starter names them alike.
socket() { echo "$dir/p$1.sock"; }

# A starter overrides this for what its backend leaves behind when only killed.
before_stop() { :; }

stop() {
    trap '' TERM INT
    before_stop
    local pid
    for pid in "${children[@]}"; do kill -TERM "$pid" 2>/dev/null; done
    # A DPDK process that hangs in its own clean-up must not outlive the run.
    for _ in $(seq 50); do
        local alive=
        for pid in "${children[@]}"; do kill -0 "$pid" 2>/dev/null && alive=1; done
        [ -z "$alive" ] && break
        sleep 0.1
    done
    for pid in "${children[@]}"; do kill -KILL "$pid" 2>/dev/null; done
    wait 2>/dev/null
    rm -f "$dir"/*.sock
}
trap 'stop; exit 0' TERM INT

fail() {
    echo "$1" >&2
    [ -f "$log" ] && tail -n 15 "$log" | sed 's/^/  | /' >&2
    stop
    exit 1
}

# wait_for SECONDS WHAT COMMAND…: until the command succeeds, while the last child lives.
wait_for() {
    local tries=$(($1 * 20)) what=$2
    shift 2
    while ! "$@" 2>/dev/null; do
        kill -0 "${children[-1]}" 2>/dev/null || fail "the backend ended before $what"
        [ $((tries -= 1)) -gt 0 ] || fail "timed out waiting for $what"
        sleep 0.05
    done
}

# Announces the ports, then stays until a signal or the death of a child.
serve() {
    local n
    for ((n = 0; n < ports; n++)); do echo "socket $(socket "$n")"; done
    echo ready
    wait -n "${children[@]}"
    fail "the backend died (status $?)"
}
