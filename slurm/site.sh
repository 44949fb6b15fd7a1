# The one file that a cluster edits. It is read by the shell that submits (`source slurm/site.sh`, or
# `captionscale submit`), for the SBATCH_ variables, and again at the start of each job.

# --- Where jobs go: sbatch reads these. What its command line says comes first.
# export SBATCH_PARTITION=gpu SBATCH_ACCOUNT=my-project SBATCH_QOS=normal

# --- The environment. Without any, a job has that of the shell that submitted it.
# module load cuda
if ! command -v captionscale >/dev/null && [[ -f .venv/bin/activate ]]; then source .venv/bin/activate; fi

# --- What a node has: a file, or a name in launch/. A node's GPUs that SLURM grants count more than the profile's.
export CAPTIONSCALE_PROFILE="${CAPTIONSCALE_PROFILE:-gpu}"

# --- Each job of training begins with `captionscale doctor --quick`, which takes seconds and ends a job that would fail.
# export CAPTIONSCALE_DOCTOR=off

# --- A container that holds captionscale: either by srun's own option (Pyxis) ...
srun_options=()
# srun_options=(--container-image="$HOME/captionscale.sqsh" --container-mounts="$PWD,$HOME" --container-workdir="$PWD")
# ... or by a command that everything is then said to.
inside=()
# inside=(apptainer exec --nv --bind "$PWD,/scratch" "$HOME/captionscale.sif")

# --- Node-local disk. Shards at a URL come here, each node's own, once, as they are needed, their BLAKE3 compared with
# the manifest's; a later job finds them again. Shards on the cluster's file system too, if the experiment names them
# as local:// and their absolute path:  --set data.shards=local:///lustre/me/coco
# export CAPTIONSCALE_CACHE="${SLURM_TMPDIR:-/scratch/$USER}/captionscale"
# export TMPDIR="${SLURM_TMPDIR:-/tmp}"

# --- NCCL, which carries gradients between GPUs. It finds its way by itself on most clusters; where it does not:
# The network interface by which ranks first meet; set it where nodes have several (ip addr), for gloo (CPUs) as well.
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0
# The InfiniBand adapters to use, where some are for storage (ibstat).
# export NCCL_IB_HCA=mlx5_0,mlx5_1
# Without InfiniBand or RoCE: does not look for it.
# export NCCL_IB_DISABLE=1
# What NCCL chose, in the log of each rank: "NET/IB" is fast, "NET/Socket" is Ethernet. The first thing to look at.
# export NCCL_DEBUG=INFO NCCL_DEBUG_SUBSYS=INIT,NET
