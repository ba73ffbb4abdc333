# `make demo` and `make test` set up all that they need.
PYTHON_VENV = .venv/bin/python
DEMO = build/demo

.PHONY: demo test lint clean

demo:
	@.ci/venv train
	@$(PYTHON_VENV) examples/make_demo.py $(DEMO)
	@JOB_SPEC=examples/demo.yaml JOB_SCRATCH=$(DEMO)/scratch $(PYTHON_VENV) -m job run
	@$(PYTHON_VENV) -m job status $(DEMO)/output

test:
	@.ci/venv train dev
	@$(PYTHON_VENV) -m ruff check .
	@$(PYTHON_VENV) -m ruff format --check .
	@$(PYTHON_VENV) -m mypy
	@$(PYTHON_VENV) -m pytest

lint:
	@.ci/venv train dev
	@$(PYTHON_VENV) -m ruff check --fix .
	@$(PYTHON_VENV) -m ruff format .
	@$(PYTHON_VENV) -m mypy

clean:
	rm -rf .venv build .pytest_cache .mypy_cache .ruff_cache .hypothesis
