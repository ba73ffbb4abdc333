#!/bin/bash
# One job on several nodes, with one process per GPU. From the repository's folder:
#
#     JOB_SPEC=spec.yaml sbatch --nodes=2 slurm/multinode.sh
#
# srun starts the processes itself, with the variables that torchrun would set. torchrun always exits with 1, and the exit
# code decides whether the script requeues the job. Each node needs a scratch folder and the image.
# Edit below what your site needs; ntasks-per-node must equal the number of GPUs in gres.
#SBATCH --job-name=vision-lora
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@180
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=2
#SBATCH --gres=gpu:2
#SBATCH --cpus-per-task=8
#SBATCH --mem=128G
#SBATCH --time=24:00:00

JOB_HOME=${JOB_HOME:-$SLURM_SUBMIT_DIR}
[ -f "$JOB_HOME/slurm/start.sh" ] || { echo "slurm: submit from the repository's folder, or set JOB_HOME to it" >&2; exit 78; }
# shellcheck source=slurm/start.sh
. "$JOB_HOME/slurm/start.sh"

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))
while (: >"/dev/tcp/$MASTER_ADDR/$MASTER_PORT") 2>/dev/null; do MASTER_PORT=$((MASTER_PORT + 1)); done # skips ports of other jobs
export MASTER_ADDR MASTER_PORT JOB_HOME

# Ranks may wait for one that has exited; this many seconds later they are ended too.
patience=900

# shellcheck disable=SC2016  # expanded by the shell of each rank
before='export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS LOCAL_WORLD_SIZE=$SLURM_NTASKS_PER_NODE
    trap : USR1 TERM' # survive them, to report the exit code; srun signals the job as well
# srun reports the highest exit code of all ranks. A code that stops the job must win over 75; a signal may precede the traps.
# shellcheck disable=SC2016
after='case $? in 138 | 143) exit 75 ;; 65) exit 165 ;; 70) exit 170 ;; 71) exit 171 ;; *) exit $? ;; esac'

# shellcheck disable=SC2317  # start calls it
ranks() {
    if [ "$JOB_RUNTIME" = pyxis ]; then
        srun --ntasks-per-node=1 --export=ALL bash -c "umask 077; mkdir -p ${scratch@Q}"
        compose bash -c "$before; \"\$@\"; $after" rank "$python" -m job run
        command=(srun --kill-on-bad-exit=0 --wait="$patience" "${command[@]:1}")
    else
        command=(srun --kill-on-bad-exit=0 --wait="$patience" --export=ALL bash -c "$before; . \"\$JOB_HOME/slurm/rank.sh\"; $after")
    fi
    "${command[@]}"
    case $? in 165) return 65 ;; 170) return 70 ;; 171) return 71 ;; *) return $? ;; esac
}
start ranks
