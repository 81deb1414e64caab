# The environment lives in .venv and is remade only when pyproject.toml changes.
PYTHON ?= python3
VENV ?= .venv
PORT ?= 8000
HOST ?= 127.0.0.1
MODEL ?= smollm2-135m
BIN := $(VENV)/bin
# One environment a Python: PYTHON=python3.12 does not reuse what another Python installed.
TAG := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')

.PHONY: serve test test-slow check bench aot fmt clean

serve: $(VENV)/.serve-$(TAG)
	$(BIN)/jaxserve serve $(MODEL) --host $(HOST) --port $(PORT) $(ARGS)

test: check
	$(BIN)/python -m pytest -m "not slow" $(ARGS)

test-slow: $(VENV)/.test-$(TAG)
	$(BIN)/python -m pytest -m slow $(ARGS)

check: $(VENV)/.test-$(TAG)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_architecture.py

bench: $(VENV)/.serve-$(TAG)
	$(BIN)/jaxserve bench engine

# Every preset compiled for every slice in configs/topologies; needs no TPU.
aot: $(VENV)/.aot-$(TAG)
	$(BIN)/jaxserve aot $(ARGS)

fmt: $(VENV)/.test-$(TAG)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV)

$(VENV)/.made-$(TAG):
	rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/.serve-$(TAG): pyproject.toml $(VENV)/.made-$(TAG)
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

$(VENV)/.test-$(TAG): pyproject.toml $(VENV)/.made-$(TAG)
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	touch $(VENV)/.serve-$(TAG) $@

$(VENV)/.aot-$(TAG): $(VENV)/.serve-$(TAG)
	$(BIN)/python -m pip install --quiet --editable '.[tpu]'
	touch $@
