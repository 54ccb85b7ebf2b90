# Everything runs in a virtual environment of its own; nothing else is asked of a machine with Python 3.11+ and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-quick check bench dist clean

test: $(VENV)/.installed
	$(BIN)/python -m pytest -n auto

demo: $(VENV)/.installed
	$(BIN)/python examples/demo.py

check: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_architecture.py

bench: $(VENV)/.installed
	$(BIN)/python -m benchmarks

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	touch $@

dist: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet build
	rm -rf dist
	$(BIN)/python -m build --outdir dist .

clean:
	rm -rf $(VENV) dist .demo .bench .hypothesis .mypy_cache .ruff_cache .pytest_cache
