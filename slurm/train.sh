#!/bin/bash
# One job on one GPU. From the repository's folder:
#
#     cp slurm/site.env.example slurm/site.env    # once; edit it
#     JOB_SPEC=spec.yaml sbatch slurm/train.sh
#
# Edit below what your site needs (partition, account, GPU type), or pass it to sbatch. The figures suit an 11B model on one
# RTX A6000, with room for loading in 16 bits. A job that needs more time than --time is requeued and continues.
#SBATCH --job-name=vision-lora
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@180
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=8
#SBATCH --mem=64G
#SBATCH --gres=gpu:1
#SBATCH --time=24:00:00

JOB_HOME=${JOB_HOME:-$SLURM_SUBMIT_DIR}
[ -f "$JOB_HOME/slurm/start.sh" ] || { echo "slurm: submit from the repository's folder, or set JOB_HOME to it" >&2; exit 78; }
# shellcheck source=slurm/start.sh
. "$JOB_HOME/slurm/start.sh"
start payload
