# shellcheck shell=bash
# Handles signals, and decides by the exit code whether the Slurm job is requeued. train.sh and multinode.sh source it
# on the compute node. Nothing to edit here: settings are in slurm/site.env.

# shellcheck source=slurm/runtimes.sh
. "$JOB_HOME/slurm/runtimes.sh"

# How much time is left: Slurm kills KillWait seconds after SIGTERM, and ends the job at its time limit.
kill_wait=$(scontrol show config | sed -n 's/^KillWait *= *\([0-9]*\).*/\1/p')
: "${kill_wait:=30}" "${JOB_GRACE_SECONDS:=$((kill_wait > 8 ? kill_wait - 3 : 5))}"
: "${SLURM_JOB_END_TIME:=$(date -d "$(squeue -h -j "$SLURM_JOB_ID" -o %e)" +%s 2>/dev/null)}"
export JOB_GRACE_SECONDS SLURM_JOB_END_TIME
[[ ${JOB_MAX_RESTARTS:=50} =~ ^[0-9]+$ ]] || fail "JOB_MAX_RESTARTS is $JOB_MAX_RESTARTS; it is a number"
# One task of an array has the id of the whole array, so its id alone would requeue all tasks.
this=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}

# SIGUSR1 comes before the time limit (--signal): the job saves and exits with 75, and this script requeues it. SIGTERM comes when
# Slurm ends the job. Slurm then requeues it by itself if it was preempted or its node failed; a cancelled job must stay
# cancelled.
child='' noticed='' ended=''
hear() {
    noticed=$1
    [ "$1" = USR1 ] || ended=1
    [ -z "$child" ] || { kill "-$1" "$child" 2>/dev/null && pkill "-$1" -P "$child"; }
}
trap 'hear USR1' USR1
trap 'hear TERM' TERM INT

# Run the given function to its end, whatever signals arrive. Returns its exit code, or 75 if a signal came first.
to_its_end() {
    [ -z "$noticed" ] || return 75
    rm -f "$scratch.code" # left by a start that was killed here
    (
        trap : USR1 TERM INT # survive them, to report the code: bash's wait can lose it when a signal arrives at the end
        "$@"
        code=$?
        echo "$code" >"$scratch.code"
        exit "$code" # the only report on a full disk
    ) &
    child=$!
    local code=137
    while kill -0 "$child" 2>/dev/null; do wait "$child"; code=$?; done
    return "$(grep . "$scratch.code" || echo "$code")"
}

payload() {
    compose "$python" -m job run
    carry_out
}

clean_up() {
    case $JOB_RUNTIME in podman | docker) "$JOB_RUNTIME" rm -f "$container" >/dev/null 2>&1 ;; esac
    rm -rf "$scratch" "$scratch.code"
}

# Run the given function, then end or requeue the Slurm job by its exit code, as in the table of job/errors.py.
start() {
    make_scratch
    trap clean_up EXIT
    say "job $SLURM_JOB_ID on $(hostname) by $JOB_RUNTIME, restarts so far: ${SLURM_RESTART_COUNT:-0}"
    to_its_end "$@"
    local code=$?
    case $code in
        0) say "done" ;;
        65 | 70 | 71 | 76 | 77 | 78 | 79) say "exit $code: the same would happen again, so it is not requeued" ;;
        69 | 75) requeue "$code" ;;
        # Killed, or a signal came before the job handled it. It continues from its last checkpoint, and exits with 79 if that
        # makes no progress; out of memory is 71.
        129 | 13? | 14? | 15?) requeue "$code" ;;
        *) say "exit $code is none of the job's: $JOB_RUNTIME or Python did not start it" ;;
    esac
    exit "$code"
}

requeue() {
    if [ -n "$ended" ] && [ "$(date +%s)" -lt "${SLURM_JOB_END_TIME:-9999999999}" ]; then
        say "exit $1: ended by Slurm, which requeues it by itself if it preempted it"
    elif [ "${SLURM_RESTART_COUNT:-0}" -ge "$JOB_MAX_RESTARTS" ]; then
        say "exit $1: JOB_MAX_RESTARTS is reached, so it is not requeued; submit it again to go on"
    elif scontrol requeue "${this:-$SLURM_JOB_ID}"; then
        say "exit $1: requeued"
    else
        say "exit $1: Slurm does not requeue it; submit it again to go on"
    fi
}
