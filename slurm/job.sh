# What the jobs have in common; each .sbatch file sources it, from the folder that sbatch was called in.
source slurm/site.sh
# Not before: what a site loads is seldom written for these.
set -euo pipefail

: "${SLURM_JOB_ID:?not set, wanted within a job; start the script by sbatch}"

# srun passes it on; this shell stays, to requeue (scancel --full, --signal=B:USR1).
trap : USR1

# Older SLURM does not say when the job's time is over, and a run that knows saves before.
if [[ -z ${SLURM_JOB_END_TIME:-} ]]; then
    end="$(squeue --noheader --job="$SLURM_JOB_ID" --format=%e)"
    export SLURM_JOB_END_TIME="$(date --date="$end" +%s 2>/dev/null || echo 0)"
fi
logs="${CAPTIONSCALE_LOGS:-captionscale-logs}/$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}"

# Run something once on each node, in the site's container if it has one. When it ends on one, it has ten seconds to
# end on the others: over NCCL they would wait for the one that failed, and --kill-on-bad-exit leaves no time to save.
on_nodes() {
    srun --ntasks-per-node=1 --cpus-per-task="$SLURM_CPUS_ON_NODE" --wait=10 "${srun_options[@]}" "${inside[@]}" "$@"
}

# Run a command in every process of the job: a launcher on each node starts the node's. Asked to leave, it saves and
# ends with code 75: the job then goes back into the queue and on by itself.
launch() {
    local processes=() code=0
    if [[ -n ${SLURM_GPUS_ON_NODE:-} ]]; then
        processes=(--processes $((SLURM_GPUS_ON_NODE * SLURM_JOB_NUM_NODES)))
    fi
    on_nodes captionscale launch --profile "$CAPTIONSCALE_PROFILE" "${processes[@]}" --log-dir "$logs" -- "$@" || code=$?
    requeue_if_left "$code"
    return "$code"
}

# Go back into the queue if something that ended with this code was asked to leave.
requeue_if_left() {
    # 138: USR1 came before it could listen. So near the end of the time no job would ever get further.
    if (($1 == 138)) && [[ $SLURM_JOB_END_TIME =~ ^[1-9][0-9]*$ ]] && ((SLURM_JOB_END_TIME - $(date +%s) < 180)); then
        echo "job $SLURM_JOB_ID: its time ended before it could listen, wanted time to start in; ask for more --time" >&2
        exit 1
    fi
    if (($1 == 75 || $1 == 138)); then requeue "left"; fi
}

# Look at the job's nodes and at what it is to do. What would make it fail ends it here; it does not come back.
examine() {
    local code=0 gpus=()
    if [[ ${CAPTIONSCALE_DOCTOR:-on} == off ]]; then return; fi
    if [[ -n ${SLURM_GPUS_ON_NODE:-} ]]; then gpus=(--gpus "$SLURM_GPUS_ON_NODE"); fi
    on_nodes captionscale doctor --quick --profile "$CAPTIONSCALE_PROFILE" "${gpus[@]}" "$@" || code=$?
    if ((code == 1)); then
        echo "job $SLURM_JOB_ID: ends, as captionscale doctor refuses it; CAPTIONSCALE_DOCTOR=off in site.sh leaves it out" >&2
        exit 1
    fi
    requeue_if_left "$code"
}

# Train: experiment, folder of the run, changes.
train() {
    if (($# < 2)); then
        echo "${SLURM_JOB_NAME:-job}: $# words after the script's name, wanted EXPERIMENT RUN [--set ...]; add them" >&2
        exit 1
    fi
    local config="$1" run="$2" code=0 before
    examine "$config" --out "$run" "${@:3}"
    before="$(newest "$run")"
    launch train "$config" --out "$run" "${@:3}" || code=$?
    # Above 128 a process was killed; without a checkpoint since the start it would only be killed again.
    if ((code > 128)) && [[ $(newest "$run") != "$before" ]]; then requeue "hit, with code $code"; fi
    exit "$code"
}

newest() { find "$1/checkpoints" -name 'step-*[0-9]' 2>/dev/null | sort | tail -n 1 || true; }

requeue() {
    echo "job $SLURM_JOB_ID: $1 after ${SLURM_RESTART_COUNT:-0} restarts; it goes back into the queue"
    scontrol requeue "$SLURM_JOB_ID"
}
