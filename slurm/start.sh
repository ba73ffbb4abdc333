# shellcheck shell=bash
# Shared by train.sh, array.sh and multinode.sh, which source it on the compute node: signals, and what becomes of the
# Slurm job after each exit code. Nothing to edit here; settings are in slurm/site.env.

# shellcheck source=slurm/runtimes.sh
. "$JOB_HOME/slurm/runtimes.sh"

# How long there is: Slurm kills KillWait seconds after its SIGTERM, and ends the job at its time limit.
kill_wait=$(scontrol show config | sed -n 's/^KillWait *= *\([0-9]*\).*/\1/p')
: "${kill_wait:=30}" "${JOB_GRACE_SECONDS:=$((kill_wait > 8 ? kill_wait - 3 : 5))}"
: "${SLURM_JOB_END_TIME:=$(date -d "$(squeue -h -j "$SLURM_JOB_ID" -o %e)" +%s 2>/dev/null)}"
export JOB_GRACE_SECONDS SLURM_JOB_END_TIME
[[ ${JOB_MAX_RESTARTS:=50} =~ ^[0-9]+$ ]] || fail "JOB_MAX_RESTARTS is $JOB_MAX_RESTARTS; it is a number"
# By its number alone Slurm would take one task of an array, which bears the array's own, for all of them.
this=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}

# SIGUSR1 comes ahead of the time limit (--signal): the job saves, leaves with 75, and we requeue it. SIGTERM comes when
# Slurm ends the job, and Slurm then decides what becomes of it: one that it preempted, or whose node broke, it requeues
# by itself; one that was cancelled must stay so.
child='' noticed='' ended=''
hear() {
    noticed=$1
    [ "$1" = USR1 ] || ended=1
    [ -z "$child" ] || { kill "-$1" "$child" 2>/dev/null && pkill "-$1" -P "$child"; }
}
trap 'hear USR1' USR1
trap 'hear TERM' TERM INT

# Run the function given to its end, whatever signals come. Returns its exit code; 75 when a signal came before it.
to_its_end() {
    [ -z "$noticed" ] || return 75
    rm -f "$scratch.code" # of a start that was killed here
    (
        trap : USR1 TERM INT # outlive them, to tell the code: bash's wait can lose it when a signal comes with the end
        "$@"
        code=$?
        echo "$code" >"$scratch.code"
        exit "$code" # which is all there is on a full disk
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

# Run the function given and do with the Slurm job what its exit code says: the table in job/errors.py.
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
        138 | 143) requeue "$code" ;; # a signal came before the job listened
        137) say "exit 137: killed; if Slurm says OUT_OF_MEMORY, raise --mem" ;;
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
