# shellcheck shell=bash
# Runs one process of multinode.sh on its node; srun has set RANK. Nothing to edit here.

# shellcheck source=slurm/runtimes.sh
. "$JOB_HOME/slurm/runtimes.sh"
make_scratch
compose "$python" -m job run
carry_out
code=$?
[ "$LOCAL_RANK" != 0 ] || [ "$SLURM_NODEID" = 0 ] || rm -rf "$scratch"
(exit "$code")
