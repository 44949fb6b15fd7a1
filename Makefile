# Every target makes the environment first, once: .venv holds all that captionscale needs.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: quickstart test lint install clean

quickstart: .venv/ready
	$(BIN)/captionscale quickstart

test: .venv/ready
	$(BIN)/pytest

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

install: .venv/ready

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt uv
	$(BIN)/uv pip install --python $(BIN)/python --constraint constraints.txt --compile-bytecode --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv build dist site quickstart .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
