#!/usr/bin/env bash
# A Slurm cluster of four virtual nodes on this machine, for tests and experiments. Listens on loopback only.
#
#   bash slurm/local_cluster.sh run CMD...     starts it, runs CMD on it, stops it
#   bash slurm/local_cluster.sh up             starts it; prints the export that makes sbatch use it
#   bash slurm/local_cluster.sh down           stops it
#   bash slurm/local_cluster.sh start NODE     starts a node's daemon again, after it was killed
#   bash slurm/local_cluster.sh start          the same for the controller
#
# All its processes, including jobs, run in a process namespace and end with it. Needs root and Debian's packages
# slurm-wlm and munge.
#
#   CLUSTER_DIR   directory of its state; default: /tmp/switchyard-slurm
#   NODES, CPUS   nodes, and CPUs of each; default: 4 and 16. CPUs are counted, not bound: all nodes share this machine
#   GPUS          GPUs of each node, default 0. They are fake and only appear in CUDA_VISIBLE_DEVICES
#   PORT          first of NODES + 1 free ports; default: found
#   NODE_TIMEOUT  seconds until an unresponsive node counts as failed; default: 15
set -euo pipefail
dir=${CLUSTER_DIR:-/tmp/switchyard-slurm}
nodes=${NODES:-4} cpus=${CPUS:-16} gpus=${GPUS:-0} node_timeout=${NODE_TIMEOUT:-15}
self=$(readlink -f -- "${BASH_SOURCE[0]}")
export SLURM_CONF=$dir/slurm.conf

fail() {
    echo "local_cluster: $*" >&2
    exit 1
}

check_machine() {
    local program
    for program in munged mungekey slurmctld slurmd sinfo; do
        PATH=$PATH:/usr/sbin command -v "$program" >/dev/null ||
            fail "$program is missing: apt-get install slurm-wlm munge"
    done
    [ "$(id -u)" = 0 ] || fail "needs root, to give each node a host name of its own"
    ! running || fail "one is running in $dir: bash slurm/local_cluster.sh down ends it; or choose another CLUSTER_DIR"
}

# Whether the process that holds the namespace exists.
running() { [ "$(cat "/proc/$(cat "$dir/holder" 2>/dev/null)/comm" 2>/dev/null)" = unshare ]; }

free_ports() {
    local first port
    for first in $(seq 28100 $((nodes + 1)) 32000 | shuf); do
        for port in $(seq "$first" $((first + nodes))); do
            # Somebody answers there.
            if (: <"/dev/tcp/127.0.0.1/$port") 2>/dev/null; then continue 2; fi
        done
        echo "$first"
        return
    done
    fail "no free ports"
}

write_configuration() {
    local port=${PORT:-} node
    port=${port:-$(free_ports)}
    rm -rf -- "$dir"
    mkdir -p "$dir"/{log,state,spool,dev}
    chmod 755 "$dir" # munged refuses a socket under a folder that others cannot enter
    mungekey --create --keyfile "$dir/munge.key"
    cat >"$dir/slurm.conf" <<CONF
ClusterName=local
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort=$port
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket=$dir/munge.sock,cred_expire=5
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool/%n
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd-%n.pid
SlurmctldLogFile=$dir/log/slurmctld.log
SlurmdLogFile=$dir/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
ReturnToService=2
SlurmctldTimeout=10
SlurmdTimeout=$node_timeout
InactiveLimit=0
KillWait=10
MinJobAge=3600
TCPTimeout=5
MessageTimeout=10
BatchStartTimeout=10
UnkillableStepTimeout=20
JobRequeue=1
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=5,batch_sched_delay=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
$([ "$gpus" = 0 ] || echo GresTypes=gpu)
NodeName=DEFAULT CPUs=$cpus RealMemory=16000 State=UNKNOWN$([ "$gpus" = 0 ] || echo " Gres=gpu:$gpus")
PartitionName=batch Nodes=node[1-$nodes] Default=YES MaxTime=INFINITE DefaultTime=60 PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=node[1-$nodes] MaxTime=INFINITE DefaultTime=60 PriorityTier=10 PreemptMode=OFF
CONF
    cp /etc/hosts "$dir/hosts"
    for node in $(seq "$nodes"); do
        echo "NodeName=node$node NodeAddr=127.0.0.1 Port=$((port + node))" >>"$dir/slurm.conf"
        echo "127.0.0.1 node$node" >>"$dir/hosts"
    done
    [ "$gpus" = 0 ] || fake_gpus
}

fake_gpus() { # character devices: for anything else CUDA_VISIBLE_DEVICES stays empty
    local gpu
    for gpu in $(seq 0 $((gpus - 1))); do mknod "$dir/dev/gpu$gpu" c 1 3; done
    echo "NodeName=node[1-$nodes] Name=gpu File=$dir/dev/gpu[0-$((gpus - 1))]" >"$dir/gres.conf"
}

# A node sees its own host name, and the names of all nodes in /etc/hosts; outside of it they are not visible.
start_node() {
    # shellcheck disable=SC2016  # expanded inside
    PATH=$PATH:/usr/sbin unshare --mount --uts --propagation private bash -c \
        'mount --bind "$0/hosts" /etc/hosts && hostname "$1" && exec slurmd -N "$1" -f "$0/slurm.conf"' "$dir" "$1"
}

# A restarted controller takes over the jobs of the previous one, once that has exited.
start_controller() {
    for _ in $(seq 60); do
        if PATH=$PATH:/usr/sbin slurmctld -f "$SLURM_CONF"; then return; fi
        sleep 0.5
    done
    fail "slurmctld does not start: $(tail -n 3 "$dir/log/slurmctld.log")"
}

# The first process of the namespace: starts the daemons, then runs CMD.
inside() {
    local node
    export PATH=$PATH:/usr/sbin
    munged --key-file="$dir/munge.key" --socket="$dir/munge.sock" --pid-file="$dir/munged.pid" \
        --log-file="$dir/log/munged.log" --seed-file="$dir/munge.seed" --num-threads=2
    start_controller
    for node in $(seq "$nodes"); do start_node "node$node"; done
    # Not sinfo: the first step can still fail when it shows the nodes as idle.
    for _ in $(seq 60); do
        if timeout 10 srun --nodes="$nodes" --ntasks="$nodes" --time=1 true >/dev/null 2>&1; then
            touch "$dir/ready"
            "$@"
            return
        fi
        sleep 0.5
    done
    tail -n 5 "$dir"/log/*.log >&2
    fail "it did not start"
}

# Runs a function of this file in a new namespace; all processes in it end with it.
isolated() {
    echo $BASHPID >"$dir/holder"
    exec unshare --mount --uts --pid --fork --mount-proc --kill-child bash "$self" "$@"
}

# Runs a function of this file in the existing namespace, from outside.
enter() {
    local holder first
    running || fail "none is running in $dir"
    holder=$(cat "$dir/holder")
    read -r first <"/proc/$holder/task/$holder/children" || true # the line has no end
    nsenter --target "$first" --mount --uts --pid bash "$self" "$@"
}

case ${1-} in
run)
    [ $# -ge 2 ] || fail "no command is given: bash slurm/local_cluster.sh run CMD..."
    check_machine
    write_configuration
    trap 'rm -rf -- "$dir"' EXIT
    code=0
    (isolated inside "${@:2}") || code=$?
    exit "$code"
    ;;
up)
    check_machine
    write_configuration
    setsid bash "$self" isolated inside sleep infinity </dev/null >"$dir/log/start.log" 2>&1 &
    until [ -e "$dir/ready" ]; do
        kill -0 $! 2>/dev/null || fail "it did not start: $(cat "$dir/log/start.log")"
        sleep 0.1
    done
    echo "export SLURM_CONF=$SLURM_CONF"
    ;;
down)
    ! running || kill -KILL "$(cat "$dir/holder")"
    rm -rf -- "$dir"
    ;;
start) if [ $# = 2 ]; then enter start_node "$2"; else enter start_controller; fi ;;
isolated | inside | start_node | start_controller) "$@" ;;
*) fail "bash slurm/local_cluster.sh up | down | run CMD | start [NODE]" ;;
esac
