#!/bin/bash
# A sweep: one spec, a table of overrides, and one output per row of the table. From the repository's folder:
#
#     export JOB_SPEC=spec.yaml JOB_SWEEP=sweep.tsv JOB_SWEEP_OUTPUT=s3://bucket/sweep
#     sbatch --array=1-$(($(grep -c . $JOB_SWEEP) - 1)) slurm/array.sh          # add %4 for at most four at once
#
# The first line of the table names fields of the spec; the other lines give values. Separate both with tabs:
#
#     training.learning_rate  lora.r
#     1e-4                    16
#     2e-4                    32
#
# The task of the second row publishes to $JOB_SWEEP_OUTPUT/2. Each task is preempted, requeued and resumed on its own.
# Edit below what your site needs; the settings are the same as in slurm/train.sh.
#SBATCH --job-name=vision-lora-sweep
#SBATCH --output=%x-%A-%a.log
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

task=${SLURM_ARRAY_TASK_ID:-}
[ -n "$task" ] || fail "slurm/array.sh runs as an array; give sbatch --array=1-N"
[ -f "${JOB_SWEEP:-}" ] || fail "JOB_SWEEP: there is no table ${JOB_SWEEP:-(it is empty)}"
[ -n "${JOB_SWEEP_OUTPUT:-}" ] || fail "JOB_SWEEP_OUTPUT is empty; it is the folder or URL under which each task has its own"
line() { sed -n "$1p" "$JOB_SWEEP" | tr -d '\r'; } # a spreadsheet may end lines with \r
IFS=$'\t' read -ra fields < <(line 1)
IFS=$'\t' read -ra values < <(line $((task + 1)))
[ "${#values[@]}" = "${#fields[@]}" ] || fail "JOB_SWEEP: row $task of $JOB_SWEEP has ${#values[@]} values for ${#fields[@]} fields"
for i in "${!fields[@]}"; do
    name=${fields[i]^^}
    export "JOB__${name//./__}=${values[i]}" || fail "JOB_SWEEP: ${fields[i]} in the first line of $JOB_SWEEP is no field of a spec"
    say "${fields[i]}: ${values[i]}"
done
export JOB__OUTPUT__URL=${JOB_SWEEP_OUTPUT%/}/$task
start payload
