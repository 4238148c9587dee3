# shellcheck shell=bash disable=SC2154,SC2329
# What launch/train.sh does in a Slurm job, in a batch script as in salloc's shell: check, start one task per GPU, stop
# them when Slurm says that time is nearly up, and then go by what stop.json says. srun's own exit code says little:
# with --kill-on-bad-exit, ranks that end a moment apart are reported as killed.
#
#   python           array: the command that starts Python
#   SWITCHYARD_SRUN  further options for every srun, such as a container's

# A full disk under the job's output, or a reader that has left, ends nothing.
trap : PIPE
say() { echo "train.sh: $*" >&2 || true; }

if [ "${SLURM_HET_SIZE:-1}" -gt 1 ]; then
    say "error: this is a heterogeneous job of $SLURM_HET_SIZE components (--het-group, or : between sbatch's options)," \
        "but ranks run in one: submit without the others"
    exit 2
fi
interactive=()
[ "${ENVIRONMENT-}" = BATCH ] || interactive=(--interactive)

# What Slurm says of this job: its name (JOB, or ARRAY_ELEMENT: the number of an array's last element is the array's as
# well), how often it was started again, its state, and the time it has left. Empty where nobody answers.
ask_slurm() {
    local id n c s l
    name='' count='' state='' left=''
    while read -r id n c s l; do
        [ "$id" != "$SLURM_JOB_ID" ] || name=$n count=$c state=$s left=$l
    done < <(
        unset "${!SQUEUE_@}" # the user's own filters
        squeue --noheader --job="$SLURM_JOB_ID" --Format='JobID: ,JobArrayID: ,RestartCnt: ,State: ,TimeLeft: ' \
            2>/dev/null
    )
}

# A job that is submitted inside another inherits what that one was: an element of an array, a restart, a step.
unset "${!SLURM_STEP_@}" SLURM_STEPID SLURM_CLUSTERS
ask_slurm
if [ -n "$name" ]; then
    [[ $name == *_* ]] || unset "${!SLURM_ARRAY_@}"
    export SLURM_RESTART_COUNT=$count
fi
restarts=${SLURM_RESTART_COUNT:-0}

nodes=${SLURM_JOB_NUM_NODES:-1} gpus=${SLURM_GPUS_ON_NODE:-0}
tasks=${SLURM_NTASKS:-$((nodes * (gpus > 0 ? gpus : 1)))}
# ALL: the ranks have what this script has, whatever sbatch --export said.
split_words "${SWITCHYARD_SRUN-}"
srun_options=(--export=ALL "${words[@]}")
[ -z "${SLURM_CPUS_PER_TASK-}" ] || # srun does not take this over from sbatch by itself
    srun_options+=(--cpus-per-task="$SLURM_CPUS_PER_TASK" --cpu-bind=cores)
# Megatron-Core counts on kernels starting in the order in which they were given.
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
# Here, since ranks in a container have none of Slurm's commands.
if hosts=$(scontrol show hostnames "${SLURM_JOB_NODELIST-}" 2>/dev/null) && [ -n "$hosts" ]; then
    export MASTER_ADDR=${MASTER_ADDR:-${hosts%%$'\n'*}}
fi
# Names in the ranks' store begin with it: only who can read this job's environment can read or change what is there.
SWITCHYARD_STORE_SECRET=$(od -An -N16 -tx1 /dev/urandom | tr -d ' \n')
export SWITCHYARD_STORE_SECRET

say "job ${name:-$SLURM_JOB_ID}, restart $restarts, on ${SLURM_JOB_NODELIST-?}: $tasks task(s), $gpus GPU(s) a node," \
    "${SLURM_CPUS_PER_TASK:-${SLURM_CPUS_ON_NODE-?} on the node} CPU(s) a task, srun ${srun_options[*]}"
say "$(env | grep -E '^(NCCL|GLOO|UCX|TORCH_NCCL|CUDA|MASTER)_' | sort | tr '\n' ' ')"

# A command of ours, once, before or after the ranks; inside the container where there is one. Its last line of output
# is the answer: a container may have words of its own before.
once() {
    local output code=0
    if [ -n "${SWITCHYARD_SRUN-}" ]; then
        output=$(
            unset SLURM_LABELIO # the user's wish for the ranks' output
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
# Not TERM: srun answers that by killing the tasks.
tell_ranks() { ! ranks_run || kill -USR1 "$ranks_pid" 2>/dev/null || true; }
on_signal() {
    if [ "$1" = INT ] && [ -n "$interrupted" ]; then
        say "interrupted again: the ranks are killed"
        if ranks_run; then kill -TERM "$ranks_pid" && wait "$ranks_pid" || true; fi
        exit 130
    fi
    [ "$1" != INT ] || interrupted=yes
    say "got $1: the ranks are to finish their step and write a checkpoint"
    asked=(--asked)
    tell_ranks
}
trap 'on_signal USR1' USR1
trap 'on_signal INT' INT
# Slurm tells the tasks itself, and more may be at work than a stop: a job that is cancelled is not to be requeued.
trap 'say "got TERM"' TERM

for word in "$@"; do
    case $word in
        -m | --multirun)
            say "error: a job trains one run, and $word asks for several: sbatch --array=... slurm/array.sh, a run per element"
            exit 2
            ;;
    esac
done

# The overrides come before the number of ranks, and first of all the run directory is made: a wrong setting ends here.
run_dir=$(once -m launch.check --job "$@" ranks="$tasks") || exit $?

# A step is known by its number in the job. An srun that outlives an earlier life, on a node that Slurm has given up, ends
# "its" step when its ranks die; so that this is not the step of the ranks below, each life counts on from a later one.
for ((step = 0; step < restarts; step++)); do
    srun --export=ALL --nodes=1 --ntasks=1 true || true
done

if [ "${#asked[@]}" = 0 ]; then
    # Block: the ranks of a node are neighbours, whatever the site's default.
    srun --kill-on-bad-exit=1 --wait=120 --mpi=none --distribution=block --nodes="$nodes" --ntasks="$tasks" \
        "${srun_options[@]}" "${python[@]}" -m launch.train "$@" &
    ranks_pid=$!
    # A signal that is trapped ends `wait`, and not what is waited for. srun passes none on to tasks that it has not
    # started yet, as while a container's image is fetched: it is repeated, and the ranks count it once.
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

# A batch script can outlive its job too, on a node that Slurm has given up.
ask_slurm
if [ "${count:-$restarts}" != "$restarts" ]; then
    say "this job goes on elsewhere (restart $count): this is restart $restarts, which ends here"
    exit 1
fi

verdict=$(once -m launch.verdict "${asked[@]}" "${interactive[@]}" "$run_dir") || true
case $verdict in
requeue) ;;
[0-9] | [0-9][0-9]) exit "$verdict" ;;
*)
    # What the run has been through may be unreadable, or the disk full; that Slurm had asked for this end is certain.
    # launch.check counts the restarts, so that this has an end.
    [ "${#asked[@]}" != 0 ] && [ "${#interactive[@]}" = 0 ] || exit 1
    say "there is no verdict on how the run ended, but it was asked to stop: requeued"
    ;;
esac

answer="the controller does not answer"
for _ in {1..30}; do # the controller may be restarting
    ask_slurm
    [ "${count:-$restarts}" = "$restarts" ] || exit 75 # somebody has requeued it already
    # Slurm itself may be ending the job: because its time is up, which is what requeueing is for, or for reasons of its
    # own: cancelled, or preempted.
    if [ "${state:-RUNNING}" != RUNNING ] && [ "$left" != INVALID ] && [ "$left" != 0:00 ]; then
        say "Slurm is ending this job ($state): not requeued"
        exit 75
    fi
    if [ -n "$state" ] && answer=$(scontrol requeue "$name" 2>&1); then
        say "requeued"
        sleep 300 & # Slurm ends this script now
        wait
        exit 75
    fi
    # Anything else, such as a time-out between here and the controller, may be better in a moment.
    [[ $answer != *@(disabled|denied|nvalid|not\ supported|already)* ]] || break
    sleep 10
done
say "$answer; submit again with run.dir=$run_dir to go on"
exit 75
