# `make repro` and `make test` need Python 3.11 or newer, git and a package registry; nothing is activated or
# installed outside .venv. `make repro GPU=1` takes TensorFlow with CUDA, and every target keeps it from then on;
# `GPU=` (empty) goes back to the CPU.

ifndef PYTHON
PYTHON := $(shell command -v python3)
endif
# Otherwise `make ui` after `make repro GPU=1` would put the CPU's environment in the place of the other one.
ifeq ($(origin GPU),undefined)
GPU := $(wildcard .venv/.ready-requirements-gpu.lock)
endif
ifdef GPU
LOCK := requirements-gpu.lock
else
LOCK := requirements.lock
endif

# Where it is set, every process would compile the project's modules anew.
unexport PYTHONDONTWRITEBYTECODE
# DVC runs the stages with the `python` it finds on PATH.
export PATH := $(CURDIR)/.venv/bin:$(PATH)
READY := .venv/.ready-$(LOCK)

.PHONY: repro ui test bench lint format setup lock clean

repro: setup  ## run what changed of the pipeline
	dvc repro

ui: setup  ## compare the runs in MLflow's pages
	catdog ui

test: setup  ## run the tests
	python -m pytest -n 3 --dist loadfile --no-loadscope-reorder

bench: setup  ## measure time, memory and disk; PHOTOGRAPHS, COUNTS, SCALE, ROUNDS, ONLY ...: benchmarks/README.md
	PYTHONPATH=src python -m benchmarks $(if $(PHOTOGRAPHS),--photographs $(PHOTOGRAPHS)) $(if $(COUNTS),--counts $(COUNTS)) \
	  $(if $(SCALE),--scale $(SCALE)) $(if $(ROUNDS),--rounds $(ROUNDS)) $(if $(ONLY),--only $(ONLY)) \
	  $(if $(NAME),--name $(NAME)) $(if $(RESUME),--resume) \
	  $(if $(EPOCHS),--epochs $(EPOCHS)) $(if $(PARAMS),--set-param $(PARAMS))

lint: setup
	ruff check src stages tests benchmarks
	ruff format --check src stages tests benchmarks
	mypy

format: setup
	ruff check --fix src stages tests benchmarks
	ruff format src stages tests benchmarks

setup: $(READY)  ## make .venv from the lock file

# uv itself comes first, with its hashes from the same lock file; it installs the rest five times as fast as pip.
# Compiled at once, 15,000 modules do not slow down the first run of every stage.
$(READY): $(LOCK) pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; set PYTHON=python3.11")'
	$(PYTHON) -m venv --clear .venv
	@sed -n '/^uv==/,/[^\\]$$/p' $(LOCK) > .venv/uv.lock
	.venv/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes -r .venv/uv.lock
	.venv/bin/uv pip install --quiet --compile-bytecode --python .venv/bin/python --require-hashes -r $(LOCK)
	.venv/bin/uv pip install --quiet --python .venv/bin/python --no-deps --no-build-isolation --editable .
	@touch $@

# What the tests use beside the pipeline: the web page, exports, a cluster, a tracking server's database, clients of single data sources.
EXTRAS := --extra app --extra drive --extra kaggle --extra onnx --extra openvino --extra postgres --extra ray --extra s3 --extra tfds

# Resolve anew within pyproject.toml's bounds. No index lines: a lock file must not name a registry's host.
lock: setup
	uv pip compile --quiet --universal --generate-hashes --no-emit-index-url --no-annotate --no-header --upgrade \
	  --python-version 3.11 --extra cpu $(EXTRAS) --group dev pyproject.toml -o requirements.lock
	uv pip compile --quiet --universal --generate-hashes --no-emit-index-url --no-annotate --no-header \
	  --python-version 3.11 --extra gpu $(EXTRAS) --group dev -c requirements.lock pyproject.toml -o requirements-gpu.lock

clean:  ## remove what the pipeline made in the workspace (its cache and MLflow's runs stay)
	rm -rf data models dvc_plots reports/*.csv reports/*.png reports/*.html reports/data reports/evaluation
