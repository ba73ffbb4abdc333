#!/bin/bash
# Puts the pieces of docker/pieces.sh together on another machine, and runs the image there as a container runtime would. As
# root, from a checkout, without a runtime or a network (docs/image.md):
#
#     docker/trial.sh FOLDER [unpack] [smi] [imports] [demo] [stop]     # all five; FOLDER/pieces holds the pieces
#     docker/trial.sh FOLDER start NAME [VARIABLE=VALUE…] COMMAND…      # COMMAND as process 1, on scratch FOLDER/scratch-NAME
#
# Process 1 is the command, as user 23456 without capabilities; the root is read-only, and there is no network. It may write
# to /scratch and to /output, which stands for the store. /trial is this checkout's benchmarks/ and examples/. The driver's
# libraries and devices are bound in, when the machine has any.
#
# `stop` trains FAMILY (mllama) in its SIZE (full; tiny), on CARD GB of the GPU (48): SIGTERM to process 1 after STEPS steps
# (5) must end with 75, and a second start must publish. WORK (FOLDER) holds scratch, output and the base model.
set -euo pipefail
here=$(cd "$(dirname "$0")/.." && pwd)
mkdir -p "$1" "${WORK:-$1}"
folder=$(cd "$1" && pwd) work=$(cd "${WORK:-$1}" && pwd)
root=$folder/root user=23456 group=34567
shift

say() { echo "trial: $*"; }
seconds() { date +%s.%N; }
since() { printf '%.1f s' "$(echo "$1 $(seconds)" | awk '{ print $2 - $1 }')"; }

unpack() {
    local began tools=$folder/pieces/tools
    began=$(seconds)
    (cd "$folder/pieces" && sha256sum --quiet -c SHA256SUMS)
    say "the pieces are whole ($(since "$began"))"
    rm -rf "$root" && mkdir -p "$root"
    chmod +x "$tools"/ld-*
    cat "$folder"/pieces/image.tar.zst.* |
        "$tools/ld-linux-x86-64.so.2" --library-path "$tools" "$tools/zstd" -d -q --long=27 -c | tar -x -p --numeric-owner -C "$root"
    [ -z "$(driver)" ] || { sync && echo 3 >/proc/sys/vm/drop_caches; } 2>/dev/null || true # the first start shall be a cold one
    say "unpacked $(du -s --si "$root" | cut -f 1) ($(since "$began"))"
}

# Where the driver's libraries are; nothing on a machine without a GPU.
driver() {
    local place
    for place in /usr/local/nvidia/lib64 /usr/lib/x86_64-linux-gnu /usr/lib64; do
        [ ! -e "$place/libcuda.so.1" ] || { echo "$place"; return; }
    done
}

bound() { # SOURCE TARGET: a file or folder of the machine, at TARGET below the root
    if [ -d "$1" ]; then mkdir -p "$root$2"; else mkdir -p "$(dirname "$root$2")" && touch "$root$2"; fi
    mount --bind "$1" "$root$2"
}

# Runs inside the namespaces, as process 1, and becomes the command.
enter() { # SCRATCH COMMAND…
    local file place scratch=$1
    shift
    mount --bind "$root" "$root"
    mkdir -p "$root/output" "$root/trial"
    mount -t tmpfs -o mode=755 tmpfs "$root/dev"
    mkdir "$root/dev/shm" && mount -t tmpfs tmpfs "$root/dev/shm" && chmod 1777 "$root/dev/shm"
    ln -s /proc/self/fd "$root/dev/fd"
    for file in null zero full random urandom; do bound "/dev/$file" "/dev/$file"; done
    mount -t proc proc "$root/proc"
    mount -t sysfs -o ro sysfs "$root/sys" || mount --rbind /sys "$root/sys"
    for file in /dev/nvidia*; do [ ! -e "$file" ] || bound "$file" "$file"; done
    place=$(driver)
    for file in "$place"/lib{cuda,cudadebugger,nvidia-{ml,cfg,gpucomp,ptxjitcompiler,nvvm,allocator}}.so.*; do
        [ -z "$place" ] || [ ! -f "$file" ] || bound "$(readlink -f "$file")" "/usr/lib/x86_64-linux-gnu/${file##*/}"
    done
    if file=$(PATH=$PATH:/usr/local/nvidia/bin command -v nvidia-smi); then bound "$file" /usr/bin/nvidia-smi; fi
    [ -z "$place" ] || chroot "$root" /sbin/ldconfig 2>/dev/null
    bound "$scratch" /scratch
    bound "$work/output" /output
    bound "$here/benchmarks" /trial/benchmarks
    bound "$here/examples" /trial/examples
    mount -o remount,bind,ro "$root" || say "the root cannot be made read-only here" >&2
    # A runtime brings the loopback device up.
    chroot "$root" /opt/venv/bin/python -c 'import fcntl, socket, struct
fcntl.ioctl(socket.socket(), 0x8914, struct.pack("16sh14x", b"lo", 0x49))' || say "there is no loopback device" >&2
    cd /
    exec chroot "$root" /usr/bin/setpriv --reuid $user --regid $group --clear-groups --no-new-privs --inh-caps=-all \
        --bounding-set=-all -- /usr/bin/env -C /scratch -- "$@"
}

# Starts a command in the image and waits for it; the file FOLDER/NAME.pid names the process that waits for process 1.
start() { # NAME [VARIABLE=VALUE…] COMMAND…
    local scratch=$work/scratch-$1 name=$1 image each spaces=()
    shift
    mkdir -p "$scratch" "$work/output"
    chmod 1777 "$scratch" "$work/output"
    mapfile -t image <"$folder/pieces/environment"
    for each in --pid --net --ipc --uts; do
        if unshare "$each" --fork true 2>/dev/null; then spaces+=("$each"); else say "unshare $each is refused here" >&2; fi
    done
    env -i PATH="$PATH" WORK="$work" unshare --mount --propagation private "${spaces[@]}" --fork --kill-child \
        "$here/docker/trial.sh" "$folder" enter "$scratch" /usr/bin/env -i "${image[@]}" "$@" &
    echo $! >"$folder/$name.pid"
    wait $!
}

smi() {
    [ -n "$(driver)" ] || { say "this machine has no driver"; return 0; }
    start smi nvidia-smi
}

imports() {
    start imports python /trial/benchmarks/image.py
}

demo() {
    start demo python /trial/examples/make_demo.py /output/demo ${SMALL:+--small}
    start demo JOB__MODEL__NAME_OR_PATH=/output/demo/base JOB__DATASET__PATH=/output/demo/data \
        JOB__OUTPUT__URL=/output/demo/output python -m job run /trial/examples/demo.yaml
    say "the demo is published: $(wc -c <"$work/output/demo/output/RESULT.json") bytes of RESULT.json"
}

# How many steps a start has made: its lines of the metrics, without those of the checkpoint that it began from.
steps() {
    cat "$work/scratch-$1"/*/metrics.jsonl 2>/dev/null |
        awk -v from="$from" '{ sub(/.*"step": */, "") } $0 + 0 > from { steps++ } END { print steps + 0 }'
}

job() { # NAME: one start of the job of `stop`, in the background
    local card=${CARD:-48}
    [ -n "$(driver)" ] || card=''
    from=$(find "$work/output/stop" -name MANIFEST.json | sed -n 's/.*step-0*\([0-9]*\).*/\1/p' | sort -n | tail -1)
    start "$1" JOB_SPEC="$(cat "$work/output/stop/spec.yaml")" ${card:+JOB_GPU_MEMORY_GB="$card"} python -m job run >"$folder/$1.log" 2>&1 &
    began=$(seconds) running=$!
    until [ "$(steps "$1")" -gt 0 ] || ! kill -0 "$running" 2>/dev/null; do sleep 0.1; done
    say "$1: from step ${from:-0}, the first step ended after $(since "$began")"
}

ended() { # NAME CODE: waits for it, and wants this exit code
    local code=0
    wait "$running" || code=$?
    rm -rf "$work/scratch-$1"
    [ "$code" = "$2" ] || { tail -30 "$folder/$1.log"; say "$1: ended with $code, not $2"; exit 1; }
}

stop() {
    local began from running noticed waits
    rm -rf "$work/output/stop"
    start stop python /trial/benchmarks/image.py prepare /output/stop "${FAMILY:-mllama}" "${SIZE:-full}"
    job notice
    until [ "$(steps notice)" -ge "${STEPS:-5}" ] || ! kill -0 "$running" 2>/dev/null; do sleep 0.1; done
    waits=$(cat "$folder/notice.pid")
    kill -TERM "$(cat "/proc/$waits/task/$waits/children")" || true
    noticed=$(seconds)
    ended notice 75
    say "notice: SIGTERM to process 1, exit 75 after $(since "$noticed")"
    job again
    ended again 0
    say "again: published after $(since "$began")"
    tail -3 "$folder/again.log"
}

case ${1:-} in
    start | enter)
        "$@"
        exit
        ;;
esac
for step in "${@:-unpack smi imports demo stop}"; do
    for each in $step; do "$each"; done
done
