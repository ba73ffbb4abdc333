#!/bin/bash
# Cuts the root file system of an image into pieces that travel one by one to a machine without a registry, and prints them.
#
#     docker/pieces.sh IMAGE FOLDER [MIB]
#
# The image is one that buildah knows; a piece has at most MIB mebibytes (58). docker/trial.sh puts the pieces together
# again: it needs all that FOLDER holds then. COMPRESS is the command that compresses ("zstd -10 --long=27").
set -euo pipefail
image=$1 folder=$2 mib=${3:-58}
mkdir -p "$folder/tools"
rm -f "$folder"/image.tar.zst.*
container=$(buildah from --pull-never "$image")
trap 'buildah rm "$container" >/dev/null' EXIT
root=$(buildah mount "$container")
buildah inspect --type image --format '{{range .OCIv1.Config.Env}}{{println .}}{{end}}' "$image" | grep '=' >"$folder/environment"
# zstd with its libraries, because the other machine may have none.
for file in $(command -v zstd) $(ldd "$(command -v zstd)" | grep -o '/[^ ]*'); do cp -L "$file" "$folder/tools/"; done
tar -C "$root" --numeric-owner --sort=name -c . | ${COMPRESS:-zstd -q -10 --long=27} |
    split --bytes "${mib}M" --numeric-suffixes --suffix-length 3 - "$folder/image.tar.zst."
cd "$folder"
sha256sum environment tools/* image.tar.zst.* >SHA256SUMS
du -b --apparent-size image.tar.zst.*
echo "$(find . -name 'image.tar.zst.*' | wc -l) pieces, $(cat image.tar.zst.* | wc -c) bytes, of $(du -s -b "$root" | cut -f 1) unpacked"
