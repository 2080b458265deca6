# Two commands do all: `make demo` and `make test`.  Both set up .venv first.
PYTHON ?= python3
BIN := .venv/bin
WORKERS ?= $(shell nproc 2>/dev/null || echo 2)

.PHONY: setup demo test fast check bench docs results clean

setup: .venv/ready

.venv/ready: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q -e ".[dev,docs]"
	touch $@

demo: setup
	$(BIN)/deltavit demo

# one thread a worker: two pools of threads on two cores wait for each other
test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) tests

fast: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) -m "not slow" tests

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: setup
	$(BIN)/python benchmarks/speed.py

docs: setup
	$(BIN)/mkdocs build --strict

clean:
	rm -rf site demo-out .pytest_cache .mypy_cache .ruff_cache .hypothesis
