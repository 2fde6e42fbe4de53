# `make demo` and `make test` do all the set-up themselves. VENV=DIR takes another place for the environment.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin

.PHONY: demo test lint nightly

demo: $(VENV)/.installed
	$(BIN)/accelerate launch --num_processes 1 --mixed_precision no --dynamo_backend no --num_machines 1 train.py
	$(BIN)/python sample.py runs/digits --scheduler unipc --steps 20
	@echo
	@echo "Pictures drawn while training:  runs/digits/samples/step-*.png"
	@echo "Samples of the trained model:   runs/digits/samples/unipc-20/preview/grid.png"

test: $(VENV)/.installed
	$(BIN)/python -m pytest -q

nightly: $(VENV)/.installed
	$(BIN)/python -m pytest -q -m nightly

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -e ".[test]"
	@touch $@
