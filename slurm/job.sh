# Functions of all jobs; each .sbatch file sources it, from the folder in which sbatch was called.
source slurm/site.sh
# Not earlier: modules of a site often fail under these options.
set -euo pipefail

: "${SLURM_JOB_ID:?not set, expected within a job; start the script by sbatch}"

# srun forwards the signal; this shell keeps running, to requeue (scancel --full, --signal=B:USR1).
trap : USR1

# Older SLURM does not set it; a run needs it to save before the job's time ends.
if [[ -z ${SLURM_JOB_END_TIME:-} ]]; then
    end="$(squeue --noheader --job="$SLURM_JOB_ID" --format=%e)"
    export SLURM_JOB_END_TIME="$(date --date="$end" +%s 2>/dev/null || echo 0)"
fi
logs="${CAPTIONSCALE_LOGS:-captionscale-logs}/$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}"

# Run a command once on each node, in the site's container if any. After it ends on one node, the others have ten seconds
# to end: over NCCL they would wait for the one that failed, and --kill-on-bad-exit leaves no time to save.
on_nodes() {
    srun --ntasks-per-node=1 --cpus-per-task="$SLURM_CPUS_ON_NODE" --wait=10 "${srun_options[@]}" "${inside[@]}" "$@"
}

# Run a command in every process of the job, by a launcher on each node. A preempted command saves and exits with code 75:
# the job is then requeued and resumes.
launch() {
    local processes=() code=0
    if [[ -n ${SLURM_GPUS_ON_NODE:-} ]]; then
        processes=(--processes $((SLURM_GPUS_ON_NODE * SLURM_JOB_NUM_NODES)))
    fi
    on_nodes captionscale launch --profile "$CAPTIONSCALE_PROFILE" "${processes[@]}" --log-dir "$logs" -- "$@" || code=$?
    requeue_if_preempted "$code"
    return "$code"
}

# Requeue the job if a command with this exit code was preempted.
requeue_if_preempted() {
    # 138: USR1 came before its handler was set. This near the end of the time, no restart would get further.
    if (($1 == 138)) && [[ $SLURM_JOB_END_TIME =~ ^[1-9][0-9]*$ ]] && ((SLURM_JOB_END_TIME - $(date +%s) < 180)); then
        echo "job $SLURM_JOB_ID: its time ended while the command started, expected time to start; ask for more --time" >&2
        exit 1
    fi
    if (($1 == 75 || $1 == 138)); then requeue "preempted"; fi
}

# Check the job's nodes and experiment. A failure ends the job without requeueing it.
check() {
    local code=0 gpus=()
    if [[ ${CAPTIONSCALE_DOCTOR:-on} == off ]]; then return; fi
    if [[ -n ${SLURM_GPUS_ON_NODE:-} ]]; then gpus=(--gpus "$SLURM_GPUS_ON_NODE"); fi
    on_nodes captionscale doctor --quick --profile "$CAPTIONSCALE_PROFILE" "${gpus[@]}" "$@" || code=$?
    if ((code == 1)); then
        echo "job $SLURM_JOB_ID: ends, as captionscale doctor refuses it; CAPTIONSCALE_DOCTOR=off in site.sh skips the check" >&2
        exit 1
    fi
    requeue_if_preempted "$code"
}

# Train: experiment, folder of the run, changes.
train() {
    if (($# < 2)); then
        echo "${SLURM_JOB_NAME:-job}: $# arguments, expected EXPERIMENT RUN [--set ...]; add them" >&2
        exit 1
    fi
    local config="$1" run="$2" code=0 before
    check "$config" --out "$run" "${@:3}"
    before="$(newest "$run")"
    launch train "$config" --out "$run" "${@:3}" || code=$?
    # Above 128 a process was killed; without a new checkpoint a restart would only be killed again.
    if ((code > 128)) && [[ $(newest "$run") != "$before" ]]; then requeue "killed, with code $code"; fi
    exit "$code"
}

newest() { find "$1/checkpoints" -name 'step-*[0-9]' 2>/dev/null | sort | tail -n 1 || true; }

requeue() {
    echo "job $SLURM_JOB_ID: $1 after ${SLURM_RESTART_COUNT:-0} restarts; it is requeued"
    scontrol requeue "$SLURM_JOB_ID"
}
