# shellcheck shell=bash disable=SC2154,SC2329
# What launch/train.sh does in a Slurm job, in a batch script as in salloc's shell: check, start one task per GPU, stop
# them when Slurm says that time is nearly up, and then go by what stop.json says. srun's own exit code says little:
# with --kill-on-bad-exit, ranks that end a moment apart are reported as killed.
#
#   python           array: the command that starts Python
#   SWITCHYARD_SRUN  further options for every srun, such as a container's

say() { echo "train.sh: $*" >&2; }

nodes=${SLURM_JOB_NUM_NODES:-1} gpus=${SLURM_GPUS_ON_NODE:-0}
tasks=${SLURM_NTASKS:-$((nodes * (gpus > 0 ? gpus : 1)))}
read -ra srun_options <<<"${SWITCHYARD_SRUN-}"
[ -z "${SLURM_CPUS_PER_TASK-}" ] || # srun does not take this over from sbatch by itself
    srun_options+=(--cpus-per-task="$SLURM_CPUS_PER_TASK" --cpu-bind=cores)
# Megatron-Core counts on kernels starting in the order in which they were given.
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
restarts=${SLURM_RESTART_COUNT:-0}

say "job $SLURM_JOB_ID, restart $restarts, on ${SLURM_JOB_NODELIST-?}: $tasks task(s), $gpus GPU(s) a node," \
    "${SLURM_CPUS_PER_TASK:-${SLURM_CPUS_ON_NODE-?} on the node} CPU(s) a task${srun_options:+, srun ${srun_options[*]}}"
say "$(env | grep -E '^(NCCL|GLOO|UCX|TORCH_NCCL|CUDA)_' | sort | tr '\n' ' ')"

# A command of ours, once, before or after the ranks; inside the container where there is one.
once() {
    if [ -n "${SWITCHYARD_SRUN-}" ]; then
        srun --nodes=1 --ntasks=1 "${srun_options[@]}" "${python[@]}" "$@"
    else
        "${python[@]}" "$@"
    fi
}

asked=() ranks_pid=''
on_signal() {
    say "got $1: the ranks are to finish their step and write a checkpoint"
    asked=(--asked)
    # Not TERM: srun answers that by killing the tasks.
    [ -z "$ranks_pid" ] || kill -USR1 "$ranks_pid" 2>/dev/null || true
}
trap 'on_signal USR1' USR1
trap 'on_signal INT' INT
# Slurm tells the tasks itself, and more may be at work than a stop: a job that is cancelled is not to be requeued.
trap 'say "got TERM"' TERM

# The overrides come before the number of ranks, and first of all the run directory is made: a wrong setting ends here.
run_dir=$(once -m launch.check --job "$@" ranks="$tasks") || exit $?

# A step is known by its number in the job. An srun that outlives an earlier life, on a node that Slurm has given up, ends
# "its" step when its ranks die; so that this is not the step of the ranks below, each life counts on from a later one.
for ((step = 0; step < restarts; step++)); do
    srun --nodes=1 --ntasks=1 true || true
done

if [ "${#asked[@]}" = 0 ]; then
    # Block: the ranks of a node are neighbours, whatever the site's default.
    srun --kill-on-bad-exit=1 --wait=120 --mpi=none --distribution=block --nodes="$nodes" --ntasks="$tasks" \
        "${srun_options[@]}" "${python[@]}" -m launch.train "$@" &
    ranks_pid=$!
    # A signal that is trapped ends `wait`, and not what is waited for.
    while kill -0 "$ranks_pid" 2>/dev/null; do wait "$ranks_pid" || true; done
fi

# How often Slurm says that this job was started again, its state, and the time it has left; empty where nobody answers.
ask_slurm() {
    read -r count state left < <(
        squeue --noheader --job="$SLURM_JOB_ID" --Format='RestartCnt: ,State: ,TimeLeft: ' 2>/dev/null
    ) || true
}

# A batch script can outlive its job too, on a node that Slurm has given up.
count='' state='' left=''
ask_slurm
if [ "${count:-$restarts}" != "$restarts" ]; then
    say "this job goes on elsewhere (restart $count): this is restart $restarts, which ends here"
    exit 1
fi

[ "${ENVIRONMENT-}" = BATCH ] || asked+=(--interactive)
verdict=$(once -m launch.verdict "${asked[@]}" "$run_dir") || exit 1
[ "$verdict" = requeue ] || exit "$verdict"

for _ in {1..30}; do # the controller may be restarting
    answer="the controller does not answer"
    ask_slurm
    [ "${count:-$restarts}" = "$restarts" ] || exit 75 # somebody has requeued it already
    # Slurm itself may be ending the job: because its time is up, which is what requeueing is for, or for reasons of its
    # own: cancelled, or preempted.
    if [ "${state:-RUNNING}" != RUNNING ] && [ "$left" != INVALID ] && [ "$left" != 0:00 ]; then
        say "Slurm is ending this job ($state): not requeued"
        exit 75
    fi
    if [ -n "$state" ] && answer=$(scontrol requeue "$SLURM_JOB_ID" 2>&1); then
        say "requeued"
        sleep 300 & # Slurm ends this script now
        wait
        exit 75
    fi
    [[ $answer == *controller* ]] || break
    sleep 10
done
say "$answer; submit again with run.dir=$run_dir to go on"
exit 75
