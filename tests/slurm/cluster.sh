#!/usr/bin/env bash
# A real SLURM cluster of two nodes on this machine, in a folder of its own, on ports of its own; for root.
#   cluster.sh start FOLDER, then SLURM_CONF=FOLDER/slurm.conf for every command; cluster.sh stop FOLDER
set -euo pipefail
home="$2"
export SLURM_CONF="$home/slurm.conf"
# Wait until a command succeeds, at most 20 seconds.
wait_for() {
    for ((tries = 0; tries < 200; tries++)); do
        if "$@"; then return; fi
        sleep 0.1
    done
    echo "$0: waited too long for: $*" >&2
    return 1
}

if [[ $1 == stop ]]; then
    no_jobs() { [[ -z $(squeue --noheader) ]]; }
    no_munge() { [[ ! -e "$home/munge.pid" ]]; }
    scancel --user=root
    # What a node still ends when its daemon is gone would live on.
    wait_for no_jobs
    kill $(cat "$home"/*.pid)
    wait_for no_munge
    rm -r "$(dirname "$(readlink "$home/munge.pid")")"
    exit
fi
port=$((20000 + $$ % 10000))
install -d "$home/state"
# A folder that munge's user reaches, whatever the rights of those above ours are.
keys="$(mktemp -d /tmp/munge.XXXXXX)"
head -c 128 /dev/urandom >"$keys/key"
chmod 400 "$keys/key"
chown -R munge "$keys"
chmod 755 "$keys"
runuser -u munge -- munged --force --key-file="$keys/key" --socket="$keys/socket" --pid-file="$keys/pid" \
    --log-file="$keys/log" --seed-file="$keys/seed"
ln -s "$keys/pid" "$home/munge.pid"
# The nodes' names are addresses in hexadecimal: any machine finds them, and /etc/hosts stays as it is.
# cred_expire is how long a requeued job waits: two minutes without it.
cat >"$home/slurm.conf" <<END
ClusterName=test
SlurmctldHost=localhost
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$keys/socket,cred_expire=5
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
KillWait=5
SchedulerParameters=sched_interval=1,batch_sched_delay=0
SlurmdParameters=config_overrides
SlurmctldPort=$port
StateSaveLocation=$home/state
SlurmdSpoolDir=$home/spool.%n
SlurmdPidFile=$home/slurmd.%n.pid
SlurmctldPidFile=$home/slurmctld.pid
SlurmdLogFile=$home/slurmd.%n.log
SlurmctldLogFile=$home/slurmctld.log
NodeName=0x7f00000[1-2] NodeHostname=localhost NodeAddr=127.0.0.1 Port=[$((port + 1))-$((port + 2))] CPUs=8
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
END
{
    slurmctld
    slurmd -N 0x7f000001
    slurmd -N 0x7f000002
} >"$home/start.log" 2>&1
ready() { [[ $(sinfo --noheader --states=idle --format=%D 2>/dev/null) == 2 ]]; }
wait_for ready
