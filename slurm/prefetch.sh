#!/bin/bash
# Run this on a login node with internet, before the first job. It downloads the image, and everything that the spec names, to
# folders that compute nodes can read. From the repository's folder:
#
#     export JOB_SPEC=spec.yaml JOB_BUNDLE=/lustre/bundles/chest JOB_IMAGE_SOURCE=docker://registry/vision-lora-job@sha256:…
#     slurm/prefetch.sh
#
# Then submit with the same JOB_SPEC and JOB_BUNDLE. The image is downloaded to JOB_IMAGE unless it exists; without
# JOB_IMAGE_SOURCE it must exist. podman and docker pull their image themselves on the compute node; if that has no network,
# use another runtime. Nothing to edit here: settings are in slurm/site.env, and HF_TOKEN gives access to gated models.
set -u
JOB_HOME=${JOB_HOME:-$(cd "$(dirname "$0")/.." && pwd)}
SLURM_JOB_ID=prefetch-$$
# shellcheck source=slurm/runtimes.sh
. "$JOB_HOME/slurm/runtimes.sh"
[ -n "${JOB_BUNDLE:-}" ] || fail "JOB_BUNDLE is empty; it is the folder to gather into"

origin=${JOB_IMAGE_SOURCE:-}
if [ -n "$origin" ] && [ ! -e "$JOB_IMAGE" ]; then
    say "fetching $origin to $JOB_IMAGE"
    case $JOB_RUNTIME in
        apptainer) apptainer pull "$JOB_IMAGE" "$origin" ;;
        pyxis) enroot import --output "$JOB_IMAGE" "$origin" ;;
        charliecloud) ch-image pull "${origin#docker://}" && ch-convert "${origin#docker://}" "$JOB_IMAGE" ;;
        *) true ;;
    esac || fail "$origin cannot be fetched"
    case $origin in *@sha256:*) echo "${origin##*://}" >"$JOB_IMAGE.digest" ;; esac
fi

[ "$JOB_RUNTIME" != pyxis ] || fail "pyxis starts containers in jobs only; for this script set JOB_RUNTIME=venv and JOB_IMAGE to a
virtual environment with the train extra"
say "gathering what the spec names in $JOB_BUNDLE"
target=$JOB_BUNDLE
case $target in
    s3://*) ;;
    /*) mkdir -p "$target" && JOB_MOUNTS="${JOB_MOUNTS:-} $target" ;;
    *) fail "JOB_BUNDLE is $target; give its whole path, or an s3:// prefix" ;;
esac || fail "$target cannot be made"
make_scratch
unset JOB_BUNDLE # it does not exist yet
compose "$python" -m job prefetch "$JOB_SPEC" "$target"
carry_out
code=$?
rm -rf "$scratch"
exit "$code"
