# Each target makes what it needs: a virtual environment in .venv, unless one with torch in it is active.
SHELL := /bin/bash
.DELETE_ON_ERROR:

PYTHON ?= python3
TORCH ?= torch==2.13.0
# Pinned: a new linter must not fail a commit that changed nothing.
LINTERS := ruff==0.17.6 clang-format==23.1.5 mypy==2.4.1
FAKEGPU ?= ../shared/fakegpu

ACTIVE := $(shell [ -n "$$VIRTUAL_ENV" ] && "$$VIRTUAL_ENV/bin/python" -c \
	'import importlib.util as u, sys; sys.exit(u.find_spec("torch") is None)' 2>/dev/null && echo "$$VIRTUAL_ENV")
VENV := $(or $(ACTIVE),.venv)
PY := $(VENV)/bin/python
INSTALLED := build/installed$(subst /,-,$(VENV))
CUDA_PY := .venv-cuda/bin/python
SOURCES := setup.py pyproject.toml $(wildcard csrc/*)
# The tests that the layers, the torch versions and the devices share.
CORE := tests/test_mask.py tests/test_layouts.py tests/test_gradients.py tests/test_operators.py

.PHONY: help bench test test-cuda test-abi test-fakegpu lint format readme-numbers clean

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 16

bench: $(INSTALLED) ## measure this machine against nn.Dropout: a table and fused_dropout_bench.json, two minutes
	$(PY) -m fused_dropout bench

test: $(INSTALLED) ## the whole suite; then the core without the eager binding, and without any compiled part
	$(PY) -m pytest -q
	$(PY) -m pytest -q --hide=_eager $(CORE) tests/test_dropin.py tests/test_compile.py
	$(PY) -m pytest -q --hide=_C $(CORE) tests/test_dropin.py tests/test_compile.py

test-cuda: build/installed-cuda ## build the CUDA part under the newest torch, as users do, and run the CPU's tests there
	cd tests && ../$(CUDA_PY) -m fused_dropout info
	cd tests && ../$(CUDA_PY) -m pytest -q -m "not gpu" $(CORE:tests/%=%) test_dropin.py

test-abi: $(INSTALLED) build/installed-cuda ## run the kernels built under one torch under another: masks and gradients
	$(CUDA_PY) -W ignore -c 'import fused_dropout as fd, torch; i = fd.backend_info(); print(i); \
		assert i.built["torch"] != torch.__version__ and i.devices["cpu"] == "native" and not i.eager, i'
	$(CUDA_PY) -m pytest -q -m "not gpu" $(CORE)

test-fakegpu: build/installed-fakegpu ## run the tests marked gpu on an interpreter of the built PTX
	cd tests && PYTHONPATH=../build/fakegpu ../$(CUDA_PY) $(abspath $(FAKEGPU))/fake_gpu.py -m pytest -q -m gpu -p no:cacheprovider .
	@# torch's own operations are a dispatch mode there, under which the eager binding stands back: once without them.
	cd tests && PYTHONPATH=../build/fakegpu ../$(CUDA_PY) $(abspath $(FAKEGPU))/fake_gpu.py --strict -m pytest -q -m gpu \
		-p no:cacheprovider test_cuda.py -k "not graph"

readme-numbers: $(INSTALLED) ## rewrite the README's table from benchmarks/results
	$(PY) benchmarks/readme_numbers.py

lint: build/linters ## ruff, clang-format, mypy, and whether the README's numbers are those of benchmarks/results
	$(PY) benchmarks/readme_numbers.py --check
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(VENV)/bin/clang-format --dry-run -Werror csrc/* tests/*.cpp
	$(PY) -m mypy

format: build/linters ## rewrite the sources as lint wants them
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(VENV)/bin/clang-format -i csrc/* tests/*.cpp

clean: ## remove what was built, and the environments
	rm -rf build dist .venv .venv-cuda *.egg-info fused_dropout/*.so fused_dropout/_build.json

.venv/bin/python .venv-cuda/bin/python:
	$(PYTHON) -m venv $(@:%/bin/python=%)

$(INSTALLED): $(PY) $(SOURCES)
	@echo "installing into $(VENV): torch, the test and bench extras, and this package, compiled if there is a compiler"
	@$(PY) -c 'import torch' 2>/dev/null || $(PY) -m pip install -q $(TORCH)
	@$(PY) -m pip install -q "setuptools>=77" wheel ninja
	@$(PY) -m pip install -q --no-build-isolation -e ".[test,bench]"
	@cd build 2>/dev/null || mkdir build
	@$(PY) -m fused_dropout info
	@touch $@

build/linters: $(INSTALLED) Makefile
	$(PY) -m pip install -q $(LINTERS)
	@touch $@

# Compiled from a copy, so that nothing of another environment's build is taken for this one's.
COPY = rm -rf build/source && mkdir -p build/source && cp -r setup.py pyproject.toml README.md LICENSE csrc fused_dropout build/source \
	&& rm -f build/source/fused_dropout/*.so build/source/fused_dropout/_build.json

build/torch-cuda: $(CUDA_PY)
	$(CUDA_PY) -m pip install -q torch "setuptools>=77" wheel ninja pytest hypothesis numpy
	command -v nvcc >/dev/null || $(CUDA_PY) -m pip install -q \
		"cuda-toolkit[nvcc,crt,nvvm,cudart,cccl]==$$($(CUDA_PY) -c 'import torch; print(torch.version.cuda)').*"
	@mkdir -p build && touch $@

build/installed-cuda: build/torch-cuda $(SOURCES) $(wildcard fused_dropout/*.py)
	$(COPY)
	cd build/source && FUSED_DROPOUT_BUILD=cuda ../../$(CUDA_PY) -m pip install -q --no-build-isolation --no-deps --force-reinstall .
	@touch $@

build/installed-fakegpu: build/torch-cuda $(SOURCES) $(wildcard fused_dropout/*.py)
	$(COPY)
	rm -rf build/fakegpu
	cd build/source && FUSED_DROPOUT_BUILD=cuda FUSED_DROPOUT_CUDART=shared TORCH_CUDA_ARCH_LIST="9.0+PTX" \
		../../$(CUDA_PY) -m pip install -q --no-build-isolation --no-deps --target ../fakegpu .
	@touch $@
