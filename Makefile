# `make help` lists what there is. Everything installs into .venv, and again only when what it needs changes.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH := $(shell grep '^torch==' constraints.txt)
INSTALLED := $(VENV)/.installed
INSTALLED_DEV := $(VENV)/.installed-dev
SETTINGS := settings.ini constraints.txt setup.py

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help demo test gpu docs readme notebooks clean

help:  ## List the targets
	@sed -nE 's/^([a-z]+):.*## (.*)/make \1: \2/p' $(MAKEFILE_LIST)

demo: $(INSTALLED)  ## Train, stop and resume a small model on Python's own docstrings
	$(BIN)/langmlm demo demo_run

test: $(INSTALLED_DEV)  ## Run every check
	@$(BIN)/python tools/checks.py

gpu: $(INSTALLED_DEV)  ## Run what needs a GPU
	$(BIN)/python -m pytest tests/integration/test_gpu.py
	for chapter in attention triton_attention layers; do PATH="$(CURDIR)/$(BIN):$$PATH" nbdev_test --path nbs/model/0?_$$chapter.ipynb --flags gpu || exit 1; done

docs: $(INSTALLED_DEV)  ## Build the site into _docs (needs Quarto)
	@command -v quarto >/dev/null || { echo "make docs needs Quarto: see quarto.org"; exit 1; }
	rm -rf _proc
	PATH="$(CURDIR)/$(BIN):$$PATH" nbdev_export
	PYTHONPATH="$(CURDIR)" PATH="$(CURDIR)/$(BIN):$$PATH" nbdev_docs --n_workers 2
	$(BIN)/python tools/search_index.py
	rm -rf index_files
	$(BIN)/python tools/readme.py --write

readme: $(INSTALLED_DEV)  ## Make README.md and its figures from nbs/index.ipynb
	$(BIN)/python tools/readme.py --write

notebooks: $(INSTALLED_DEV)  ## Export, run all notebooks, store their outputs, and clean them
	$(BIN)/nbdev_export
	$(BIN)/python tools/execute_notebooks.py

clean:  ## Remove builds and environments
	rm -rf $(VENV) build dist *.egg-info _docs _proc _site demo_run .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "langmlm needs Python 3.11 or newer"'
	$(PYTHON) -m venv $(VENV)

# torch goes first and pinned. Without a GPU, PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu saves gigabytes.
$(INSTALLED): $(SETTINGS) | $(BIN)/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt $(TORCH)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	@touch $@

$(INSTALLED_DEV): $(INSTALLED)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@
