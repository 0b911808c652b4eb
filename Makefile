# Everything happens in a virtual environment of its own; only Python 3.11+, a C++ compiler and a package index are needed.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin

.PHONY: chat test lint clean

chat: $(VENV)/.installed
	$(BIN)/aisp-local chat

test: $(VENV)/.test lint
	$(BIN)/pytest

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

SOURCES := pyproject.toml $(shell find aisp_local models/storyteller reward_models/story-reward -type f -not -path '*__pycache__*')
PATCHES := $(wildcard patches/*.toml patches/*.py patches/aisp_build/*.py patches/series/*.patch)

$(VENV)/.binding: $(PATCHES)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check ./patches
	touch $@

$(VENV)/.installed: $(VENV)/.binding $(SOURCES)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check .
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --force-reinstall --no-deps .
	touch $@

$(VENV)/.test: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check '.[test]'
	touch $@

clean:
	rm -rf $(VENV)
