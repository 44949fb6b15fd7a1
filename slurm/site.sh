# The one file that a cluster edits. It is read by the shell that submits (`source slurm/site.sh`, or
# `captionscale submit`), for the SBATCH_ variables, and again at the start of each job.

# --- Where jobs run: sbatch reads these. Its command line takes precedence.
# export SBATCH_PARTITION=gpu SBATCH_ACCOUNT=my-project SBATCH_QOS=normal

# --- The environment. By default, a job has that of the shell that submitted it.
# module load cuda
if ! command -v captionscale >/dev/null && [[ -f .venv/bin/activate ]]; then source .venv/bin/activate; fi

# --- The launch profile: a file, or a name in launch/. The GPUs that SLURM grants override the profile's number.
export CAPTIONSCALE_PROFILE="${CAPTIONSCALE_PROFILE:-gpu}"

# --- Each training job begins with `captionscale doctor --quick`, which takes seconds and ends a job that would fail.
# export CAPTIONSCALE_DOCTOR=off

# --- A container that holds captionscale: either by srun's own option (Pyxis) ...
srun_options=()
# srun_options=(--container-image="$HOME/captionscale.sqsh" --container-mounts="$PWD,$HOME" --container-workdir="$PWD")
# ... or by a command that runs all others.
inside=()
# inside=(apptainer exec --nv --bind "$PWD,/scratch" "$HOME/captionscale.sif")

# --- Node-local disk: a cache of shards at a URL, downloaded when they are needed and checked against the manifest's
# BLAKE3; later jobs reuse them. Shards on the cluster's file system are cached too, if the experiment names them as
# local:// and their absolute path:  --set data.shards=local:///lustre/me/coco
# export CAPTIONSCALE_CACHE="${SLURM_TMPDIR:-/scratch/$USER}/captionscale"
# export TMPDIR="${SLURM_TMPDIR:-/tmp}"

# --- NCCL, which reduces gradients over GPUs. On most clusters it needs no settings; otherwise:
# The network interface by which ranks first meet; set it where nodes have several (ip addr), for gloo (CPUs) as well.
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0
# The InfiniBand adapters to use, if some are for storage (ibstat).
# export NCCL_IB_HCA=mlx5_0,mlx5_1
# Without InfiniBand or RoCE.
# export NCCL_IB_DISABLE=1
# Logs NCCL's choice for each rank: "NET/IB" is fast, "NET/Socket" is Ethernet.
# export NCCL_DEBUG=INFO NCCL_DEBUG_SUBSYS=INIT,NET
