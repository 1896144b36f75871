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

.PHONY: help demo test check faults format lock clean

help:  ## Show this help
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1\t/' | expand -t 16

demo: $(STAMP)  ## Run the whole way through on an embedded stack (under a minute)
	@$(BIN)/trueup demo

test: $(STAMP)  ## Run the tests against real embedded servers, JOBS=2 at once; ARGS="-k gate" narrows them
	@$(BIN)/pytest --numprocesses=$(JOBS) --dist=loadfile $(ARGS)

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
	@rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis

# Pinned with hashes first, then the project itself, so that nothing unpinned can slip in.
$(STAMP): pyproject.toml requirements/dev.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "trueup needs Python 3.11 or newer; name one with: make PYTHON=python3.12"; exit 1; }
	@echo "Installing $$(grep -c == requirements/dev.txt) packages into $(VENV): seconds with uv, minutes with pip ..."
ifdef UV
	@test -x $(BIN)/python || $(UV) venv --quiet --python $(PYTHON) $(VENV)
	@$(UV) pip install $(QUIET) --python $(BIN)/python --require-hashes -r requirements/dev.txt
	@$(UV) pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation -e .
else
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install $(QUIET) --disable-pip-version-check --require-hashes -r requirements/dev.txt
	@$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
endif
	@touch $@
