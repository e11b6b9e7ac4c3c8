PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
RUN ?= runs/quickstart

.PHONY: setup quickstart test test-slow lint clean

setup: .venv/ready

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

quickstart: setup  ## train the embedded default on 4 ranks, then sample from it
	test -f data/digits/index.json || $(BIN)/msdiff data prepare digits --out data/digits
	$(BIN)/msdiff train recipes/quickstart.yaml --nproc 4 --run-dir $(RUN)
	rm -rf $(RUN)/final && $(BIN)/msdiff sample $(RUN) --num 100 --sampler ddim --eta 1 --clip --steps 100 --out $(RUN)/final

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: lint  ## lint, types, import contract and every test but the long campaigns (make test-slow)
	OMP_NUM_THREADS=1 $(BIN)/pytest -m "not slow" $(PYTEST_ARGS)

test-slow: setup  ## the long campaigns: random kills, hours of pre-emption in minutes
	OMP_NUM_THREADS=1 $(BIN)/pytest -m slow $(PYTEST_ARGS)

clean:
	rm -rf .venv build *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
