# Every target builds the environment that it needs; a second run finds it ready.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
LINTERS := $(VENV)/.linters
OTHERS := $(VENV)/.others
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

# A variable that forbids writing bytecode would make every start import slowly: compile once.
unexport PYTHONDONTWRITEBYTECODE
# Packages of the caller's Python must not shadow those of the environment.
unexport PYTHONPATH
unexport PYTHONHOME

.PHONY: test check demo bench clean

test: $(READY)
	$(BIN)/python -m pytest

check: $(LINTERS)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(BIN)/pyright

demo: $(READY)
	$(BIN)/python models/demo.py

bench: $(OTHERS)
	$(BIN)/python -m tests.benchmarks

clean:
	rm -rf $(VENV) build

$(READY): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PIP) -e '.[test]'
	$(BIN)/python -m compileall -q $(VENV)/lib onnxcompress passes >/dev/null || true
	@touch $@

$(LINTERS): $(READY)
	$(PIP) -e '.[dev]'
	@touch $@

$(OTHERS): $(READY)
	@$(PIP) -e '.[bench]' && touch $@ || echo 'some tools cannot be installed: compared without'
