# shellcheck shell=bash disable=SC2034 # other files run `command`
# Reads the site's settings, and builds the command with which each container runtime starts the job: with the GPUs of the Slurm
# job, a scratch folder, and the folders and variables that the site names, but not the home. The other scripts source it;
# nothing to edit here.

say() { echo "slurm: $*" >&2; }
fail() { say "$1"; exit 78; }

# Read the site's settings; the environment takes precedence.
before=$(export -p)
set -a
# shellcheck disable=SC1090  # the site's own file
if [ -f "${JOB_SITE:=$JOB_HOME/slurm/site.env}" ]; then . "$JOB_SITE"; fi
eval "$before"
scratch=${JOB_NODE_SCRATCH:-/tmp}/vision-lora-$SLURM_JOB_ID

# Pass the spec as text, so that its file need not be visible elsewhere.
[ -n "${JOB_SPEC:-}" ] || fail "JOB_SPEC is empty; export it (a spec's path, URL or text), and let sbatch hand it on: --export=ALL"
if [ -f "$JOB_SPEC" ]; then JOB_SPEC=$(cat "$JOB_SPEC"); fi
set +a

: "${JOB_RUNTIME:=apptainer}"
[ -n "${JOB_IMAGE:-}" ] || fail "JOB_IMAGE is empty; say in slurm/site.env what to start"
container=vision-lora-${SLURM_CLUSTER_NAME:+$SLURM_CLUSTER_NAME-}$SLURM_JOB_ID${RANK:+-$RANK} # a node can belong to two clusters
python=/opt/venv/bin/python
[ "$JOB_RUNTIME" != venv ] || python=$JOB_IMAGE/bin/python

# Variables passed to the job: its own, and those that configure stores, hubs, proxies and NCCL.
shopt -s extglob
known='JOB_SPEC|JOB__*|JOB_SCRATCH|JOB_SCRATCH_GB|JOB_GRACE_SECONDS|JOB_LEASE_SECONDS|JOB_GPU_MEMORY_GB|JOB_IMAGE_DIGEST|JOB_SERVE_PYTHON|JOB_RADEVAL_PYTHON|JOB_BUNDLE|AWS_*|HF_*'
known+='|JOB_METRICS_PORT|JOB_PRICE_PER_HOUR|HUGGING_FACE_HUB_TOKEN|SSL_CERT_FILE|REQUESTS_CA_BUNDLE|@(http|https|no|HTTP|HTTPS|NO)_@(proxy|PROXY)|NCCL_*|GLOO_*|WANDB_*|MLFLOW_*'
known+='|SLURM_JOB_ID|SLURM_JOB_END_TIME|SLURM_RESTART_COUNT|RANK|LOCAL_RANK|WORLD_SIZE|LOCAL_WORLD_SIZE|MASTER_@(ADDR|PORT)'
[ -z "${JOB_PASS_ENV:-}" ] || known+="|${JOB_PASS_ENV// /|}"

names() {
    local name
    for name in $(compgen -e); do if [[ $name == @($known) ]]; then echo "$name"; fi; done
}

# For runtimes that pass on their own environment: stop exporting all other variables.
keep_names() {
    local name
    for name in $(compgen -e); do
        [[ $name == @($known|PATH|USER|HOME|LANG|LD_LIBRARY_PATH|CUDA_VISIBLE_DEVICES) ]] || export -n "${name?}"
    done
}

# Set `command` to the command that runs PROGRAM ARGUMENTS under JOB_RUNTIME. Changes this shell's environment.
compose() {
    local name folder gpus=${SLURM_STEP_GPUS:-${SLURM_JOB_GPUS:-}} # the job's own lists those of its first node
    local -a mounts=("$scratch:/scratch") options=()
    export JOB_SCRATCH=/scratch
    if [ -f "$JOB_IMAGE.digest" ]; then JOB_IMAGE_DIGEST=$(cat "$JOB_IMAGE.digest") && export JOB_IMAGE_DIGEST; fi
    case ${JOB_BUNDLE:-s3://} in /*) mounts+=("$JOB_BUNDLE:$JOB_BUNDLE:ro") ;; s3://*) ;; *) fail "JOB_BUNDLE is $JOB_BUNDLE; give its whole path" ;; esac
    for folder in ${JOB_MOUNTS:-}; do
        case $folder in *:ro) mounts+=("${folder%:ro}:$folder") ;; *) mounts+=("$folder:$folder") ;; esac
    done
    case $JOB_RUNTIME in
        apptainer)
            export APPTAINERENV_TMPDIR=/scratch # Apptainer's own /tmp is 64 MB of memory
            for name in $(names) ${CUDA_VISIBLE_DEVICES+CUDA_VISIBLE_DEVICES}; do export "APPTAINERENV_$name=${!name-}"; done
            for folder in "${mounts[@]:1}"; do options+=(--bind "$folder"); done
            command=(apptainer exec ${gpus:+--nv} --contain --cleanenv --no-eval --home "${mounts[0]}" --pwd /scratch "${options[@]}"
                "$JOB_IMAGE" "$@") ;;
        pyxis)
            name=$(names | paste -sd ,),CUDA_VISIBLE_DEVICES
            command=(srun --export="$name" --container-image="$JOB_IMAGE" --container-mounts="$(IFS=, && echo "${mounts[*]}")"
                --no-container-mount-home --container-readonly --container-workdir=/scratch "$@") ;;
        podman | docker)
            for name in $(names); do options+=(--env "$name"); done
            for folder in "${mounts[@]}"; do options+=(--volume "$folder"); done
            [ -z "${JOB_METRICS_PORT:-}" ] || [ "${RANK:-0}" != 0 ] || options+=(--publish "$JOB_METRICS_PORT:$JOB_METRICS_PORT")
            case ${gpus:+$JOB_RUNTIME} in
                docker) options+=(--gpus "\"device=$gpus\"") ;;
                podman) for name in ${gpus//,/ }; do options+=(--device "nvidia.com/gpu=$name"); done ;;
            esac
            [ "$JOB_RUNTIME" = docker ] || [ "$(id -u)" = 0 ] || options+=(--userns keep-id)
            "$JOB_RUNTIME" rm -f "$container" >/dev/null 2>&1 # left by a start that was killed here
            command=("$JOB_RUNTIME" run --name "$container" --user "$(id -u):$(id -g)" --read-only --tmpfs /tmp --shm-size 8g
                --cap-drop ALL --security-opt no-new-privileges "${options[@]}" --entrypoint "$1" "$JOB_IMAGE" "${@:2}") ;;
        charliecloud)
            for folder in "${mounts[@]}"; do
                name=${folder#*:} && mkdir -p "$JOB_IMAGE/${name%:ro}"
                options+=(--bind "${folder%:ro}")
            done
            command=(ch-run --private-tmp --set-env=HOME=/scratch --set-env=TMPDIR=/scratch --cd /scratch "${options[@]}" "$JOB_IMAGE" --
                "$@")
            keep_names ;;
        venv)
            command=("$@")
            JOB_SCRATCH=$scratch
            keep_names ;;
        *) fail "JOB_RUNTIME is $JOB_RUNTIME; it can be apptainer, pyxis, podman, docker, charliecloud or venv" ;;
    esac
}

# shellcheck source=slurm/carry_out.sh
. "$JOB_HOME/slurm/carry_out.sh"
