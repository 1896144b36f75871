# `make help` lists the targets. Everything runs in the virtual environment .venv.
.DEFAULT_GOAL := help
SHELL := /bin/bash

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
UV := $(shell command -v uv 2>/dev/null)
STAMP := $(VENV)/.installed
BROWSER_STAMP := $(VENV)/.installed-browser
FRAMEWORKS_STAMP := $(VENV)/.installed-frameworks
MODEL_STAMP := $(VENV)/.installed-model
LLAMA_INDEX := .venv-llama-index
LLAMA_INDEX_STAMP := $(LLAMA_INDEX)/.installed
# pip and uv show their progress only in a terminal; a log gets one line.
QUIET = $$(test -t 2 || echo --quiet)

# Container images often set this. Without bytecode, each process that the tests start would compile 1,500 modules anew.
unexport PYTHONDONTWRITEBYTECODE

# More than a small machine has processors, because many tests wait for other processes.
JOBS ?= 4
SEED ?= 1
ROUNDS ?= 20

# The lowest versions have no builds for newer Python versions.
OLDEST_PYTHON ?= python3.11
OLDEST := .venv-oldest
OLDEST_STAMP := $(OLDEST)/.installed
# All but the long run beside a busy host, which uses no other calls, and RabbitMQ: after a lost connection, a worker of
# Celery 5.5 takes no message while a task runs.
OLDEST_TESTS ?= tests/gate tests/usage tests/reconcile tests/worker --ignore=tests/reconcile/test_live_host.py \
    --ignore=tests/worker/test_rabbitmq.py

.PHONY: help demo test test-long test-browser test-frameworks real-model test-oldest test-mutations check faults format lock clean

help:  ## Show this help
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 20

demo: $(STAMP)  ## Run the demo on an embedded stack (under a minute)
	@$(BIN)/trueup demo

test: $(STAMP)  ## Run the tests on real embedded servers with JOBS=4 processes; ARGS="-k gate" selects tests
	@$(BIN)/pytest --numprocesses=$(JOBS) --dist=loadfile --no-loadscope-reorder $(ARGS)

test-long: $(STAMP)  ## Run the long tests: more repetitions, and the dated tests at other times and in other time zones
	@$(BIN)/pytest --numprocesses=$(JOBS) --dist=loadgroup -m long $(ARGS)

test-browser: $(BROWSER_STAMP)  ## Run the tests in the system's Chromium; PICTURES=docs/pictures also makes the documentation's pictures
	@$(BIN)/pytest tests/browser $(ARGS)

test-frameworks: $(FRAMEWORKS_STAMP) $(LLAMA_INDEX_STAMP)  ## Run the examples of docs/sdks.md for LangChain, LiteLLM and LlamaIndex
	@$(BIN)/pytest tests/transport/test_docs.py -k "LangChain or LiteLLM" $(ARGS)
	@$(LLAMA_INDEX)/bin/pytest tests/transport/test_docs.py -k LlamaIndex $(ARGS)

real-model: $(MODEL_STAMP)  ## Compare what is charged with a real model's own count: 200 calls, 130 MB, 8 minutes
	@$(BIN)/pytest -s tests/transport/real_model $(ARGS)

test-oldest: $(OLDEST_STAMP)  ## Run the tests of gate, charges, reconcile and worker on the lowest allowed versions
	@$(OLDEST)/bin/pytest --numprocesses=$(JOBS) --dist=loadfile $(OLDEST_TESTS) $(ARGS)

test-mutations: $(STAMP)  ## Change the gate and the charge in one place at a time, and list the changes that no test notices (hours)
	@$(BIN)/python -m tests.mutations $(ARGS)

check: $(STAMP)  ## Check lint, format, types, import contracts and the compose schema
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports
	@$(BIN)/check-jsonschema --builtin-schema vendor.compose-spec docker-compose.yml

faults: $(STAMP)  ## Inject faults for ROUNDS=20 rounds from SEED=1, and check every invariant
	@$(BIN)/python -m tests.faults --seed $(SEED) --rounds $(ROUNDS) $(ARGS)

format: $(STAMP)  ## Fix lint and format
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

lock: $(STAMP)  ## Update the lock files (PACKAGE=name updates one package)
	@./requirements/compile $(if $(PACKAGE),--upgrade-package $(PACKAGE),--upgrade)

clean:  ## Remove the virtual environment and caches; data in .trueup stays
	@rm -rf $(VENV) $(OLDEST) $(LLAMA_INDEX) .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis

# $(call install,folder,Python,lock file): installs the pinned packages with hashes, then the project. Without dependencies,
# because a lock file names them all: nothing unpinned is installed, and pip resolves nothing anew.
ifdef UV
define install
	@echo "Installing $$(grep -c == $(3)) packages into $(1) ..."
	@test -x $(1)/bin/python || $(UV) venv --quiet --python $(2) $(1)
	@$(UV) pip install $(QUIET) --python $(1)/bin/python --require-hashes --no-deps -r $(3)
	@$(UV) pip install --quiet --python $(1)/bin/python --no-deps --no-build-isolation -e .
endef
else
define install
	@echo "Installing $$(grep -c == $(3)) packages into $(1): this takes a few minutes ..."
	@test -x $(1)/bin/pip || $(2) -m venv $(1)
	@$(1)/bin/pip install $(QUIET) --disable-pip-version-check --require-hashes --no-deps -r $(3)
	@$(1)/bin/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
endef
endif

$(STAMP): pyproject.toml requirements/dev.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "trueup needs Python 3.11 or newer; choose one with: make PYTHON=python3.12"; exit 1; }
	$(call install,$(VENV),$(PYTHON),requirements/dev.txt)
	@touch $@

$(BROWSER_STAMP): $(STAMP) requirements/browser.txt
	$(call install,$(VENV),$(PYTHON),requirements/browser.txt)
	@touch $@

$(FRAMEWORKS_STAMP): $(STAMP) requirements/frameworks.txt
	$(call install,$(VENV),$(PYTHON),requirements/frameworks.txt)
	@touch $@

$(LLAMA_INDEX_STAMP): pyproject.toml requirements/llama-index.txt
	$(call install,$(LLAMA_INDEX),$(PYTHON),requirements/llama-index.txt)
	@touch $@

$(MODEL_STAMP): $(STAMP) requirements/model.txt
	$(call install,$(VENV),$(PYTHON),requirements/model.txt)
	@touch $@

$(OLDEST_STAMP): pyproject.toml requirements/oldest.txt
	@$(OLDEST_PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' \
	  || { echo "The oldest versions are pinned for Python 3.11; choose it with: make test-oldest OLDEST_PYTHON=…"; exit 1; }
	$(call install,$(OLDEST),$(OLDEST_PYTHON),requirements/oldest.txt)
	@touch $@
