# shellcheck shell=bash disable=SC2154,SC2329
# Runs training in a Slurm job, for launch/train.sh in a batch script or in salloc's shell: validates the run, starts
# one task per GPU, stops them when Slurm signals the time limit, and decides from stop.json whether to requeue. The
# exit code of srun is not reliable: with --kill-on-bad-exit, ranks that exit one after the other are reported as
# killed.
#
#   python           array: the command that starts Python
#   SWITCHYARD_SRUN  further options for every srun, such as those of a container

# Failing to write the job's output, to a full disk or a closed pipe, does not end the job.
trap : PIPE
say() { echo "train.sh: $*" >&2 || true; }

if [ "${SLURM_HET_SIZE:-1}" -gt 1 ]; then
    say "error: this is a heterogeneous job of $SLURM_HET_SIZE components (--het-group, or : in sbatch's options)," \
        "which is not supported: submit a single component"
    exit 2
fi
interactive=()
[ "${ENVIRONMENT-}" = BATCH ] || interactive=(--interactive)

# Asks Slurm for the name of this job (JOB, or ARRAY_ELEMENT, since the last element of an array has the job id of the
# array), its number of restarts, its state and the time left. The variables are empty if Slurm does not answer.
ask_slurm() {
    local id n c s l
    name='' count='' state='' left=''
    while read -r id n c s l; do
        [ "$id" != "$SLURM_JOB_ID" ] || name=$n count=$c state=$s left=$l
    done < <(
        unset "${!SQUEUE_@}" # filters in the user's environment
        squeue --noheader --job="$SLURM_JOB_ID" --Format='JobID: ,JobArrayID: ,RestartCnt: ,State: ,TimeLeft: ' \
            2>/dev/null
    )
}

# A job that is submitted inside another one inherits its variables: of an array element, a restart, a step.
unset "${!SLURM_STEP_@}" SLURM_STEPID SLURM_CLUSTERS
ask_slurm
if [ -n "$name" ]; then
    [[ $name == *_* ]] || unset "${!SLURM_ARRAY_@}"
    export SLURM_RESTART_COUNT=$count
fi
restarts=${SLURM_RESTART_COUNT:-0}

nodes=${SLURM_JOB_NUM_NODES:-1} gpus=${SLURM_GPUS_ON_NODE:-0}
# With --nodes=MIN-MAX the number of tasks follows from the nodes that there are.
tasks=${SLURM_NTASKS:-$((nodes * ${SLURM_NTASKS_PER_NODE:-$((gpus > 0 ? gpus : 1))}))}
# ALL: the ranks have the environment of this script, regardless of sbatch --export.
split_words "${SWITCHYARD_SRUN-}"
srun_options=(--export=ALL "${words[@]}")
[ -z "${SLURM_CPUS_PER_TASK-}" ] || # srun does not inherit this from sbatch
    srun_options+=(--cpus-per-task="$SLURM_CPUS_PER_TASK" --cpu-bind=cores)
# Megatron-Core relies on kernels starting in the order of their launches.
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
# Set here, since Slurm's commands may be missing in a container.
if hosts=$(scontrol show hostnames "${SLURM_JOB_NODELIST-}" 2>/dev/null) && [ -n "$hosts" ]; then
    export MASTER_ADDR=${MASTER_ADDR:-${hosts%%$'\n'*}}
fi
mapfile -t hosts <<<"$hosts"
export SWITCHYARD_NODES="${hosts[*]}"
# The nodes that Slurm has given up: one of them may have ended the previous attempt, and its batch script too.
SWITCHYARD_DOWN_NODES=''
[ "$restarts" = 0 ] || SWITCHYARD_DOWN_NODES=$(sinfo --noheader --Node --states=down,fail --format=%N 2>/dev/null |
    sort -u | tr '\n' ' ') || true
export SWITCHYARD_DOWN_NODES
# Prefix of the keys in the ranks' store: only processes that can read this job's environment can access them.
SWITCHYARD_STORE_SECRET=$(od -An -N16 -tx1 /dev/urandom | tr -d ' \n')
export SWITCHYARD_STORE_SECRET

say "job ${name:-$SLURM_JOB_ID}, restart $restarts, on ${SLURM_JOB_NODELIST-?}: $tasks task(s), $gpus GPU(s) a node," \
    "${SLURM_CPUS_PER_TASK:-${SLURM_CPUS_ON_NODE-?} on the node} CPU(s) a task, srun ${srun_options[*]}"
say "$(env | grep -E '^(NCCL|GLOO|UCX|TORCH_NCCL|CUDA|MASTER)_' | sort | tr '\n' ' ')"

# Runs a command of the project once, in the container if there is one, and prints the last line of its output: a
# container may print other lines before.
once() {
    local output code=0
    if [ -n "${SWITCHYARD_SRUN-}" ]; then
        output=$(
            unset SLURM_LABELIO # meant for the output of the ranks
            srun --nodes=1 --ntasks=1 --input=none --output=all "${srun_options[@]}" "${python[@]}" "$@"
        ) || code=$?
    else
        output=$("${python[@]}" "$@") || code=$?
    fi
    echo "${output##*$'\n'}"
    return "$code"
}

asked=() ranks_pid='' interrupted=''
ranks_run() { [ -n "$ranks_pid" ] && [[ " $(jobs -pr | tr '\n' ' ')" == *" $ranks_pid "* ]]; }
# Not TERM, on which srun kills the tasks.
tell_ranks() { ! ranks_run || kill -USR1 "$ranks_pid" 2>/dev/null || true; }
on_signal() {
    if [ "$1" = INT ] && [ -n "$interrupted" ]; then
        say "interrupted again: the ranks are killed"
        if ranks_run; then kill -TERM "$ranks_pid" && wait "$ranks_pid" || true; fi
        exit 130
    fi
    [ "$1" != INT ] || interrupted=yes
    say "got $1: the ranks finish their step and write a checkpoint"
    asked=(--asked)
    tell_ranks
}
trap 'on_signal USR1' USR1
trap 'on_signal INT' INT
# Slurm signals the tasks itself; the job may have been cancelled and is then not requeued.
ending=''
trap 'ending=yes && say "got TERM"' TERM

for word in "$@"; do
    case $word in
        -m | --multirun)
            say "error: a job trains one run; for several ($word) use sbatch --array=... slurm/array.sh"
            exit 2
            ;;
    esac
done

# Validates the run, chooses its layout with parallel=auto, and creates the run directory: an invalid setting ends the
# job here.
begin=$(once -m launch.check --job "$@" ranks="$tasks") || exit $?
read -r nodes tasks SWITCHYARD_LAYOUT _ <<<"$begin"
run_dir=${begin#* * * } # may contain spaces
[ "$SWITCHYARD_LAYOUT" != '{}' ] || SWITCHYARD_LAYOUT=''
export SWITCHYARD_LAYOUT
# Nodes that are left out have no tasks.
used=()
[ "$nodes" -ge "${#hosts[@]}" ] || used=(--nodelist="$(IFS=, && echo "${hosts[*]:0:nodes}")")

# Steps are identified by their number in the job. An srun that outlives an earlier attempt, on a node that Slurm has
# given up, kills "its" step when its ranks exit. Empty steps make the number of the step below different in each
# attempt.
for ((step = 0; step < restarts; step++)); do
    srun --export=ALL --nodes=1 --ntasks=1 true || true
done

errors=$(mktemp) || errors=/dev/null
# Passes on standard error, and keeps what says which task has failed, and the end of it. Continues when the job's output
# is full, and when the job is signalled.
keep_errors() {
    trap '' INT TERM HUP USR1
    tee --output-error=warn >(
        grep --line-buffered -E '^srun: |^switchyard: error: the job ends: ' >>"$errors"
        echo end >>"$errors"
    ) >&2
}
if [ "${#asked[@]}" = 0 ]; then
    # Block distribution: consecutive ranks on a node, regardless of the site's default.
    srun --kill-on-bad-exit=1 --wait=120 --mpi=none --distribution=block --nodes="$nodes" --ntasks="$tasks" \
        "${used[@]}" "${srun_options[@]}" "${python[@]}" -m launch.train "$@" 2> >(keep_errors) &
    ranks_pid=$!
    # A trapped signal ends `wait`, but not srun. srun does not forward signals to tasks that it has not started yet,
    # for example while a container image is downloaded: the signal is repeated, and the ranks count it once.
    while ranks_run; do
        if [ "${#asked[@]}" = 0 ]; then
            wait "$ranks_pid" || true
        else
            sleep 10 &
            wait -n "$ranks_pid" $! || true
            kill $! 2>/dev/null || true
            tell_ranks
        fi
    done
fi

# A batch script can outlive its job, too, on a node that Slurm has given up.
ask_slurm
if [ "${count:-$restarts}" != "$restarts" ]; then
    say "this job was restarted elsewhere (restart $count): restart $restarts ends here"
    exit 1
fi

for _ in {1..50}; do # until what srun has written last is there
    if [ -z "$ranks_pid" ] || [ -n "$ending" ] || grep -qx end "$errors"; then break; fi
    sleep 0.1
done
SWITCHYARD_ERRORS=$(head --bytes=16000 "$errors")
export SWITCHYARD_ERRORS
[ "$errors" = /dev/null ] || rm -f -- "$errors"
verdict=$(once -m launch.verdict "${asked[@]}" "${interactive[@]}" "$run_dir") || true
failing=()
case $verdict in
requeue*) read -r -a failing <<<"${verdict#requeue}" ;;
[0-9] | [0-9][0-9]) exit "$verdict" ;;
*)
    # The state of the run may be unreadable, or the disk full, but Slurm did signal the end of the job. launch.check
    # limits the number of restarts.
    [ "${#asked[@]}" != 0 ] && [ "${#interactive[@]}" = 0 ] || exit 1
    say "it is unknown how the run ended, but it was signalled to stop: requeued"
    ;;
esac

# How many nodes this requeued job needs. Slurm shows the number that it had, but keeps its tasks: --nodes=MIN-MAX without
# a number of tasks is MIN tasks.
minimum_of_nodes() {
    local needed
    needed=$(unset "${!SQUEUE_@}" && squeue --noheader --job="$SLURM_JOB_ID" --Format='NumTasks: ' 2>/dev/null |
        head -n 1 | tr -dc 0-9) || true
    if [ -z "$needed" ] || [ -n "${SLURM_NTASKS-}" ] && [ -z "${SLURM_NTASKS_PER_NODE-}" ]; then
        echo "${SLURM_JOB_NUM_NODES:-1}"
    elif [ -n "${SLURM_NTASKS-}" ]; then
        echo "$(((needed + SLURM_NTASKS_PER_NODE - 1) / SLURM_NTASKS_PER_NODE))"
    else
        echo "$needed"
    fi
}

# Keeps this requeued job, which is pending now, off a node on which the run has failed repeatedly, as long as Slurm has
# other nodes like it: at least as many as the job needs.
exclude() {
    local node=$1 minimum partition excluded kind='' other_kind state other left=0 nodes_of_partition
    minimum=$(minimum_of_nodes)
    read -r partition excluded < <(
        unset "${!SQUEUE_@}"
        squeue --noheader --job="$SLURM_JOB_ID" --format='%P %x' 2>/dev/null | head -n 1
    )
    [[ $excluded != \(null\) ]] || excluded=''
    excluded=$(scontrol show hostnames "$excluded" 2>/dev/null | paste -sd,)
    [[ ",$excluded," != *",$node,"* ]] || return 0
    nodes_of_partition=$(sinfo --noheader --Node --partition="$partition" --format='%f %G|%T|%N' | sort -u)
    while IFS='|' read -r other_kind state other; do
        [ "$other" != "$node" ] || kind=$other_kind
    done <<<"$nodes_of_partition"
    while IFS='|' read -r other_kind state other; do
        [[ $other_kind != "$kind" || $other = "$node" || ",$excluded," = *",$other,"* ]] ||
            [[ $state = *@(down|drain|fail|maint|unk|power|reboot|\*)* ]] || left=$((left + 1))
    done <<<"$nodes_of_partition"
    if [ "$left" -lt "$minimum" ]; then
        say "$node has failed repeatedly, but of nodes like it only $left others are available, and the job needs" \
            "$minimum: not excluded"
    elif scontrol update JobId="$name" ExcNodeList="${excluded:+$excluded,}$node"; then
        say "$node has failed repeatedly: the job is kept off it from now on" \
            "(scontrol update JobId=$name ExcNodeList= undoes this)"
    fi
}

answer="the controller does not answer"
for _ in {1..30}; do # while the controller may be restarting
    ask_slurm
    [ "${count:-$restarts}" = "$restarts" ] || exit 75 # already requeued
    # Slurm itself may be ending the job, not because of the time limit: it was cancelled or preempted.
    if [ "${state:-RUNNING}" != RUNNING ] && [ "$left" != INVALID ] && [ "$left" != 0:00 ]; then
        say "Slurm is ending this job ($state): not requeued"
        exit 75
    fi
    if [ -n "$state" ] && answer=$(scontrol requeue "$name" 2>&1); then
        say "requeued"
        for node in "${failing[@]}"; do (trap '' TERM && exclude "$node") || true; done
        sleep 300 & # Slurm ends this script now
        wait
        exit 75
    fi
    # Other errors, such as a time-out of the controller, may be temporary.
    [[ $answer != *@(disabled|denied|nvalid|not\ supported|already)* ]] || break
    sleep 10
done
say "$answer; submit again with run.dir=$run_dir to resume"
exit 75
