# Two commands do all the set-up: `make demo` and `make test`. What is installed is installed once.
PYTHON ?= python3
# `make demo TORCH=...` chooses another build, e.g. TORCH='torch --index-url URL'.
TORCH ?=
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
DEMO_OUTPUT ?= output/demo

.PHONY: setup demo test check format models clean

setup: $(INSTALLED)

# A torch wheel that pip finds locally is taken as it is: an unqualified torch may bring gigabytes of
# CUDA packages to a machine without a GPU. Elsewhere the pinned release comes with the rest.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(if $(TORCH),$(BIN)/pip install -q $(TORCH),$(BIN)/pip install -q --no-index --no-deps torch || true)
	$(BIN)/pip install -q $(if $(TORCH),,-c constraints.txt) -e '.[dev]'
	touch $@

demo: setup
	$(BIN)/phitune train --config examples/demo.yaml --output_dir $(DEMO_OUTPUT) --overwrite

test: setup
	$(BIN)/pytest -n auto

check: setup
	$(BIN)/ruff format --check src tests tools
	$(BIN)/ruff check src tests tools
	$(BIN)/mypy
	$(BIN)/pytest -n auto

format: setup
	$(BIN)/ruff format src tests tools
	$(BIN)/ruff check --fix src tests tools

# Trains the tiny models that ship with the package again; see tools/build_tiny_models.py.
models: setup
	$(BIN)/python tools/build_tiny_models.py

clean:
	rm -rf $(VENV) output .mypy_cache .ruff_cache .pytest_cache .hypothesis
