# Every target does its own set-up: it creates ./.venv, or reuses it, and installs the pinned versions.
# Needed beforehand: Python 3.11 or 3.12, make and a C++ compiler. Another Python: make PYTHON=python3.12 test

# The first of these that really runs is taken; a version manager may list names that do not.
PYTHONS := $(or $(PYTHON),python3.12 python3.11 python3)
BIN := .venv/bin
READY := .venv/.ditopt-ready
FAST := not (slow or gpu or zoo)

.PHONY: help setup demo test test-zoo test-slow test-gpu lint format docs bench clean

help:
	@echo "make demo      profile, plan and bench the embedded model; ends with a table, a picture and a report"
	@echo "make test      lint, types and every test that two CPU cores run in minutes"
	@echo "make test-zoo  every published architecture, compiled; about an hour"
	@echo "make test-slow / test-gpu   the tests that test leaves out"
	@echo "make lint      ruff, ruff format and mypy only"
	@echo "make format    let ruff rewrite the files"
	@echo "make docs      write the generated pages of docs/ and the README's table anew"
	@echo "make bench     record this machine's numbers of the embedded model in benchmarks/results/"

setup: $(READY)

$(BIN)/python:
	@for python in $(PYTHONS); do \
	  if $$python -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; \
	  then exec $$python -m venv .venv; fi; \
	done; \
	echo "No Python 3.11 or 3.12 with the venv module among: $(PYTHONS)"; \
	echo "Install one, or name it: make PYTHON=/path/to/python3.12 ..."; exit 1

$(READY): pyproject.toml constraints.txt | $(BIN)/python
	@command -v c++ g++ clang++ >/dev/null || { echo "a C++ compiler is needed: install g++"; exit 1; }
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[test]'
	@touch $@

demo: $(READY)
	$(BIN)/ditopt demo

test: lint
	$(BIN)/python -m pytest -q -rs -n auto --dist worksteal -m "$(FAST)"

test-zoo: $(READY)
	$(BIN)/python -m pytest -q -m "zoo"

test-slow: $(READY)
	$(BIN)/python -m pytest -q -m "slow and not (gpu or browser)"

test-gpu: $(READY)
	$(BIN)/python -m pytest -q -m "gpu"

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(READY)
	$(BIN)/python -m ditopt.config > docs/env_vars.md
	$(BIN)/python -m ditopt.recipes > docs/recipes.md
	$(BIN)/python benchmarks/readme_table.py

bench: $(READY)
	$(BIN)/ditopt demo --json benchmarks/results/demo_$$($(BIN)/python -c \
	  'import torch; print("cuda" if torch.cuda.is_available() else "cpu")').json

clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
