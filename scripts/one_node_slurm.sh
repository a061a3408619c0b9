#!/usr/bin/env bash
# A Slurm of one node on this machine, to try `hydra/launcher=submitit_slurm` without a cluster (docs/how-to/sweeps.md).
#
#   scripts/one_node_slurm.sh             start it: munged, slurmctld and slurmd, one partition called "debug"
#   scripts/one_node_slurm.sh --install   the same, after `apt-get install slurm-wlm munge` where they are missing
#   scripts/one_node_slurm.sh stop        cancel its jobs and end the daemons that this script started
#
# Made for Debian and its relatives, as root, without systemd (a container will do). It is for trying things out: no
# accounting, no limits enforced, everything as root. It writes /etc/slurm/slurm.conf and cgroup.conf, only where there
# are none or its own from before. `stop` leaves both, the logs in /var/log/slurm and the packages where they are.
# Exit status: 0 done, 2 something is missing or in the way (said in one line), 1 the daemons did not come up.
set -euo pipefail

MARK="# written by kvbench's scripts/one_node_slurm.sh"
ETC=/etc/slurm
RUN=/run/slurm
LOGS=/var/log/slurm
HOST=$(hostname -s)
PATH=$PATH:/usr/sbin:/sbin

refuse() {
    echo "error: $*" >&2
    exit 2
}

ours() { # FILE: whether this script wrote it
    [ "$(head -n 1 "$1" 2>/dev/null)" = "$MARK" ]
}

answers() { # whether some Slurm is up; a controller that is down can keep sinfo waiting
    command -v sinfo >/dev/null && timeout 5 sinfo --noheader >/dev/null 2>&1
}

running() { # PIDFILE NAME: whether the process that the file names still is that daemon
    [ -s "$1" ] && [ "$(cat "/proc/$(cat "$1")/comm" 2>/dev/null)" = "$2" ]
}

wait_until() { # SECONDS COMMAND...
    local tries=$(($1 * 5))
    shift
    until "$@"; do
        tries=$((tries - 1))
        [ "$tries" -gt 0 ] || return 1
        sleep 0.2
    done
}

install_packages() {
    echo "installing slurm-wlm and munge with apt-get"
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends slurm-wlm munge >/dev/null
}

write_configuration() {
    local file megabytes
    for file in "$ETC/slurm.conf" "$ETC/cgroup.conf"; do
        if [ -e "$file" ] && ! ours "$file"; then
            refuse "$file: is there and not from this script; move it away first if it is not needed"
        fi
    done
    mkdir -p "$ETC" "$RUN" "$LOGS" /var/spool/slurmctld /var/spool/slurmd
    # A node that finds less memory than is written here is taken out of service, so a little less is written.
    megabytes=$(awk '/^MemTotal:/ { print int($2 / 1024 * 0.95) }' /proc/meminfo)
    cat >"$ETC/slurm.conf" <<CONF
$MARK
ClusterName=kvbench
SlurmctldHost=$HOST(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
ReturnToService=2
MpiDefault=none
KillWait=5
StateSaveLocation=/var/spool/slurmctld
SlurmdSpoolDir=/var/spool/slurmd
SlurmctldPidFile=$RUN/slurmctld.pid
SlurmdPidFile=$RUN/slurmd.pid
SlurmctldLogFile=$LOGS/slurmctld.log
SlurmdLogFile=$LOGS/slurmd.log
NodeName=$HOST NodeAddr=127.0.0.1 CPUs=$(nproc) RealMemory=$megabytes State=UNKNOWN
PartitionName=debug Nodes=$HOST Default=YES MaxTime=INFINITE State=UP
CONF
    printf '%s\n%s\n' "$MARK" "CgroupPlugin=cgroup/v1" >"$ETC/cgroup.conf" # no systemd to ask for cgroup/v2
}

node_is_idle() {
    local state
    state=$(timeout 5 sinfo --noheader --nodes "$HOST" --format %T 2>/dev/null) || return 1
    case $state in
    idle | mixed | allocated) ;;
    # left by an earlier session that ended without `stop`
    down* | drained*)
        scontrol update "NodeName=$HOST" State=RESUME 2>/dev/null || true
        return 1
        ;;
    *) return 1 ;;
    esac
}

start() {
    local missing=()
    for program in munged slurmctld slurmd sinfo; do
        command -v "$program" >/dev/null || missing+=("$program")
    done
    if [ ${#missing[@]} -gt 0 ]; then
        [ "$INSTALL" = yes ] || refuse "not installed: ${missing[*]}; --install gets slurm-wlm and munge with apt-get"
        install_packages
    fi
    if answers; then
        echo "a Slurm answers here already; nothing was started"
        sinfo
        return
    fi
    write_configuration
    if ! munge --no-input >/dev/null 2>&1; then
        mkdir -p /run/munge
        chown munge:munge /run/munge
        chmod 755 /run/munge
        [ -e /etc/munge/munge.key ] || runuser -u munge -- mungekey --create
        runuser -u munge -- munged
        cp /run/munge/munged.pid "$RUN/munged.pid" # so that `stop` ends this one and no other
        echo "started munged"
    fi
    running "$RUN/slurmctld.pid" slurmctld || slurmctld
    if ! wait_until 20 answers; then
        echo "slurmctld does not answer after 20 s:" >&2
        tail -n 5 "$LOGS/slurmctld.log" >&2
        exit 1
    fi
    running "$RUN/slurmd.pid" slurmd || slurmd
    echo "started slurmctld and slurmd, configured by $ETC/slurm.conf, logging to $LOGS"
    if ! wait_until 30 node_is_idle; then
        echo "the node is not idle after 30 s:" >&2
        sinfo --list-reasons >&2
        tail -n 5 "$LOGS/slurmd.log" >&2
        exit 1
    fi
    sinfo
}

end() { # NAME: the daemon of that name, by the id in its file; one that ignores TERM for 10 s is killed
    local file="$RUN/$1.pid" pid
    running "$file" "$1" || return 0
    pid=$(cat "$file")
    kill "$pid"
    gone() { ! [ -e "/proc/$pid" ] || grep -q '^State:.Z' "/proc/$pid/status"; }
    wait_until 10 gone || kill -KILL "$pid"
    rm -f "$file"
    echo "ended $1"
}

stop() {
    [ -e "$ETC/slurm.conf" ] || { echo "nothing to stop: there is no $ETC/slurm.conf" && return; }
    ours "$ETC/slurm.conf" || refuse "$ETC/slurm.conf: is not from this script; it stops only what it started"
    if answers; then
        queue_is_empty() { [ -z "$(squeue --noheader)" ]; }
        queue_is_empty || squeue --noheader --format %A | xargs scancel
        wait_until 20 queue_is_empty || echo "jobs are still ending" >&2
    fi
    end slurmd
    end slurmctld
    end munged
}

INSTALL=no
case "${1:-start} ${2:-}" in
"start ") ;;
"--install " | "start --install") INSTALL=yes ;;
"stop ") ;;
*) refuse "one_node_slurm.sh $*: takes nothing, --install or stop" ;;
esac
[ "$(id -u)" = 0 ] || refuse "must be run as root: Slurm's daemons start jobs under other users"
if [ "${1:-}" = stop ]; then stop; else start; fi
