#!/usr/bin/env bash
# Starts or ends a real Slurm of one node on this machine, for trying build.sbatch: munged, slurmctld, slurmd. Needs
# root and Debian's packages: apt-get install --no-install-recommends slurmctld slurmd slurm-client munge
#
#   deploy/slurm/one_node.sh up FOLDER      then: export SLURM_CONF=FOLDER/slurm.conf
#   deploy/slurm/one_node.sh down FOLDER
set -euo pipefail
usage="usage: one_node.sh up|down FOLDER"
what=${1:?$usage}
folder=${2:?$usage}
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)
export SLURM_CONF="$folder/slurm.conf"

stop() {
    printf 'one_node: %s\n' "$*" >&2
    exit 1
}

running() { [ -s "$folder/$1.pid" ] && kill -0 "$(cat "$folder/$1.pid")" 2>/dev/null; }

down() {
    for one in slurmd slurmctld munged; do
        running $one || continue
        kill "$(cat "$folder/$one.pid")"
        for _ in $(seq 100); do running $one || break; sleep 0.1; done
        ! running $one || stop "$one does not end (pid $(cat "$folder/$one.pid"))"
    done
}

up() {
    for one in munged slurmctld slurmd sbatch; do
        PATH="$PATH:/usr/sbin" command -v $one >/dev/null || stop "no $one; install slurmctld slurmd slurm-client munge"
    done
    [ "$(id -u)" = 0 ] || stop "slurmd starts jobs of other users, so it needs root"
    ! running slurmctld || stop "it is running in $folder already"
    mkdir -p "$folder/state" "$folder/spool" "$folder/munge"
    chmod 755 "$folder" && chmod 700 "$folder/munge"
    [ -s "$folder/munge/key" ] || (umask 077 && head -c 1024 /dev/urandom >"$folder/munge/key")
    cpus=$(nproc)
    memory=$(awk '/MemTotal/ {print int($2 / 1024)}' /proc/meminfo)
    host=$(hostname -s)
    cat >"$SLURM_CONF" <<CONF
ClusterName=one
SlurmctldHost=$host(127.0.0.1)
AuthInfo=socket=$folder/munge.socket
CredType=cred/munge
SlurmUser=root
SlurmctldPort=26817
SlurmdPort=26818
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.log
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
SlurmdParameters=config_overrides
ReturnToService=2
NodeName=$host NodeAddr=127.0.0.1 CPUs=$cpus RealMemory=$memory State=UNKNOWN
PartitionName=all Nodes=$host Default=YES MaxTime=INFINITE State=UP
CONF
    PATH="$PATH:/usr/sbin"
    munged --force --key-file="$folder/munge/key" --socket="$folder/munge.socket" --pid-file="$folder/munged.pid" \
        --log-file="$folder/munge/log" --seed-file="$folder/munge/seed"
    slurmctld
    slurmd
    for _ in $(seq 300); do
        [ "$(sinfo --noheader --format=%T 2>/dev/null)" = idle ] && { echo "one_node: ready; export SLURM_CONF=$SLURM_CONF"; return; }
        sleep 0.1
    done
    down
    stop "the node is not idle within 30 s; see $folder/slurmctld.log and slurmd.log"
}

case $what in
up) up ;;
down) down ;;
*) stop "$usage" ;;
esac
