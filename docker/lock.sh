#!/bin/sh
# Renews docker/gpu.lock and docker/build.lock from pyproject.toml, with hashes. Needs uv.
set -eu
cd "$(dirname "$0")/.."
# torch and torchvision have the versions that the tests use (.ci/venv).
versions=$(sed -n 's/^torch=\([0-9.]*\) torchvision=\([0-9.]*\).*/torch==\1\ntorchvision==\2/p' .ci/venv)
compile() {
    UV_CUSTOM_COMPILE_COMMAND=docker/lock.sh uv pip compile -q --upgrade --no-config --index-url https://pypi.org/simple \
        --python-version 3.11 --python-platform x86_64-manylinux_2_28 --generate-hashes --annotation-style line "$@"
}
echo "$versions" >docker/.constraints
compile pyproject.toml --extra gpu --extra dicom --extra excel --extra nifti --extra trackers --extra fp8 --override docker/overrides.txt --constraint docker/.constraints -o docker/gpu.lock
rm docker/.constraints
grep -E '^(setuptools|wheel)==' docker/gpu.lock | sed 's/ .*//' >docker/.build
compile docker/.build -o docker/build.lock
rm docker/.build
