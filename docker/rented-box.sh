#!/bin/bash
# Runs one job on a rented GPU box, again after each interruption, and then stops the box so that it stops billing.
#
# On a machine with docker (Lambda, any cloud's virtual machine):
#
#     JOB_SPEC=spec.yaml JOB_IMAGE=registry/vision-lora-job@sha256:… nohup docker/rented-box.sh &
#
# If the box is itself a container (RunPod, vast.ai), use the image as the box's image, set JOB_SPEC and the store's variables
# in its settings, and give it this start command:
#
#     bash /opt/job/rented-box.sh
#
# To stop the box, RunPod and vast.ai set their own variables inside it. For Lambda, export LAMBDA_API_KEY and
# LAMBDA_INSTANCE_ID; an instance can only be terminated, so use an output in a store. Anywhere else, set JOB_STOP_COMMAND,
# such as "sudo shutdown -h now". JOB_STOP_COMMAND=true leaves the box running.
set -u

say() { echo "rented box: $*" >&2; }
name=vision-lora child='' noticed=''
python=/opt/venv/bin/python
[ -x "$python" ] || python=python3

request() { # METHOD URL TOKEN BODY
    "$python" - "$@" <<'END'
import sys, urllib.request
method, url, token, body = sys.argv[1:]
headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json", "User-Agent": "vision-lora-job"}
try:
    urllib.request.urlopen(urllib.request.Request(url, body.encode(), headers, method=method), timeout=60)
except OSError as error:
    sys.exit(f"rented box: {url} answers: {error}")
END
}

stop_box() {
    if [ -n "${JOB_STOP_COMMAND:-}" ]; then
        say "stopping the box: $JOB_STOP_COMMAND" && bash -c "$JOB_STOP_COMMAND"
    elif [ -n "${RUNPOD_POD_ID:-}" ]; then
        say "stopping RunPod's pod $RUNPOD_POD_ID"
        # The first version of its API has ended, and what runpodctl uses and how it is called depends on its version.
        request POST "${RUNPOD_API:-https://api.runpod.io}/v2/pods/$RUNPOD_POD_ID/action" "${RUNPOD_API_KEY:-}" '{"action": "stop"}' ||
            runpodctl pod stop "$RUNPOD_POD_ID" || runpodctl stop pod "$RUNPOD_POD_ID" || return 1
    elif [ -n "${CONTAINER_ID:-}" ] && [ -n "${CONTAINER_API_KEY:-}" ]; then
        say "stopping vast.ai's instance $CONTAINER_ID"
        if command -v vastai >/dev/null; then
            vastai stop instance "$CONTAINER_ID" --api-key "$CONTAINER_API_KEY"
        else
            request PUT "${VAST_API:-https://console.vast.ai}/api/v0/instances/$CONTAINER_ID/" "$CONTAINER_API_KEY" '{"state": "stopped"}'
        fi
    elif [ -n "${LAMBDA_INSTANCE_ID:-}" ]; then
        say "terminating Lambda's instance $LAMBDA_INSTANCE_ID"
        request POST "${LAMBDA_API:-https://cloud.lambda.ai}/api/v1/instance-operations/terminate" "${LAMBDA_API_KEY:-}" \
            "{\"instance_ids\": [\"$LAMBDA_INSTANCE_ID\"]}"
    else
        say "no way to stop this box is known; set JOB_STOP_COMMAND. It may be billing"
        return 2
    fi
}

# shellcheck disable=SC2317  # the trap calls it
hear() {
    noticed=1
    # shellcheck disable=SC2046  # a list; the image has no pkill
    [ -z "$child" ] || kill -TERM $(cat "/proc/$child/task/$child/children")
}
trap hear TERM INT

# Wait before the next attempt; a notice ends the wait.
pause() {
    sleep "${JOB_RESTART_SECONDS:-20}" &
    wait $!
    kill $! 2>/dev/null
}

leave_if_noticed() {
    [ -z "$noticed" ] || { say "exit $code: the box is being taken away; start the same job elsewhere to go on"; exit "$code"; }
}

# Run one attempt and return the job's exit code. The subshell survives signals, to report it.
attempt() {
    if [ "$python" = python3 ]; then
        local pass=() variable
        for variable in $(compgen -e); do
            case $variable in
                JOB_SPEC | JOB__* | JOB_GRACE_SECONDS | JOB_LEASE_SECONDS | JOB_GPU_MEMORY_GB | JOB_SCRATCH_GB | JOB_METRICS_PORT | JOB_PRICE_PER_HOUR | JOB_IMAGE_DIGEST | JOB_SERVE_PYTHON | JOB_RADEVAL_PYTHON | JOB_BUNDLE | \
                    AWS_* | HF_* | WANDB_* | MLFLOW_* | *_proxy | *_PROXY) pass+=(--env "$variable") ;;
            esac
        done
        [ -z "${JOB_METRICS_PORT:-}" ] || pass+=(--publish "$JOB_METRICS_PORT:$JOB_METRICS_PORT")
        docker stop --time "${JOB_GRACE_SECONDS:-30}" "$name" >/dev/null 2>&1 # left by a start that was killed here
        docker rm -f "$name" >/dev/null 2>&1
        set -- docker run --rm --name "$name" --gpus all --read-only --tmpfs /tmp --shm-size 8g --cap-drop ALL \
            --security-opt no-new-privileges --volume "$name-scratch:/scratch" "${pass[@]}" "$JOB_IMAGE"
    else
        set -- "$python" -m job run
    fi
    local codes
    codes=$(mktemp)
    (
        trap : TERM INT
        "$@"
        code=$?
        echo "$code" >"$codes"
        exit "$code" # the only report on a full disk
    ) &
    child=$!
    local code=137
    while kill -0 "$child" 2>/dev/null; do wait "$child"; code=$?; done
    child=''
    code=$(grep . "$codes" || echo "$code")
    rm -f "$codes"
    return "$code"
}

code=75 restarts=${JOB_MAX_RESTARTS:-50}
[[ $restarts =~ ^[1-9][0-9]*$ ]] || { say "JOB_MAX_RESTARTS is $restarts, which is no number above 0; 50 is taken"; restarts=50; }
if [ -f "${JOB_SPEC:-}" ]; then JOB_SPEC=$(cat "$JOB_SPEC"); fi
if [ "$python" = python3 ]; then
    [ -n "${JOB_IMAGE:-}" ] || { say "JOB_IMAGE is empty; say which image to run"; exit 78; }
    docker pull -q "$JOB_IMAGE" >/dev/null || say "$JOB_IMAGE cannot be pulled; an image that is here already will do"
    JOB_IMAGE_DIGEST=$(docker image inspect --format '{{index .RepoDigests 0}}' "$JOB_IMAGE" 2>/dev/null)
    export JOB_IMAGE_DIGEST
fi
for try in $(seq "$restarts"); do
    leave_if_noticed
    say "attempt $try"
    attempt
    code=$?
    leave_if_noticed
    # As in the table of job/errors.py. Codes above 128 are kills, for lack of memory for example, which the job itself counts.
    case $code in
        69 | 75 | 129 | 13? | 14? | 15?) pause ;;
        *) break ;;
    esac
done
leave_if_noticed
say "exit $code"
for _ in 1 2 3 4 5; do # retry, because a box that keeps running keeps billing
    stop_box
    stopped=$?
    [ "$stopped" = 1 ] || break
    pause
done
[ "$stopped" = 0 ] || code=$((code == 0 ? 1 : code))
exit "$code"
