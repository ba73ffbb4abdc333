#!/bin/sh
# Run by the Dockerfile: installs what docker/gpu.lock lists into /opt/venv, checked by its hashes, and moves the large
# parts to /layers. They seldom change, so layers of their own are fetched side by side, and not again for a new release.
set -eu
packages=$(echo /opt/venv/lib/python3*/site-packages)
install() { /opt/venv/bin/pip install --no-compile --require-hashes --no-deps "$@"; }
install -r /build/build.lock
install --no-build-isolation -r /build/gpu.lock
# Of Unsloth's wheel the AGPL parts, Studio and its command line, stay out; of bitsandbytes' other makers' GPUs.
cd "$packages"
rm -rf studio unsloth_cli bitsandbytes/libbitsandbytes_rocm* bitsandbytes/libbitsandbytes_xpu*
find . -name '*.a' -delete
# Compiled here, since the image is read-only where it runs. Some packages hold templates that are no Python.
/opt/venv/bin/python -m compileall -q -j 0 --invalidation-mode unchecked-hash . || true
for part in nvidia torch triton; do
    mkdir -p "/layers/$part$packages"
    mv "$part" "/layers/$part$packages/"
done
