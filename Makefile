# make demo and make test do all their own set-up; the only thing they need is Python 3.11 or newer.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

# The torch that is tested. Another build: make setup TORCH=2.12.1, or install your own into .venv first.
TORCH := 2.13.0
BIN := .venv/bin
READY := .venv/.ready-torch-$(TORCH)

.PHONY: help setup demo test test-all test-browser lint format clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: $(READY)  ## build .venv with the console script .venv/bin/fedgrove

# The stamp comes last, so a set-up that failed is done again. "pyenv" and its like leave names that do not run:
# hence each candidate is asked for its version and for the modules that a virtual environment needs.
$(READY): pyproject.toml
	@rm -f .venv/.ready-*
	@python=""; for candidate in $(PYTHON) python3.11 python3.12 python3.13 python3; do \
	  if "$$candidate" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then \
	    python="$$candidate"; break; fi; done; \
	if [ -z "$$python" ]; then \
	  echo "make setup needs Python 3.11 or newer with its venv module; name one with PYTHON=/path/to/python." >&2; \
	  exit 1; fi; \
	if [ ! -x $(BIN)/python ]; then echo "setup: .venv with $$("$$python" --version)"; "$$python" -m venv .venv; fi
	@echo "setup: torch $(TORCH), then the rest (about 2 GB, a minute or two) ..."
	@$(BIN)/python -m pip install -qq --disable-pip-version-check "torch==$(TORCH)"
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --editable ".[dev,flower,privacy,gguf,onnx,tensorboard,examples,study]"
	@touch $@
	@echo "setup: ready, $(BIN)/fedgrove"

demo: setup  ## a federation of 16 clients fine-tunes a real model on real text (about 2 minutes on 2 cores, after the set-up)
	@$(BIN)/fedgrove demo

lint: setup  ## ruff, mypy, and who imports whom
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --check --quiet .
	@said=$$($(BIN)/lint-imports --no-cache --no-logo 2>&1) || { echo "$$said"; exit 1; }
	@$(BIN)/mypy

test: lint  ## lint, then every test but the slow ones and those in a browser
	@$(BIN)/python -m pytest -q -n auto --dist loadscope -m "not slow and not browser" $(PYTEST_ARGS)

test-all: lint  ## lint, then every test
	@$(BIN)/python -m pytest -q -n auto --dist loadscope $(PYTEST_ARGS)

test-browser: setup  ## the report, the comparison and the live page in chromium (apt-get install chromium), also on a phone
	@$(BIN)/python -c 'import playwright' 2>/dev/null || $(BIN)/python -m pip install -qq --disable-pip-version-check --editable ".[browser]"
	@$(BIN)/python -m pytest -q -m browser tests/browser $(PYTEST_ARGS)

format: setup  ## let ruff mend what it can
	@$(BIN)/ruff check --quiet --fix .
	@$(BIN)/ruff format --quiet .

clean:  ## remove .venv and every cache and build (not runs/)
	@rm -rf .venv build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
