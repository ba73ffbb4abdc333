#!/bin/sh
# Installs the packages of docker/gpu.lock into /opt/venv, checked by their hashes, and moves the large ones to /layers; the
# Dockerfile runs it. They seldom change, so as separate layers they are pulled in parallel, and not again for a new release.
set -eu
packages=$(echo /opt/venv/lib/python3*/site-packages)
install() { /opt/venv/bin/pip install --no-compile --require-hashes --no-deps "$@"; }
install -r /build/build.lock
install --no-build-isolation -r /build/gpu.lock
cd "$packages"
# Leave out the AGPL parts of Unsloth's wheel (Studio and its command line), and bitsandbytes' libraries for other GPUs and CUDAs.
cuda=$(sed -n "s/^cuda.*= '\([0-9]*\)\.\([0-9]*\)'$/\1\2/p" torch/version.py)
test -e "bitsandbytes/libbitsandbytes_cuda$cuda.so"
find bitsandbytes -name 'libbitsandbytes_*' ! -name '*_cpu.so' ! -name "*_cuda$cuda.so" -delete
rm -rf studio unsloth_cli
# Leave out CUDA libraries that nothing here links to or opens by name, which is checked. docs/image.md says why each part may go.
unused='libcusolverMg libnvrtc.alt libnvrtc-builtins.alt libnvblas libcufftw libcheckpoint libpcsamplingutil'
for library in $unused; do rm nvidia/cu13/lib/"$library".so*; done
rm -rf triton/backends/nvidia/lib/cupti # for Triton's profiler alone
found=$(for library in $unused; do grep -rlaF --include='*.so*' "$library" . || true; done | sort -u)
[ -z "$found" ] || { echo "install-gpu.sh: $found name a library that is left out" >&2; exit 1; }
rm nvidia/nvshmem/lib/libnvshmem_device.bc
# Leave out tests, test tools, static libraries, pyarrow's client of Arrow Flight, and all of AWS but S3 and what signs in to it.
rm -rf test torch/bin/protoc* triton/FileCheck triton/instrumentation/*Test* pyarrow/*flight* pyarrow/_pyarrow_cpp_tests*
for package in networkx nibabel numpy pandas pyarrow sympy; do find "$package" -type d -name tests -prune -exec rm -rf {} +; done
find botocore/data -mindepth 1 -maxdepth 1 -type d ! -name s3 ! -name sts ! -name 'sso*' ! -name signin -exec rm -rf {} +
find . -name '*.a' -delete
/opt/venv/bin/python /build/strip.py .
/opt/venv/bin/python -B -c 'import datasets, gdcm, nibabel, pydicom, torch, torchvision, transformers, triton'
# Compile bytecode now, because the image runs read-only. Some packages hold templates that are not valid Python.
/opt/venv/bin/python -m compileall -q -j 0 --invalidation-mode unchecked-hash . || true
for part in nvidia torch triton; do
    mkdir -p "/layers/$part$packages"
    mv "$part" "/layers/$part$packages/"
done
