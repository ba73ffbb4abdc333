# `make demo` and `make test` set up all that they need.
PYTHON_VENV = .venv/bin/python
DEMO = build/demo

# One more than there are cores, at most four: tests on a cluster mostly wait.
WORKERS ?= $(shell n=$$(nproc); [ $$n -lt 3 ] && echo $$((n + 1)) || echo 4)

.PHONY: demo example-vqa test check lint docs clean kill-proof fence-proof resume-proof shard-proof verdict-proof near-duplicates reader-test fuzz hostile-stores disk-proof test-gpu test-image image-gpu test-slurm test-gguf test-radeval test-trackers test-serve test-store bench-store bench-prefix public-sets bench-gpu bench-scaling bench-whole-job bench-release whole-job test-families test-unsloth bench

demo:
	@.ci/venv train
	@$(PYTHON_VENV) examples/make_demo.py $(DEMO)
	@OMP_NUM_THREADS=1 JOB_SPEC=examples/demo.yaml JOB_SCRATCH=$(DEMO)/scratch $(PYTHON_VENV) -m job run
	@$(PYTHON_VENV) -m job status $(DEMO)/output

# Questions about studies of two DICOM images with several findings, on the demo's model.
example-vqa:
	@.ci/venv train dev
	@$(PYTHON_VENV) examples/make_demo.py $(DEMO)
	@$(PYTHON_VENV) examples/make_vqa.py build/vqa/data
	@OMP_NUM_THREADS=1 JOB_SCRATCH=build/vqa/scratch $(PYTHON_VENV) -m job run examples/vqa.yaml
	@$(PYTHON_VENV) -m job status build/vqa/output

test: check
	@.ci/system
	@.ci/formats
	@.ci/unsloth
	@$(PYTHON_VENV) -m pytest -n $(WORKERS) --dist loadscope --no-loadscope-reorder

# Linter, format and types; changes nothing. `make lint` mends what can be mended.
check:
	@.ci/venv train dev
	@$(PYTHON_VENV) -m ruff check .
	@$(PYTHON_VENV) -m ruff format --check .
	@$(PYTHON_VENV) -m mypy

# The pages of docs/ as a site: build/site/index.html.
docs:
	@.ci/venv train dev
	@NO_MKDOCS_2_WARNING=1 $(PYTHON_VENV) -m mkdocs build --strict --quiet
	@echo build/site/index.html

# Long proofs; a smaller sample of each is in the suite.
kill-proof:
	@.ci/venv train dev
	@$(PYTHON_VENV) tests/checkpoint/kill_proof.py $(or $(N),200)

fence-proof:
	@.ci/venv train dev
	@OMP_NUM_THREADS=1 $(PYTHON_VENV) -m tests.fence_proof $(or $(N),100) $(or $(SEED),0) $(if $(UNFENCED),unfenced)

# How often a verdict is wrong where nothing changed, and how often a change is seen.
verdict-proof:
	@.ci/venv train dev
	@OMP_NUM_THREADS=1 $(PYTHON_VENV) -m tests.evaluate.verdict_proof $(or $(N),2000)

# Copies that are found across the split, and different films taken for copies, among FILMS.
near-duplicates:
	@.ci/venv train dev
	@OMP_NUM_THREADS=1 $(PYTHON_VENV) benchmarks/near_duplicates.py --films $(or $(FILMS),10000)

# How many findings are read right from sentences, of those that the rules were tuned to and of those kept aside.
reader-test:
	@.ci/venv train dev
	@$(PYTHON_VENV) -m tests.evaluate.reader_test

# RadEval in an environment of its own (2 GB), on tiny models.
test-radeval:
	@.ci/venv train dev
	@.ci/radeval
	@OMP_NUM_THREADS=1 $(PYTHON_VENV) -m pytest tests/evaluate/test_radeval.py

# W&B (offline), MLflow and model-signing themselves, in an environment of their own on top of .venv (400 MB).
test-trackers:
	@.ci/venv train dev
	@.ci/trackers
	@PYTHONPATH=. OMP_NUM_THREADS=1 build/trackers/bin/python -m pytest tests/train/test_trackers.py tests/output/test_verify.py

resume-proof:
	@.ci/venv train dev
	@$(PYTHON_VENV) -m tests.resume_proof $(or $(N),50)

shard-proof:
	@.ci/venv train dev
	@OMP_NUM_THREADS=1 $(PYTHON_VENV) -m tests.shard_proof $(FAMILIES)
	@OMP_NUM_THREADS=1 $(PYTHON_VENV) -m tests.shard_memory

# N cases of each kind of wrong input, or of the KINDS that are named, and SPECS specs that are read alone; those that end as a
# bug, late or with much memory are kept in build/fuzz.
PICTURES = images dicom archives
fuzz:
	@.ci/venv train dev
ifneq ($(filter-out $(PICTURES),$(or $(KINDS),all)),)
	@OMP_NUM_THREADS=1 $(PYTHON_VENV) -m tests.fuzz $(or $(N),1000) --specs $(or $(SPECS),100000) --seed $(or $(SEED),0) \
	  $(if $(KINDS),--targets $(filter-out $(PICTURES),$(KINDS)))
endif
ifneq ($(filter $(PICTURES),$(or $(KINDS),$(PICTURES))),)
	@$(PYTHON_VENV) -m tests.fuzz_pictures $(or $(N),1000) --seed $(or $(SEED),0) \
	  --kinds $(filter $(PICTURES),$(or $(KINDS),$(PICTURES)))
endif

# Seconds and memory of fetching an s3:// prefix of OBJECTS.
bench-prefix:
	@.ci/venv train dev
	@OMP_NUM_THREADS=1 $(PYTHON_VENV) -m benchmarks.prefix $(or $(OBJECTS),20000)

# The whole job on each layout of a public set; the suite has two.
public-sets:
	@.ci/venv train dev
	@PUBLIC_SETS=all OMP_NUM_THREADS=1 $(PYTHON_VENV) -m pytest tests/data/test_public_sets.py -k whole_job

# Every kind of store that misbehaves: how often each was asked, and what became of it.
hostile-stores:
	@.ci/venv train dev
	@$(PYTHON_VENV) -m tests.store.hostile

# Whole jobs whose scratch dies, fills up or becomes read-only in each stage, or in STAGES ("train" "stage in").
disk-proof:
	@.ci/venv train dev
	@OMP_NUM_THREADS=1 $(PYTHON_VENV) -m tests.disk_proof $(STAGES)

# The whole job in each family, or in FAMILY, stopped and killed on the way; the suite has one.
whole-job:
	@.ci/venv train dev
	@for family in $(or $(FAMILY),$$(cd benchmarks && ../$(PYTHON_VENV) -c "import shapes; print(*shapes.FAMILIES)")); do \
	  $(PYTHON_VENV) benchmarks/whole_job.py $$family --size tiny --folder build/whole-job/$$family || exit 1; done

# The whole job in each family, or in FAMILIES ("internvl gemma4"), stopped and killed on the way; the suite has two.
test-families:
	@.ci/venv train dev
	@OMP_NUM_THREADS=1 $(PYTHON_VENV) -m tests.family_proof $(FAMILIES)

# The same through Unsloth, on a CPU.
test-unsloth:
	@.ci/venv train dev
	@.ci/unsloth
	@OMP_NUM_THREADS=1 $(PYTHON_VENV) -m tests.family_proof --unsloth $(FAMILIES)
	@for tests in unsloth_on_cpu/compiling.py gpu/test_families.py model/test_collator.py; do \
	  UNSLOTH_ALLOW_CPU=1 UNSLOTH_COMPILE_LOCATION=build/unsloth-compiled PYTHONPATH=tests/unsloth_on_cpu:.:build/unsloth \
	  $(PYTHON_VENV) -m pytest -o filterwarnings= -p unsloth_first tests/$$tests || exit 1; done

# On a machine with an NVIDIA GPU and the gpu extra; JOB_TEST_MODEL may name a checkpoint in its real size.
PYTHON_GPU ?= python3
test-gpu:
	@$(PYTHON_GPU) -m pytest -c tests/gpu/pytest.ini --rootdir . --confcutdir tests/gpu tests/gpu

# The image in the variant that can run the demo, built without a daemon; as root on Debian.
test-image:
	@.ci/system
	@.ci/venv train dev
	@TEST_IMAGE_VARIANT=cpu $(PYTHON_VENV) -m pytest tests/docker

# The GPU image, or IMAGE, in pieces of at most MIB mebibytes, for a GPU machine without a registry; as root on Debian. It takes
# 20 GB. docker/trial.sh puts them together there and tries the image.
image-gpu:
	@.ci/system
	@.ci/venv train dev
	@image=$(IMAGE); image=$${image:-$$($(PYTHON_VENV) -m tests.docker.build gpu)} && \
	  nice docker/pieces.sh $$image build/image-gpu/pieces $(or $(MIB),58)
	@echo "there, with this checkout and the pieces in FOLDER/pieces: docker/trial.sh FOLDER"

# The tests of slurm/ on the newest Slurm that Debian has, and under Apptainer; as root on Debian.
test-slurm:
	@.ci/system
	@.ci/venv train dev
	@tests/cluster/newest.sh $(abspath $(PYTHON_VENV))

# GGUF by llama.cpp's own converter, and llama.cpp run on it, out of the sources that llama-cpp-python brings. Building it
# takes minutes, once.
LLAMA_CPP = build/llama-cpp/vendor/llama.cpp
LLAMA_CPP_BUILD = build/llama-cpp-built
test-gguf: $(LLAMA_CPP_BUILD)/bin/llama-mtmd-cli
	@.ci/venv train dev
	@LLAMA_CPP=$(abspath $(LLAMA_CPP)) LLAMA_CPP_BUILD=$(abspath $(LLAMA_CPP_BUILD)) $(PYTHON_VENV) -m pytest tests/export/test_gguf.py

$(LLAMA_CPP_BUILD)/bin/llama-mtmd-cli: | $(LLAMA_CPP)
	@command -v cmake >/dev/null && command -v c++ >/dev/null || { echo "llama.cpp is built here: install cmake and g++"; exit 1; }
	@cmake -S $(LLAMA_CPP) -B $(LLAMA_CPP_BUILD) -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON -DLLAMA_CURL=OFF \
	  -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_SERVER=OFF -DBUILD_SHARED_LIBS=ON >/dev/null
	@cmake --build $(LLAMA_CPP_BUILD) --target llama-mtmd-cli --parallel $$(nproc) >$(LLAMA_CPP_BUILD)/log 2>&1 || \
	  { tail -20 $(LLAMA_CPP_BUILD)/log; exit 1; }

$(LLAMA_CPP):
	@.ci/venv train dev
	@mkdir -p build/llama-cpp
	@$(PYTHON_VENV) -m pip download -q --no-deps --no-binary :all: -d build llama-cpp-python==0.3.36
	@tar -xzf build/llama_cpp_python-0.3.36.tar.gz -C build/llama-cpp --strip-components 1
	@rm build/llama_cpp_python-0.3.36.tar.gz

# A real vLLM on the CPU, in an environment of its own (3.5 GB), asked about tiny models of FAMILIES, and about faults.
test-serve:
	@.ci/venv train dev
	@.ci/vllm
	@OMP_NUM_THREADS=2 $(PYTHON_VENV) -m tests.serve_proof $(FAMILIES)

# The store's tests on a real Ceph, over http and https; as root on Debian.
test-store:
	@.ci/venv train dev
	@sh tests/store/ceph.sh $(abspath $(PYTHON_VENV)) -m pytest tests/store tests/checkpoint

# Each benchmark appends to benchmarks/results.jsonl; the last line renders benchmarks/RESULTS.md.
bench-store:
	@.ci/venv train dev
	@CEPH_SCHEMES=http CEPH_BYTES=11000000000 nice -n -10 sh tests/store/ceph.sh $(abspath $(PYTHON_VENV)) benchmarks/transfer.py --folder /dev/shm
	@$(PYTHON_VENV) benchmarks/checkpoint_stall.py
	@$(PYTHON_VENV) benchmarks/results.py

# On a GPU: MODEL is a Llama 3.2 Vision checkpoint, real or made by benchmarks/models.py.
bench-gpu:
	@$(PYTHON_GPU) benchmarks/throughput.py $(MODEL) --case language --restart --folder $(or $(FOLDER),/tmp/throughput)
	@$(PYTHON_GPU) benchmarks/throughput.py $(MODEL) --case everywhere --restart --folder $(or $(FOLDER),/tmp/throughput)
	@$(PYTHON_GPU) benchmarks/throughput.py $(MODEL) --case generation --rows 16 --folder $(or $(FOLDER),/tmp/throughput)
	@$(PYTHON_GPU) benchmarks/merge.py $(or $(FOLDER),/tmp/merge)
	@$(PYTHON_GPU) benchmarks/results.py

# The same with several GPUs.
bench-scaling:
	@$(PYTHON_GPU) benchmarks/scaling.py $(MODEL) --folder $(or $(FOLDER),/tmp/scaling)
	@$(PYTHON_GPU) benchmarks/results.py

# The whole job in the published shape of FAMILY, which may take CARD gigabytes of the GPU.
bench-whole-job:
	@$(PYTHON_GPU) benchmarks/whole_job.py $(or $(FAMILY),mllama) --card $(or $(CARD),48) \
	  $(if $(PRECISION),--precision $(PRECISION)) --folder $(or $(FOLDER),/tmp/whole-job)
	@$(PYTHON_GPU) benchmarks/results.py

# The whole jobs that every release runs, under 24, 48 and 80 GB, on as many GPUs as there are.
bench-release:
	@$(PYTHON_GPU) benchmarks/release.py --folder $(or $(FOLDER),/tmp/release)
	@$(PYTHON_GPU) benchmarks/results.py

bench:
	@.ci/venv train dev
	@$(PYTHON_VENV) benchmarks/demo.py
	@$(PYTHON_VENV) benchmarks/preemption.py
	@$(PYTHON_VENV) benchmarks/loader.py
	@$(PYTHON_VENV) benchmarks/decoding.py
	@$(PYTHON_VENV) benchmarks/near_duplicates.py
	@$(PYTHON_VENV) benchmarks/results.py

lint:
	@.ci/venv train dev
	@$(PYTHON_VENV) -m ruff check --fix .
	@$(PYTHON_VENV) -m ruff format .
	@$(PYTHON_VENV) -m mypy

clean:
	rm -rf .venv build .pytest_cache .mypy_cache .ruff_cache .hypothesis
