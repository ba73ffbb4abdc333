#!/bin/bash
# Runs the tests of slurm/ on the newest Slurm that Debian has, and under Apptainer: `tests/cluster/newest.sh PYTHON`.
#
# As root on Debian. Makes a root of Debian's unstable suite in build/newest, once, and the unpacked image of tests/docker
# beside it, and runs pytest in that root with PYTHON, which must not be the system's own (the root has another).
set -eu
cd "$(dirname "$0")/../.."
python=$1
root=$PWD/build/newest
if [ ! -e "$root/.whole" ]; then
    rm -rf "$root"
    mmdebstrap --quiet --variant=apt --include=apptainer,slurm-wlm,munge,procps,mount,ca-certificates,libffi8,libbz2-1.0,libsqlite3-0,libgomp1,libstdc++6 \
        --aptopt='Acquire::Languages "none"' --aptopt='Acquire::Check-Valid-Until "false"' \
        --keyring=/usr/share/keyrings/debian-archive-keyring.gpg sid "$root" 'deb http://deb.debian.org/debian sid main'
    cp /etc/hosts /etc/resolv.conf "$root/etc/"
    [ -e "$root/etc/localtime" ] || cp -L /usr/share/zoneinfo/UTC "$root/etc/localtime"
    touch "$root/.whole"
fi
image=$("$python" -m tests.docker.build light | tail -n 1)
container=$(buildah from "$image")
rm -rf build/unpacked
cp -a "$(buildah mount "$container")" build/unpacked
buildah rm "$container" >/dev/null

mapfile -t places < <("$python" -c 'import sys; print(sys.prefix, sys.base_prefix, sep="\n")')
export TEST_UNPACKED=$PWD/build/unpacked PYTHONPATH=$PWD USER=root PATH=/usr/sbin:/usr/bin:/sbin:/bin
# shellcheck disable=SC2016  # for the shell inside
exec unshare --mount --propagation private bash -c '
    root=$1 python=$2
    shift 2
    mount --bind "$root" "$root"
    for folder in /proc /sys /dev /tmp "$PWD" "$@"; do mkdir -p "$root$folder" && mount --rbind "$folder" "$root$folder"; done
    mkdir -p "$root/.host"
    here=$PWD
    cd "$root" && pivot_root . .host && cd "$here"
    slurmctld -V && apptainer --version
    "$python" -m pytest -q ${TESTS:-tests/cluster tests/docker/test_in_slurm.py}
' newest "$root" "$python" "${places[@]}"
