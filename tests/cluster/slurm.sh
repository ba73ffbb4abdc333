#!/bin/bash
# Runs a command on a private Slurm of three nodes, with two GPUs each that are only device files:
#
#     tests/cluster/slurm.sh bash            # a shell in which sbatch, squeue and scontrol work
#
# As root on Debian with slurm-wlm and munge. Each node is a slurmd in namespaces of its own (hostname, processes,
# mounts), so that killing its first process ends the node as a power cut would; its pid is in $CLUSTER/node1.pid, and
# `$CLUSTER/boot node1` starts it again. Partition "main" is the default and has node1 and node2; jobs of "urgent"
# preempt those of "main"; "frail" has node3, and node1 as the second choice.
set -eu

d=$(mktemp -d /tmp/slurm.XXXXXX)
chmod 755 "$d"
mkdir "$d/munge" "$d/state" "$d/node1" "$d/node2" "$d/node3"
pids=()
# shellcheck disable=SC2317,SC2046  # called by the trap; a list of numbers
stop() {
    { kill -9 $(cat "$d"/node?.pid) "${pids[@]}" || true; wait; } 2>/dev/null
    rm -rf "$d"
}
trap stop EXIT
trap 'exit 130' INT TERM

head -c 1024 /dev/urandom >"$d/munge/key"
chmod 400 "$d/munge/key"
munged --foreground --force --key-file="$d/munge/key" --socket="$d/munge/sock" --pid-file="$d/munge/pid" \
    --log-file="$d/munge/log" --seed-file="$d/munge/seed" 2>/dev/null &
pids+=($!)

taken() { for i in 0 1 2 3; do if (: >/dev/tcp/127.0.0.1/$((port + i))) 2>/dev/null; then return 0; fi; done; return 1; }
port=$((10000 + RANDOM % 10000))
while taken; do port=$((10000 + RANDOM % 10000)); done
for i in 0 1 2 3 4 5; do mknod "$d/gpu$i" c 195 "$i"; done
cat >"$d/gres.conf" <<END
NodeName=node1 Name=gpu File=$d/gpu[0-1]
NodeName=node2 Name=gpu File=$d/gpu[2-3]
NodeName=node3 Name=gpu File=$d/gpu[4-5]
END
cat >"$d/slurm.conf" <<END
ClusterName=test$port
FirstJobId=$((RANDOM * 10 + 1))
SlurmctldHost=$(hostname)(127.0.0.1)
SlurmctldPort=$port
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$d/munge/sock,cred_expire=5
CryptoType=crypto/munge
StateSaveLocation=$d/state
SlurmdSpoolDir=$d/%n/spool
SlurmctldPidFile=$d/slurmctld.pid
SlurmdPidFile=$d/%n/slurmd.pid
SlurmctldLogFile=$d/slurmctld.log
SlurmdLogFile=$d/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SlurmdParameters=config_overrides
GresTypes=gpu
KillWait=${SLURM_KILL_WAIT:-15}
SlurmdTimeout=6
ReturnToService=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SchedulerParameters=sched_interval=1,batch_sched_delay=0,sched_min_interval=100000
JobRequeue=1
NodeName=DEFAULT CPUs=16 RealMemory=200000 Gres=gpu:2
NodeName=node1 NodeAddr=127.0.0.1 NodeHostname=node1 Port=$((port + 1)) Weight=2
NodeName=node2 NodeAddr=127.0.0.1 NodeHostname=node2 Port=$((port + 2)) Weight=2
NodeName=node3 NodeAddr=127.0.0.1 NodeHostname=node3 Port=$((port + 3)) Weight=1
PartitionName=main Nodes=node1,node2 Default=YES MaxTime=INFINITE PriorityTier=1 GraceTime=${SLURM_GRACE_TIME:-0}
PartitionName=urgent Nodes=node1,node2 MaxTime=INFINITE PriorityTier=9 PreemptMode=OFF
PartitionName=frail Nodes=node1,node3 MaxTime=INFINITE PriorityTier=1
END
cat /etc/hosts >"$d/hosts"
echo "127.0.0.1 node1 node2 node3" >>"$d/hosts"
cat >"$d/boot" <<END
#!/bin/bash
# Boots the node named.
unshare --pid --fork --mount-proc --uts --mount --kill-child bash -c \
    'hostname \$0 && mount --bind $d/hosts /etc/hosts && { slurmd -D -N \$0 & wait; }' "\$1" </dev/null >"$d/\$1.out" 2>&1 &
echo \$! >"$d/\$1.pid"
END
chmod 755 "$d/boot"
export SLURM_CONF=$d/slurm.conf CLUSTER=$d
until [ -S "$d/munge/sock" ]; do sleep 0.05; done
slurmctld -D -i >"$d/slurmctld.out" 2>&1 &
pids+=($!)
for name in node1 node2 node3; do "$d/boot" "$name"; done
idle() { [ "$(sinfo -h -t idle -o %n 2>/dev/null | sort -u | wc -l)" = 3 ]; }
for _ in $(seq 600); do
    idle && break
    sleep 0.1
done
idle || { tail -n 20 "$d"/*.log "$d"/*.out >&2; exit 1; }
"$@"
