# shellcheck shell=bash
# One process of multinode.sh, on its node; srun has set its RANK. Nothing to edit here.

# shellcheck source=slurm/runtimes.sh
. "$JOB_HOME/slurm/runtimes.sh"
(umask 077 && mkdir -p "$scratch" && [ -O "$scratch" ]) ||
    fail "JOB_NODE_SCRATCH: $scratch cannot be made on $(hostname), or is another user's"
compose "$python" -m job run
carry_out
code=$?
[ "$LOCAL_RANK" != 0 ] || [ "$SLURM_NODEID" = 0 ] || rm -rf "$scratch"
(exit "$code")
