# shellcheck shell=bash disable=SC2154 # runtimes.sh, which sources this, sets the names
# The folder that the job writes to, and how what `compose` made is run and its code learned. Nothing to edit here.

make_scratch() {
    (umask 077 && mkdir -p "$scratch" && [ -O "$scratch" ]) ||
        fail "JOB_NODE_SCRATCH: $scratch cannot be made on $(hostname), or is another user's"
}

# Run what `compose` made, and return its code. Slurm signals podman together with what podman starts to pass the signal
# on, so that a container may never hear of it: it is told here too, and asked for its code where podman's own is a signal's.
carry_out() {
    case $JOB_RUNTIME in
        podman | docker) trap 'tell USR1' USR1 && trap 'tell TERM' TERM INT ;;
        *) "${command[@]}"; return ;;
    esac
    local code
    "${command[@]}" &
    wait $!
    code=$?
    while kill -0 $! 2>/dev/null; do wait $!; code=$?; done
    [ "$code" -lt 128 ] || code=$("$JOB_RUNTIME" wait "$container" 2>/dev/null || echo "$code")
    "$JOB_RUNTIME" rm -f "$container" >/dev/null 2>&1
    return "$code"
}

tell() {
    local try
    for try in 1 2 3; do "$JOB_RUNTIME" kill --signal "$1" "$container" >/dev/null 2>&1 && return; done
    return "$try"
}
