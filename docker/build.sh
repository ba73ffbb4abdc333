#!/bin/sh
# Builds the image with the first of docker, podman and buildah that is installed. Passes its arguments to the builder.
#
#     docker/build.sh                                                   # vision-lora-job:gpu
#     docker/build.sh --build-arg VARIANT=cpu --tag vision-lora-job:cpu
#     BASE_IMAGE=docker.io/library/debian@sha256:… docker/build.sh      # a base that you choose
#
# Unless BASE_IMAGE is set, looks up the Dockerfile's base and pins it to its current digest.
set -eu
cd "$(dirname "$0")/.."
for builder in docker podman buildah ''; do command -v "$builder" >/dev/null && break; done
[ -n "$builder" ] || { echo "There is no docker, podman or buildah here; install one of them." >&2; exit 1; }

pinned() {
    case $builder in
        docker) digest=$(docker buildx imagetools inspect --format '{{.Manifest.Digest}}' "$1") ;;
        *) digest=$(skopeo inspect --format '{{.Digest}}' "docker://$1") ;;
    esac
    echo "${1%:*}@$digest"
}
base=${BASE_IMAGE:-$(pinned "$(sed -n 's/^ARG BASE_IMAGE=//p' docker/Dockerfile)")}
revision=$(git rev-parse HEAD 2>/dev/null || echo unknown)
[ -z "$(git status --porcelain 2>/dev/null)" ] || revision=$revision-changed
echo "base: $base, revision: $revision"

case $builder in
    docker) set -- build "$@" ;;
    podman) set -- build --format docker "$@" ;;
    buildah) set -- bud --format docker --isolation chroot --layers "$@" ;;
esac
case " $* " in *" --tag "* | *" -t "*) ;; *) set -- "$@" --tag vision-lora-job:gpu ;; esac
"$builder" "$@" --build-arg "BASE_IMAGE=$base" --build-arg "REVISION=$revision" --file docker/Dockerfile .
