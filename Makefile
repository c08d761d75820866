# Everything here sets up what it needs: python3 with venv and make are enough.

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
EXAMPLE_FLAGS ?=
BENCHMARK_FLAGS ?=
# Two processes at a time: tests mostly wait for Python. `make test PYTEST_FLAGS=` runs one.
# A file is run by one of them, so that what its tests share, a cluster say, is made once. In the order of their
# names: the files of the fewest tests, which would come last otherwise, are the slow ones.
PYTEST_FLAGS ?= --numprocesses=2 --dist=loadfile --no-loadscope-reorder
NOX_FLAGS ?=

.PHONY: test example multi_worker benchmark lint types format docs coverage wheel wheel_test compatibility clean

test: $(VENV)/.installed
	$(BIN)/python -m pytest $(PYTEST_FLAGS)

example: $(VENV)/.installed
	$(BIN)/python examples/digits.py $(EXAMPLE_FLAGS)

multi_worker: $(VENV)/.installed
	$(BIN)/python examples/multi_worker.py $(EXAMPLE_FLAGS)

# Ours beside its peers: tables and a plot in build/benchmark. BENCHMARK_FLAGS=--quick: does it all run?
benchmark: $(VENV)/.installed
	$(BIN)/python -m benchmarks.run $(BENCHMARK_FLAGS)

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed
	$(BIN)/mypy

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The API reference, docs/api.
docs: $(VENV)/.installed
	$(BIN)/python -m tools.build_docs

# Of the package, branches included; fails below 95 %.
coverage: $(VENV)/.installed
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest $(PYTEST_FLAGS)
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report --fail-under=95

wheel: $(VENV)/.installed
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .

# Installs the wheel alone in a new environment, and runs the README's lines there.
wheel_test: $(VENV)/.installed
	$(BIN)/nox --session wheel $(NOX_FLAGS)

# The oldest and the newest TensorFlow, on several versions of Python, which must be installed.
compatibility: $(VENV)/.installed
	$(BIN)/nox --session tests $(NOX_FLAGS)

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable ".[test,examples,lint,coverage,nox]"
	touch $@

clean:
	rm -rf $(VENV) .nox build dist *.egg-info
