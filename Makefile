# Each target makes its prerequisites. It uses the active virtual environment if that has torch, else makes one in .venv.
SHELL := /bin/bash
.DELETE_ON_ERROR:

PYTHON := $(or $(PYTHON),python3)
TORCH := $(or $(TORCH),torch==2.13.0)
FAKEGPU := $(or $(FAKEGPU),../shared/fakegpu)

ACTIVE := $(shell [ -n "$$VIRTUAL_ENV" ] && "$$VIRTUAL_ENV/bin/python" -c \
	'import importlib.util as u, sys; sys.exit(u.find_spec("torch") is None)' 2>/dev/null && echo "$$VIRTUAL_ENV")
VENV := $(or $(ACTIVE),.venv)
PY := "$(VENV)/bin/python"
# A path may have spaces, which end a name in make. They are escaped here, and replaced in the names of stamp files.
SPACE := $(subst ,, )
VENV_PYTHON := $(subst $(SPACE),\ ,$(VENV))/bin/python
OF_VENV := $(subst $(SPACE),_,$(subst /,-,$(VENV)))
INSTALLED := build/installed$(OF_VENV)
CUDA_PY := .venv-cuda/bin/python
OLDEST_PY := .venv-oldest/bin/python
FLOOR_PY := .venv-floor/bin/python
SOURCES := setup.py pyproject.toml $(wildcard build_backend/*.py csrc/* csrc/simd/*)
PACKAGE := $(wildcard fused_dropout/*.py fused_dropout/*/*.py fused_dropout/*/*/*.py)
# The tests that run for every layer, torch version and device.
CORE := tests/test_golden.py tests/test_internals.py tests/test_mask.py tests/test_layouts.py tests/test_gradients.py tests/test_operators.py
DROP_IN := tests/test_dropin.py tests/test_docstrings.py tests/test_arguments.py tests/test_family.py tests/test_noise_shape.py tests/test_keys.py tests/test_composition.py tests/test_linear.py tests/test_neighbours.py tests/test_neighbours_gradients.py tests/test_shards.py

# The files that the second run of make test does not run again.
APART := tests/transforms tests/test_bench.py tests/test_examples.py tests/test_dtensors.py
# The test program of the CPU kernels, if there is a compiler.
CPU_KERNELS := $(shell command -v $(firstword $(CXX)) >/dev/null && echo build/cpu-kernels-test)

# Ends with an error if there is a GPU that the kernels cannot run on: the reference would be measured instead.
SERVED_BY_KERNELS = $(PY) -c 'import fused_dropout as fd, sys; info = fd.backend_info(); \
	info.devices.get("cuda", "native") == "native" or sys.exit(f"{info}\nno CUDA kernels serve this GPU")'

# The packages that the CUDA build needs in this environment: nvcc, if no installed toolkit fits its torch.
INSTALL_TOOLKIT = FUSED_DROPOUT_BUILD=cuda PYTHONPATH=build_backend $(1) -c 'import toolchain; print(*toolchain.missing())' \
	| xargs -r $(1) -m pip install -q

.PHONY: help examples bench bench-cpu test test-transforms test-sharded test-models test-cuda test-oldest test-abi test-install test-fakegpu test-fakegpu-90 test-fakegpu-80 test-qemu wheel import-time inductor sass gpu-check statistics randomness sanitize docs lint format readme-numbers clean

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 16

bench: $(INSTALLED) ## measure this machine against nn.Dropout: a table and fused_dropout_bench.json, two minutes
	@$(SERVED_BY_KERNELS)
	$(PY) -m fused_dropout bench --json fused_dropout_bench.json

bench-cpu: $(INSTALLED) ## measure the CPU kernels and compiled code against their targets: tables and fused_dropout_bench_cpu.json, fifteen minutes
	$(PY) tools/cpu_targets.py
	$(PY) tools/compile_targets.py

examples: $(INSTALLED) ## eight claims about dropout, each shown by a number and a picture: examples/gallery.md, twenty minutes
	$(PY) examples/gallery.py --out examples

# Threads that spin while they wait would slow down the run beside them.
test: export OMP_WAIT_POLICY := passive
test: export CPU_KERNELS_TEST = $(CPU_KERNELS:%=$(CURDIR)/%)
test: $(INSTALLED) $(CPU_KERNELS) ## the whole suite; in parallel, the core tests without the eager binding and without any compiled part
	@# In parallel, to use the second core.
	@{ \
		$(PY) -m pytest -q -p no:cacheprovider $(APART) && \
		$(PY) -m pytest -q -p no:cacheprovider --hide=_eager $(CORE) $(DROP_IN) && \
		$(PY) -m pytest -q -p no:cacheprovider --hide=_C $(CORE) $(DROP_IN) tests/test_compile.py tests/test_attention.py; \
	} >build/test-layers.log 2>&1 & \
	$(PY) -m pytest -q $(APART:%=--ignore=%); whole=$$?; wait $$!; layers=$$?; \
	cat build/test-layers.log; exit $$((whole | layers))

test-transforms: $(INSTALLED) ## every cell of the matrix of torch.func, vmap and torch.compile, with and without the compiled part: 2,352 cells each
	@$(PY) -m pytest -q -p no:cacheprovider --every-cell --hide=_C tests/transforms >build/test-transforms.log 2>&1 & \
	$(PY) -m pytest -q --every-cell tests/transforms; whole=$$?; wait $$!; python=$$?; \
	tail -n 50 build/test-transforms.log; exit $$((whole | python))

test-sharded: $(INSTALLED) ## compare masks, gradients and training of two and four processes with one: every dtype and layout, twenty steps
	$(PY) -m pytest -q --every-cell tests/test_dtensors.py

test-models: build/models$(OF_VENV) ## train models of Hugging Face, PEFT, timm, PyG, Lightning and Opacus, patched and converted, and run the scripts of the documentation; some minutes
	$(PY) -m pytest -q tests/models
	$(PY) -m pytest -q tests/test_documentation.py -k "script or lora"

test-cuda: build/installed-cuda ## build the CUDA part under the newest torch, as users do, and run the CPU's tests there
	cd tests && ../$(CUDA_PY) -m fused_dropout info
	cd tests && ../$(CUDA_PY) -m pytest -q -m "not gpu" $(CORE:tests/%=%) test_dropin.py

test-oldest: build/installed-oldest ## build and test under the oldest torch that the kernels serve
	cd tests && ../$(OLDEST_PY) -W ignore -m pytest -q -m "not gpu" $(CORE:tests/%=%) $(DROP_IN:tests/%=%) test_compile.py test_convert.py test_fusing.py test_pairing.py test_patch.py test_attention.py test_attention_compiled.py test_dtensors.py

test-abi: $(INSTALLED) build/installed-cuda ## build the kernels under one torch and run them under another: masks and gradients
	$(CUDA_PY) -W ignore -c 'import fused_dropout as fd, torch; i = fd.backend_info(); print(i); \
		assert i.built["torch"] != torch.__version__ and i.devices["cpu"] == "native" and not i.eager, i'
	$(CUDA_PY) -m pytest -q -m "not gpu" $(CORE) tests/test_attention.py

test-install: $(INSTALLED) build/torch-cuda build/torch-oldest build/torch-floor ## install in each situation of docs/getting-started.md, as users do; fifteen minutes
	$(PY) -m pytest -q -s --durations=0 tests/installs/situations.py $(if $(ONLY),-k "$(ONLY)")

wheel: build/torch-cuda build/dev$(OF_VENV) ## dist/: the wheel for every Python from 3.10 and torch from 2.11 on, and the sdist, both checked; two minutes
	rm -rf dist build/wheel
	FUSED_DROPOUT_BUILD=cuda $(CUDA_PY) -m pip wheel -q --no-build-isolation --no-deps -w build/wheel \
		--config-settings=--build-option=--py-limited-api=cp310 .
	PATH="$(VENV)/bin:$$PATH" $(PY) -m auditwheel repair --exclude 'libtorch*.so' --exclude 'libc10*.so' -w dist build/wheel/*.whl
	PYTHONPATH=build_backend $(PY) -c 'import toolchain; toolchain.build_sdist("dist")'
	$(PY) -m abi3audit --strict dist/*.whl
	$(PY) -m twine check --strict dist/*

import-time: $(INSTALLED) ## check that "import fused_dropout" adds less than 30 ms to "import torch"
	@$(PY) tools/import_time.py

FAKE = cd tests && PYTHONPATH=../build/fakegpu ../$(CUDA_PY) "$(abspath $(FAKEGPU))/fake_gpu.py"
FAKE_PYTEST = -m pytest -q -m gpu -p no:cacheprovider
test-fakegpu: test-fakegpu-90 test-fakegpu-80 ## run the tests marked gpu on an interpreter of the built PTX, for two architectures; with -j2 side by side

test-fakegpu-90: build/installed-fakegpu
	$(FAKE) $(FAKE_PYTEST) .
	@# The fake GPU runs torch's operations in a dispatch mode, which disables the eager binding: run once without it.
	$(FAKE) --strict $(FAKE_PYTEST) test_cuda.py -k "not graph"

test-fakegpu-80: build/installed-fakegpu
	export FAKE_CUDA_ARCH=80; $(FAKE) $(FAKE_PYTEST) test_launches.py test_window_launches.py test_cuda.py test_mask.py test_noise_shape.py

test-qemu: $(INSTALLED) build/cpu-kernels-test ## run the CPU kernels on emulated CPUs: without AVX2, without AVX-512, and aarch64; two minutes
	@for tool in qemu-x86_64 qemu-aarch64 aarch64-linux-gnu-g++; do command -v $$tool >/dev/null || \
		{ echo "there is no $$tool: apt-get install qemu-user g++-aarch64-linux-gnu"; exit 1; }; done
	for machine in Nehalem:portable Haswell:avx2; do \
		cpu=$${machine%:*} isa=$${machine#*:}; echo "$$cpu has to choose $$isa"; \
		test "$$(qemu-x86_64 -cpu $$cpu build/cpu-kernels-test --dispatch)" = $$isa && \
		qemu-x86_64 -cpu $$cpu build/cpu-kernels-test && \
		qemu-x86_64 -cpu $$cpu build/cpu-kernels-test --golden tests/mask_v1.txt && \
		qemu-x86_64 -cpu $$cpu $(PY) -W ignore tools/check_isa.py $$isa || exit 1; \
	done 2> >(grep -v "TCG doesn't support" >&2)
	@# Kernels with instructions that the CPU lacks must be stopped: this shows that the runs above would detect them.
	for machine in Nehalem:avx2 Haswell:avx512; do \
		qemu-x86_64 -cpu $${machine%:*} build/cpu-kernels-test --force $${machine#*:} 2>/dev/null \
			| grep -q "an instruction that this CPU lacks" && echo "ok $${machine%:*} stops $${machine#*:}" || exit 1; \
	done
	$(MAKE) -s build/cpu-kernels-aarch64 CXX=aarch64-linux-gnu-g++ && qemu-aarch64 build/cpu-kernels-aarch64 && \
		qemu-aarch64 build/cpu-kernels-aarch64 --golden tests/mask_v1.txt

inductor: build/installed-cuda ## count the kernels and instructions that torch.compile generates for dropout on a GPU; needs no GPU
	$(CUDA_PY) -W ignore tools/inductor.py | tee benchmarks/results/inductor.md

sass: build/installed-cuda ## the CUDA kernels' machine code: instructions an element, registers, limits, and a performance model
	$(CUDA_PY) tools/sass.py

gpu-check: $(INSTALLED) ## with a GPU: run the tests marked gpu, check and measure; the report goes to benchmarks/results, eight minutes
	@$(SERVED_BY_KERNELS)
	@$(PY) -m pytest -q -m gpu && $(PY) -m pytest -q -m gpu --hide=_cuda $(CORE) tests/test_compiled.py; tests=$$?; $(PY) -m fused_dropout gpu-check --json benchmarks/results && exit $$tests

statistics: $(INSTALLED) ## long statistical tests of the masks, with new keys: a table; ten minutes
	$(PY) tests/statistics/long.py

randomness: $(INSTALLED) ## test the generator's words with dieharder, PractRand and TestU01, if installed; twenty minutes
	$(PY) tests/statistics/randomness.py

sanitize: build/cpu-kernels-asan build/cpu-kernels-tsan ## run the CPU kernels under the address, undefined behaviour and thread sanitizers, four minutes
	build/cpu-kernels-asan
	build/cpu-kernels-asan --golden tests/mask_v1.txt
	build/cpu-kernels-tsan --threads

docs: build/docs$(OF_VENV).txt ## the documentation site: build/docs/html, after its examples have run; warnings are errors
	$(PY) -m sphinx -q -W --keep-going -b doctest docs build/docs/doctest
	$(PY) -m sphinx -q -W --keep-going -b html docs build/docs/html
	@echo "build/docs/html/index.html"

readme-numbers: $(INSTALLED) ## rewrite the tables of the README and of docs/benchmarks.md, and its plots, from benchmarks/results
	$(PY) tools/readme_numbers.py
	$(PY) tools/docs_plots.py

lint: build/dev$(OF_VENV) ## ruff, clang-format, mypy, actionlint, and a check that the README's numbers are those of benchmarks/results
	$(PY) tools/readme_numbers.py --check
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	"$(VENV)/bin/clang-format" --dry-run -Werror csrc/*.[ch]* csrc/simd/* tests/*.h tests/*.cpp
	$(PY) -m mypy
	@# Without shellcheck, which only some machines have.
	"$(VENV)/bin/actionlint" -shellcheck= .github/workflows/*.yml

format: build/dev$(OF_VENV) ## format the sources
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	"$(VENV)/bin/clang-format" -i csrc/*.[ch]* csrc/simd/* tests/*.h tests/*.cpp

clean: ## remove the build output and the environments
	rm -rf build dist .venv .venv-cuda .venv-oldest .venv-floor *.egg-info fused_dropout/*.so fused_dropout/_build.json

.venv/bin/python .venv-cuda/bin/python .venv-oldest/bin/python .venv-floor/bin/python:
	$(PYTHON) -m venv $(@:%/bin/python=%)

$(INSTALLED): $(VENV_PYTHON) $(SOURCES)
	@echo "installing into $(VENV): torch, the test and bench extras, and this package, compiled if there is a compiler"
	@$(PY) -c 'import torch' 2>/dev/null || $(PY) -m pip install -q $(TORCH)
	@$(PY) -m pip install -q "setuptools>=77"
	@# With a GPU the CUDA part has to build. If no toolkit fits this torch, nvcc comes from PyPI.
	@if $(PY) -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then \
		$(call INSTALL_TOOLKIT,$(PY)); export FUSED_DROPOUT_BUILD=cuda; \
	fi; $(PY) -m pip install -q --no-build-isolation -e ".[test,bench]"
	@cd build 2>/dev/null || mkdir build
	@$(PY) -m fused_dropout info
	@touch $@

# For the installed torch. A torchvision that was built for another torch fails at the import, and so does timm. Without
# torchvision, timm's tests are skipped.
build/models$(OF_VENV): $(INSTALLED) pyproject.toml
	@$(PY) -m pip install -q --no-build-isolation -e ".[models]" "torch==$$($(PY) -c 'import torch; print(torch.__version__)')"
	@$(PY) -c 'import torchvision' 2>/dev/null || $(PY) -m pip uninstall -q -y torchvision
	@touch $@

# The CPU kernels without torch, in a program that compares them with a scalar loop.
KERNELS_TEST := tests/cpu_kernels_test.cpp csrc/simd/portable.cpp csrc/simd/avx2.cpp csrc/simd/avx512.cpp
# GCC warns about undefined values in its own AVX-512 header. clang warns about GCC's names of warnings.
build/cpu-kernels-test: SANITIZE = -O3 -Wall -Wextra -Werror -Wno-unknown-warning-option
build/cpu-kernels-aarch64: SANITIZE = -O3 -static
# With inlined kernels a sanitizer build would take five minutes.
build/cpu-kernels-asan: SANITIZE = -O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all -DFUSED_DROPOUT_KERNEL=
build/cpu-kernels-tsan: SANITIZE = -O1 -g -fsanitize=thread -DFUSED_DROPOUT_KERNEL=

build/cpu-kernels-test build/cpu-kernels-aarch64 build/cpu-kernels-asan build/cpu-kernels-tsan: $(INSTALLED) $(KERNELS_TEST) tests/golden.h $(wildcard csrc/*.h csrc/simd/*.h)
	@# Compiles the sources in parallel. If one fails, its object is missing and the link fails.
	rm -rf $@.objects && mkdir $@.objects
	mapfile -t headers < <($(PY) -c 'import torch.utils.cpp_extension as c; print(*("-isystem" + path for path in c.include_paths()), sep="\n")'); \
	for source in $(KERNELS_TEST); do \
		$(CXX) -std=c++17 $(SANITIZE) -ffp-contract=off -pthread -Wno-uninitialized -Icsrc "$${headers[@]}" -c $$source \
			-o $@.objects/$$(basename $$source .cpp).o & \
	done; wait
	$(CXX) $(SANITIZE) -pthread $(patsubst %.cpp,$@.objects/%.o,$(notdir $(KERNELS_TEST))) -o $@

build/dev$(OF_VENV): $(INSTALLED) pyproject.toml
	@$(PY) tools/extra.py dev >build/dev.txt && $(PY) -m pip install -q -r build/dev.txt
	@touch $@

build/docs$(OF_VENV).txt: $(INSTALLED) pyproject.toml
	@$(PY) tools/extra.py docs >$@ && $(PY) -m pip install -q -r $@ || { rm $@; exit 1; }

build/torch-cuda: $(CUDA_PY)
	$(CUDA_PY) -m pip install -q torch "setuptools>=77" pytest hypothesis numpy
	$(call INSTALL_TOOLKIT,$(CUDA_PY))
	@mkdir -p build && touch $@

build/installed-cuda: build/torch-cuda $(SOURCES) $(PACKAGE)
	FUSED_DROPOUT_BUILD=cuda $(CUDA_PY) -m pip install -q --no-build-isolation --no-deps --force-reinstall .
	@touch $@

build/torch-oldest: $(OLDEST_PY)
	$(OLDEST_PY) -m pip install -q torch==2.11.0 "setuptools>=77" pytest hypothesis numpy
	@mkdir -p build && touch $@

build/torch-floor: $(FLOOR_PY)
	$(FLOOR_PY) -m pip install -q torch==2.8.0 "setuptools>=77" pytest hypothesis numpy
	@mkdir -p build && touch $@

build/installed-oldest: build/torch-oldest $(SOURCES) $(PACKAGE)
	FUSED_DROPOUT_BUILD=cpu $(OLDEST_PY) -m pip install -q --no-build-isolation --no-deps --force-reinstall .
	@touch $@

build/installed-fakegpu: build/torch-cuda $(SOURCES) $(PACKAGE)
	rm -rf build/fakegpu
	FUSED_DROPOUT_BUILD=cuda FUSED_DROPOUT_CUDART=shared TORCH_CUDA_ARCH_LIST="8.0+PTX;9.0+PTX" \
		$(CUDA_PY) -m pip install -q --no-build-isolation --no-deps --target build/fakegpu .
	@touch $@
