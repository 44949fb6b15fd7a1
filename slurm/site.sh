# The one file that a cluster edits: what a job needs before captionscale can run.

# Where the environment is; `make install` put it into the checkout.
source "${SLURM_SUBMIT_DIR}/.venv/bin/activate"

# A file, or a name in launch/: what one node has.
export CAPTIONSCALE_PROFILE="${CAPTIONSCALE_PROFILE:-gpu}"

# Such as: module load cuda; export NCCL_SOCKET_IFNAME=ib0; export TMPDIR="/scratch/${SLURM_JOB_ID}"
