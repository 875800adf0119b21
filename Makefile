# Needs only python3 and make. `make demo` and `make test` prepare .venv themselves; every target can be repeated.
#
# torch comes first and by itself, so that nothing else pulls another build of it:
#   CPU only, smallest download:   make setup TORCH_INDEX=https://download.pytorch.org/whl/cpu
#   CUDA of your choice:           make setup TORCH_INDEX=https://download.pytorch.org/whl/cu130
#   what your package index has:   make setup
# An environment you already have:  make test VENV=/path/to/venv  (it is brought up to constraints.txt)

PYTHON ?= python3
VENV ?= .venv
TORCH_INDEX ?=
BIN := $(VENV)/bin
STAMP := $(VENV)/.duet-kernels
PIP := $(BIN)/python -m pip --disable-pip-version-check
# Two test processes of one thread each are faster than one of two, and never fight for the cores.
TEST_WORKERS ?= 2

.PHONY: setup demo test check format wheel bench compile readme clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet -c constraints.txt $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	$(PIP) install --quiet -c constraints.txt setuptools
	$(PIP) install --quiet -c constraints.txt --no-build-isolation -e '.[triton,dev]'
	touch $@

demo: setup
	$(BIN)/duet demo

test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(TEST_WORKERS) --dist worksteal

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

wheel: setup
	rm -rf build dist
	$(BIN)/python -m build --wheel --no-isolation --outdir dist .
	$(BIN)/python .ci/smoke_wheel.py dist

bench: setup
	$(BIN)/python -m benchmarks.cpu_goals

compile: setup
	$(BIN)/python -m benchmarks.compile_gate --out benchmarks/results/compile.md

# The README's numbers, measured anew on this machine.
readme: demo bench
	$(BIN)/python -m benchmarks.readme --demo demo_report

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
