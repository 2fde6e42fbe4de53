# `make demo` and `make test` do all the set-up themselves. VENV=DIR puts the environment elsewhere,
# THREADS=N takes so many CPU threads.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin

.PHONY: demo test nightly lint

demo: $(VENV)/.installed
	$(BIN)/accelerate launch train.py $(THREADS:%=--num_threads %)
	$(BIN)/python sample.py runs/digits --scheduler unipc --steps 20 $(THREADS:%=--num_threads %)
	$(BIN)/python eval.py score runs/digits --num_images 1000 $(THREADS:%=--num_threads %)
	@echo
	@echo "Digits drawn while it was training:  runs/digits/samples/step-*.png"
	@echo "Digits drawn by the trained model:   runs/digits/samples/unipc-20/preview/grid.png"

# Two at a time with one thread each: most tests wait for small processes to start.
test: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

nightly: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m nightly -n 2 --dist worksteal

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -e ".[test]"
	@touch $@
