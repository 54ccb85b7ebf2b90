# Everything runs in a virtual environment of its own; nothing else is asked of a machine with Python 3.11+ and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# Tests start hundreds of processes: where Python may keep compiled modules, each start takes half the time.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-quick check bench dist clean

test: $(VENV)/.installed
	$(BIN)/python -m pytest -n auto

# Units, conformance, laws with few examples, golden output and architecture: about a minute on two idle cores.
test-quick: $(VENV)/.installed
	HYPOTHESIS_PROFILE=quick $(BIN)/python -m pytest -n auto -m "not slow" --ignore tests/test_readme.py

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
	@echo 'setting up $(VENV): some minutes, once'
	# An archive of the sources has no symlinks (docs/adr/0017-package-layout.md).
	for room in cas backends reconcile; do [ -e modelstow/$$room ] || ln -s ../$$room modelstow/$$room; done
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	touch $@

dist: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet build
	rm -rf dist
	$(BIN)/python -m build --outdir dist .

clean:
	rm -rf $(VENV) dist .demo .bench .hypothesis .mypy_cache .ruff_cache .pytest_cache
