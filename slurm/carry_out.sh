# shellcheck shell=bash disable=SC2154 # runtimes.sh, which sources this, sets the names
# Makes the scratch folder, runs the command that `compose` built, and finds its exit code. Nothing to edit here.

make_scratch() {
    (umask 077 && mkdir -p "$scratch" && [ -O "$scratch" ] && [ ! -L "$scratch" ]) ||
        fail "JOB_NODE_SCRATCH: $scratch cannot be made on $(hostname), or is a link or another user's"
}

# Run the command that `compose` built and return its exit code: 71 if the kernel killed it for lack of memory, which no retry fixes.
carry_out() {
    local code before
    before=$(oom_kills)
    run_command
    code=$?
    if [ "$code" = 137 ] && { [ "$oom_killed" = true ] || [ "$(oom_kills)" -gt "$before" ]; }; then
        say "the kernel killed the job because host memory ran out; raise --mem"
        return 71
    fi
    return "$code"
}

# Print how many processes of this cgroup the kernel has killed for lack of memory; 0 if unknown.
oom_kills() {
    local path
    path=$(sed -n 's/^[0-9]*:[^:]*memory[^:]*://p' /proc/self/cgroup)
    if [ -n "$path" ]; then path=/memory$path/memory.oom_control; else path=$(sed -n 's/^0:://p' /proc/self/cgroup)/memory.events; fi
    sed -n 's/^oom_kill //p' "/sys/fs/cgroup$path" 2>/dev/null | grep . || echo 0
}

oom_killed=false # reported by podman and docker, whose containers have their own cgroups

# Slurm signals podman together with the helper that should forward the signal, so it may never reach the container. So signal the
# container here as well, and ask for its exit code if podman itself died of a signal.
run_command() {
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
    oom_killed=$("$JOB_RUNTIME" inspect --format '{{.State.OOMKilled}}' "$container" 2>/dev/null)
    "$JOB_RUNTIME" rm -f "$container" >/dev/null 2>&1
    return "$code"
}

tell() {
    local try
    for try in 1 2 3; do "$JOB_RUNTIME" kill --signal "$1" "$container" >/dev/null 2>&1 && return; done
    return "$try"
}
