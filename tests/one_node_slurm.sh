#!/bin/sh
# A SLURM of one node on this machine, for tests/test_batch.py: as root, on Debian or Ubuntu.
#   apt-get install --no-install-recommends slurmctld slurmd slurm-client munge && sh tests/one_node_slurm.sh FOLDER
# It has no accounting, so sacct does not answer: like many small clusters.
set -e
folder=$(realpath -m "${1:?name a folder for its state and logs}"); host=$(hostname -s)
mkdir -p "$folder/ctl" "$folder/d" /run/munge
chown munge: /run/munge
[ -f /etc/munge/munge.key ] || { head -c 1024 /dev/urandom > /etc/munge/munge.key; chown munge: /etc/munge/munge.key; chmod 400 /etc/munge/munge.key; }
pgrep -x munged > /dev/null || su -s /bin/sh munge -c /usr/sbin/munged
cat > /etc/slurm/slurm.conf <<CONF
ClusterName=one
SlurmctldHost=$host(127.0.0.1)
AuthType=auth/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation=$folder/ctl
SlurmdSpoolDir=$folder/d
SlurmctldPidFile=$folder/ctl.pid
SlurmdPidFile=$folder/d.pid
SlurmctldLogFile=$folder/ctl.log
SlurmdLogFile=$folder/d.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
KillWait=5
NodeName=$host NodeAddr=127.0.0.1 CPUs=$(nproc) State=UNKNOWN
PartitionName=main Nodes=$host Default=YES MaxTime=INFINITE State=UP
CONF
slurmctld; slurmd; sleep 3; sinfo
