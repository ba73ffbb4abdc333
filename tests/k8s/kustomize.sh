#!/bin/sh
# Puts a Kustomize of Debian's into FOLDER, without installing it: "kustomize.sh FOLDER".
set -eu
folder=$1
mkdir -p "$folder/lists/partial" "$folder/cache/archives/partial"
cd "$folder"
key=/usr/share/keyrings/debian-archive-keyring.gpg
echo "deb [signed-by=$key] http://deb.debian.org/debian trixie main" > sources.list
apt() {
  apt-get -qq -o Dir::Etc::sourcelist="$PWD/sources.list" -o Dir::Etc::sourceparts=/dev/null -o Dir::State::lists="$PWD/lists" \
    -o Dir::Cache="$PWD/cache" -o Acquire::Languages=none -o APT::Sandbox::User=root "$@"
}
apt update
apt download kustomize
dpkg -x kustomize_*.deb .
mv usr/bin/kustomize kustomize
rm -rf usr lists cache sources.list kustomize_*.deb
