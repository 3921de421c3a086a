# `make demo` and `make test` do all set-up on a fresh machine; nothing needs to be activated.

PYTHON ?= python3
JOBS   ?= auto# xdist workers, at most 8
ARGS   ?=#      more arguments for pytest, e.g. ARGS="-k h2o"
SHARD  ?= 1/1#  part i of n of test-all, e.g. SHARD=2/4

BIN    := .venv/bin
OLDEST := .venv-oldest/bin
READY  := .venv/.ready
PYTEST := -m pytest -n $(JOBS) --maxprocesses 8 --dist worksteal

# One thread per worker: the tests are small, and threads of several workers fight for the cores.
test test-all test-oldest test-kernels: export OMP_NUM_THREADS = 1
export TOKENIZERS_PARALLELISM = false
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: help demo test test-all test-oldest test-kernels peers quanto docs lint types format clean

help:
	@echo 'make demo         compares a few recipes on the bundled model (1 to 3 minutes); ends with a figure'
	@echo 'make test         the tests (a few minutes on 2 cores)'
	@echo 'make test-all     the full product of families, modes, policies and formats (about two'
	@echo '                  hours on 2 cores); SHARD=i/n runs part i of n, on as many machines'
	@echo 'make test-oldest  a part of the tests on the oldest supported transformers'
	@echo 'make test-kernels the CPU kernels with sanitizers, those for AVX-512 emulated'
	@echo 'make peers        kvloom beside kvpress: kept entries, bytes, time per token'
	@echo 'make quanto       kvloom beside transformers'"'"' QuantizedCache (optimum-quanto)'
	@echo 'make docs         docs/methods.md from the docstrings, tables and figures from their rows'
	@echo 'make lint types   ruff, mypy; `make format` applies what ruff can'
	@echo 'make clean        remove the environments and caches'

demo: $(READY)
	@HF_HUB_OFFLINE=1 $(BIN)/kvloom demo

test: $(READY)
	@HF_HUB_OFFLINE=1 $(BIN)/python $(PYTEST) -m "not full" $(ARGS)

test-all: $(READY)
	@HF_HUB_OFFLINE=1 $(BIN)/python $(PYTEST) -m "full or not full" --shard $(SHARD) $(ARGS)

# Two builds beside the installed one: with sanitizers (which must be loaded before Python, whose own leaks
# are not ours), and with the AVX-512 kernels emulated, for CPUs that have none.
TOOLS := build/tools/bin
test-kernels: $(READY)
	$(PYTHON) -m venv build/tools && $(TOOLS)/pip install -q cmake ninja nanobind
	$(call kernels,sanitized,-DKVLOOM_SANITIZE=ON)
	$(call kernels,emulated,-DKVLOOM_EMULATED=ON)
	@ASAN_OPTIONS=detect_leaks=0 \
	  LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" \
	  KVLOOM_TEST_MODULE=$$(ls $(CURDIR)/build/sanitized/_cpu*.so) $(BIN)/python $(KERNEL_TESTS)
	@KVLOOM_TEST_MODULE=$$(ls $(CURDIR)/build/emulated/_cpu*.so) $(BIN)/python $(KERNEL_TESTS)

KERNEL_TESTS = -m pytest tests/kernels/test_cpu.py tests/kernels/test_encode.py tests/kernels/test_fuzz.py -k "not without_the_module" $(ARGS)
kernels = PATH="$(CURDIR)/$(TOOLS):$$PATH" && export PATH && \
	  cmake -G Ninja -S . -B build/$(1) $(2) -DPython_EXECUTABLE=$(CURDIR)/$(TOOLS)/python && \
	  cmake --build build/$(1)

peers: $(READY) .venv-peers/.ready
	@HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/peers/run.py --python .venv-peers/bin/python $(ARGS)

quanto: .venv-quanto/.ready
	@HF_HUB_OFFLINE=1 PATH="$(CURDIR)/.venv-quanto/bin:$$PATH" \
	  .venv-quanto/bin/python benchmarks/quantized_cache.py $(ARGS)

test-oldest: .venv-oldest/.ready
	@HF_HUB_OFFLINE=1 $(OLDEST)/python $(PYTEST) -m "oldest and not full" $(ARGS)

docs: $(READY)
	$(BIN)/python docs/make_methods.py
	$(BIN)/python docs/make_demo.py
	$(BIN)/python docs/make_formats.py
	$(BIN)/python docs/make_merging.py
	$(BIN)/python docs/make_kernels.py
	$(BIN)/python docs/make_analyze.py
	$(BIN)/python docs/make_report.py
	$(BIN)/python docs/make_results.py

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(READY)
	$(BIN)/mypy
	$(BIN)/mypy --explicit-package-bases training tests/testbed

KERNELS := CMakeLists.txt $(wildcard src/kvloom/kernels/cpu/*)
$(READY): pyproject.toml constraints.txt $(KERNELS)
	@echo 'Setting up .venv (once; torch takes a minute or two)'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	@touch $@

# The same versions, except for transformers.
.venv-oldest/.ready: pyproject.toml constraints.txt
	@echo 'Setting up .venv-oldest (once)'
	$(PYTHON) -m venv .venv-oldest
	sed 's/^transformers==.*/transformers==5.17.*/' constraints.txt > .venv-oldest/constraints.txt
	$(OLDEST)/python -m pip install -q -c .venv-oldest/constraints.txt torch==2.13.0
	$(OLDEST)/python -m pip install -q -c .venv-oldest/constraints.txt -e '.[dev]'
	@touch $@

# kvpress needs transformers below 5.3.
.venv-peers/.ready:
	@echo 'Setting up .venv-peers (once)'
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/python -m pip install -q torch==2.13.0 kvpress==0.5.5
	@touch $@

# quanto compiles its C++ part at its first call, with ninja.
.venv-quanto/.ready: pyproject.toml constraints.txt
	@echo 'Setting up .venv-quanto (once)'
	$(PYTHON) -m venv .venv-quanto
	.venv-quanto/bin/python -m pip install -q -c constraints.txt torch==2.13.0
	.venv-quanto/bin/python -m pip install -q -c constraints.txt -e . optimum-quanto==0.2.7 ninja
	@touch $@

clean:
	rm -rf .venv .venv-oldest .venv-peers .venv-quanto .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist
	find src tests training benchmarks -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
