#!/bin/sh
# Installs the packages of docker/gpu.lock into /opt/venv, checked by their hashes, and moves the large ones to /layers; the
# Dockerfile runs it. They seldom change, so as separate layers they are pulled in parallel, and not again for a new release.
set -eu
packages=$(echo /opt/venv/lib/python3*/site-packages)
install() { /opt/venv/bin/pip install --no-compile --require-hashes --no-deps "$@"; }
install -r /build/build.lock
install --no-build-isolation -r /build/gpu.lock
# Leave out the AGPL parts of Unsloth's wheel (Studio and its command line), and bitsandbytes' libraries for other GPUs.
cd "$packages"
rm -rf studio unsloth_cli bitsandbytes/libbitsandbytes_rocm* bitsandbytes/libbitsandbytes_xpu*
find . -name '*.a' -delete
# Compile bytecode now, because the image runs read-only. Some packages hold templates that are not valid Python.
/opt/venv/bin/python -m compileall -q -j 0 --invalidation-mode unchecked-hash . || true
for part in nvidia torch triton; do
    mkdir -p "/layers/$part$packages"
    mv "$part" "/layers/$part$packages/"
done
