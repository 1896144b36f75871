# `make help` lists the targets. Everything runs in a virtual environment of its own: .venv.
.DEFAULT_GOAL := help
SHELL := /bin/bash

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
UV := $(shell command -v uv 2>/dev/null)
STAMP := $(VENV)/.installed
# pip and uv show their progress in a terminal; a log gets one line.
QUIET = $$(test -t 2 || echo --quiet)

JOBS ?= 2
SEED ?= 1
ROUNDS ?= 20

# The lowest versions have no builds for newer Pythons.
OLDEST_PYTHON ?= python3.11
OLDEST := .venv-oldest
OLDEST_STAMP := $(OLDEST)/.installed
OLDEST_TESTS ?= tests/gate tests/usage tests/reconcile tests/worker

.PHONY: help demo test test-long test-oldest check faults format lock clean

help:  ## Show this help
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 20

demo: $(STAMP)  ## Run the whole way through on an embedded stack (under a minute)
	@$(BIN)/trueup demo

test: $(STAMP)  ## Run the tests against real embedded servers, JOBS=2 at once; ARGS="-k gate" narrows them
	@$(BIN)/pytest --numprocesses=$(JOBS) --dist=loadfile --no-loadscope-reorder $(ARGS)

test-long: $(STAMP)  ## Run what repeats with bigger numbers, and the dated tests at other moments and in other time zones
	@$(BIN)/pytest --numprocesses=$(JOBS) --dist=loadgroup -m long $(ARGS)

test-oldest: $(OLDEST_STAMP)  ## Run the gate's, charges', reconcile's and worker's tests on the lowest versions allowed
	@$(OLDEST)/bin/pytest --numprocesses=$(JOBS) --dist=loadfile $(OLDEST_TESTS) $(ARGS)

check: $(STAMP)  ## Lint, format, types, import contracts, compose schema
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports
	@$(BIN)/check-jsonschema --builtin-schema vendor.compose-spec docker-compose.yml

faults: $(STAMP)  ## Kill and break things for ROUNDS=20 rounds from SEED=1, and check every invariant
	@$(BIN)/python -m tests.faults --seed $(SEED) --rounds $(ROUNDS) $(ARGS)

format: $(STAMP)  ## Put the code in shape
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

lock: $(STAMP)  ## Pin the dependencies of pyproject.toml anew (PACKAGE=name for one of them)
	@./requirements/compile $(if $(PACKAGE),--upgrade-package $(PACKAGE),--upgrade)

clean:  ## Remove the virtual environment and caches; data in .trueup stays
	@rm -rf $(VENV) $(OLDEST) .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis

# $(call install,folder,Python,lock file): pinned with hashes first, then the project itself, so that nothing unpinned can
# slip in.
ifdef UV
define install
	@echo "Installing $$(grep -c == $(3)) packages into $(1) ..."
	@test -x $(1)/bin/python || $(UV) venv --quiet --python $(2) $(1)
	@$(UV) pip install $(QUIET) --python $(1)/bin/python --require-hashes -r $(3)
	@$(UV) pip install --quiet --python $(1)/bin/python --no-deps --no-build-isolation -e .
endef
else
define install
	@echo "Installing $$(grep -c == $(3)) packages into $(1): this takes some minutes ..."
	@test -x $(1)/bin/pip || $(2) -m venv $(1)
	@$(1)/bin/pip install $(QUIET) --disable-pip-version-check --require-hashes -r $(3)
	@$(1)/bin/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
endef
endif

$(STAMP): pyproject.toml requirements/dev.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "trueup needs Python 3.11 or newer; name one with: make PYTHON=python3.12"; exit 1; }
	$(call install,$(VENV),$(PYTHON),requirements/dev.txt)
	@touch $@

$(OLDEST_STAMP): pyproject.toml requirements/oldest.txt
	@$(OLDEST_PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' \
	  || { echo "The oldest versions are pinned for Python 3.11; name it with: make test-oldest OLDEST_PYTHON=…"; exit 1; }
	$(call install,$(OLDEST),$(OLDEST_PYTHON),requirements/oldest.txt)
	@touch $@
