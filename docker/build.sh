#!/bin/sh
# Builds the image with the first of docker (with buildx), podman and buildah that is installed, or with BUILDER. Passes its
# arguments to the builder.
#
#     docker/build.sh                                                   # vision-lora-job:gpu
#     docker/build.sh --build-arg VARIANT=cpu --tag vision-lora-job:cpu
#     BASE_IMAGE=docker.io/library/debian@sha256:… docker/build.sh      # a base that you choose
#
# Unless BASE_IMAGE is set, looks up the Dockerfile's base and pins it to its current digest.
set -eu
cd "$(dirname "$0")/.."
there() { command -v "$1" >/dev/null && { [ "$1" != docker ] || docker buildx version >/dev/null 2>&1; }; }
for builder in ${BUILDER:-docker podman buildah} ''; do [ -z "$builder" ] || ! there "$builder" || break; done
[ -n "$builder" ] || { echo "There is no ${BUILDER:-docker with buildx, podman or buildah} here; install one of them." >&2; exit 1; }

pinned() {
    case $builder in
        docker) digest=$(docker buildx imagetools inspect --format '{{.Manifest.Digest}}' "$1") ;;
        *) digest=$(skopeo inspect --format '{{.Digest}}' "docker://$1") ;;
    esac || { echo "The digest of $1 cannot be looked up; set BASE_IMAGE to ${1%:*}@sha256:…" >&2; exit 1; }
    echo "${1%:*}@$digest"
}
base=${BASE_IMAGE:-$(pinned "$(sed -n 's/^ARG BASE_IMAGE=//p' docker/Dockerfile)")}
revision=$(git rev-parse HEAD 2>/dev/null || echo unknown)
[ -z "$(git status --porcelain 2>/dev/null)" ] || revision=$revision-changed
version=$(sed -n 's/^version = "\(.*\)"$/\1/p' pyproject.toml)
created=$(git log -1 --format=%cI 2>/dev/null || echo unknown)
echo "builder: $builder, base: $base, version: $version, revision: $revision"

case $builder in
    docker) set -- build "$@" ;;
    podman) set -- build --format docker "$@" ;;
    buildah) set -- bud --format docker --isolation chroot --layers "$@" ;;
esac
case " $* " in *" --tag "* | *" -t "*) ;; *) set -- "$@" --tag vision-lora-job:gpu ;; esac
"$builder" "$@" --build-arg "BASE_IMAGE=$base" --build-arg "REVISION=$revision" --build-arg "VERSION=$version" \
    --build-arg "CREATED=$created" --file docker/Dockerfile .
