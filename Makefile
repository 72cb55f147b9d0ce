# Everything that is done with this project, by name. `make` alone lists it.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
JOBS   ?= 2
# One thread a process: small tensors are slower on several, and tests run side by side.
QUIET  := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
PYTEST := $(QUIET) $(BIN)/python -m pytest -q -n $(JOBS)

.PHONY: help setup quickstart test faults slow lint check size bench bench-gpu docs build oldest clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: $(STAMP)  ## make .venv and install itune there with the tested versions (again only when they change)

$(STAMP): pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

quickstart: setup  ## make data, pretrain, tune, score and ask, from nothing, without a network: some minutes
	$(BIN)/python recipes/quickstart/make_data.py --output .quickstart --rows 3000
	$(BIN)/itune pretrain --recipe recipes/quickstart/pretrain.yaml
	$(BIN)/itune tune --recipe recipes/quickstart/tune.yaml
	$(BIN)/itune eval --run runs/quickstart-tune
	$(BIN)/itune generate --run runs/quickstart-tune \
	  "Is this review positive or negative? The bed was anything but dreadful, but the view was poor." \
	  "Translate to French: The old farmer sees two black horses." \
	  "Clara is a baker. She lives near the park. She has a red clock. On Monday she goes to the museum by bus. What does Clara have?" \
	  "Write a couplet about the happy dog and the moon."

test: setup  ## the tests that a change must pass: under five minutes on two cores
	$(PYTEST) -m "not slow and not gpu"

faults: setup  ## kills, faults of the disk, signals: what no run may be spoilt by
	$(PYTEST) tests/faults

slow: setup  ## all tests but those that need a GPU (for these: pytest -m gpu)
	$(PYTEST) -m "not gpu"

lint: setup  ## format, style and types, nothing run
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

check: lint test  ## lint, then test: what .ci/run begins with

size: setup  ## lengths of files and functions, and what nobody calls
	@$(BIN)/python .ci/size.py src/itune
	@$(BIN)/vulture src/itune --min-confidence 80 || true

bench: setup  ## itune against its peers on one workload, some minutes; BENCH="--venv trl=DIR" adds TRL
	$(BIN)/python benchmarks/bench.py $(BENCH)

# From source, and without a network: a GPU machine may have its own torch and no .venv.
bench-gpu:  ## itune against TRL and Trainer on a GPU, ten minutes; BENCH="--size small" tries it on a CPU
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) benchmarks/gpu.py $(BENCH)

# Without --quiet, which hides from --strict what it shall fail for.
docs: setup  ## the site, in site/; a link that leads nowhere is an error
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

build: setup  ## the wheel, in dist/
	$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir dist .

oldest:  ## the smoke test with the oldest versions that pyproject.toml allows, in an environment of its own: some minutes
	.ci/oldest

clean:  ## remove builds and caches; the environment, data and runs stay
	rm -rf build dist site .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find src tests recipes benchmarks -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
