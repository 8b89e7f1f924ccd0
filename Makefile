# Everything runs from .venv, which every target makes from the pinned requirements.txt.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help setup demo bench test test-faults soak test-slow lint format lock clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

setup: $(STAMP)  ## make .venv from requirements.txt (again only when it changed)

$(STAMP): requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || \
		{ echo "Python 3.11 to 3.13 is needed; name one with: make setup PYTHON=python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "uv>=0.9,<1"
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python --requirement requirements.txt
	@touch $@

demo: setup  ## the main job: data -> training -> samples -> results/demo/index.html
	$(BIN)/python -m demo

bench: setup  ## time and memory as ratios to the reference: docs/benchmarks/
	$(BIN)/python -m benchmarks all

test: setup lint  ## lint, types and the test suite
	$(BIN)/python -m pytest -m "not slow" -n logical --maxprocesses 4 --dist loadgroup

test-faults: setup  ## the fault tests of docs/reliability.md, one line each
	$(BIN)/python -m pytest -v -m fault

soak: setup  ## 200 random kills of one run; KILLS and SEED to choose
	$(BIN)/python tests/soak.py --kills $(or $(KILLS),200) --seed $(or $(SEED),0)

test-slow: setup  ## the tests that take minutes each
	$(BIN)/python -m pytest -m slow

lint: setup  ## ruff (lint and format) and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup  ## reformat the code with ruff
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lock: setup  ## make requirements.txt from the ranges of pyproject.toml
	$(BIN)/uv pip compile pyproject.toml --all-extras --universal --python-version 3.11 \
		--no-header --no-annotate --quiet --output-file requirements.txt

clean:  ## remove caches (never results, data or .venv)
	rm -rf .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
