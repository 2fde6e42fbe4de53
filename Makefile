# `make demo` and `make test` do all the set-up themselves. VENV=DIR puts the environment elsewhere,
# THREADS=N takes so many CPU threads.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin

.PHONY: demo demo-text test nightly lint docs

demo: $(VENV)/.installed
	$(BIN)/accelerate launch train.py $(THREADS:%=--num_threads %)
	$(BIN)/python sample.py runs/digits --scheduler unipc --steps 20 $(THREADS:%=--num_threads %)
	$(BIN)/python eval.py score runs/digits --num_images 1000 $(THREADS:%=--num_threads %)
	@echo
	@echo "Digits drawn while it was training:  runs/digits/samples/step-*.png"
	@echo "Digits drawn by the trained model:   runs/digits/samples/unipc-20/preview/grid.png"

demo-text: $(VENV)/.installed
	$(BIN)/accelerate launch train.py --config digits_text $(THREADS:%=--num_threads %)
	$(BIN)/python sample.py runs/digits_text --guidance_scale 2 --num_images 100 --output_dir runs/digits_text/samples/prompts $(THREADS:%=--num_threads %) \
		--prompt "a handwritten zero" "a handwritten one" "a handwritten two" "a handwritten three" "a handwritten four" \
		"a handwritten five" "a handwritten six" "a handwritten seven" "a handwritten eight" "a handwritten nine"
	$(BIN)/python eval.py score runs/digits_text --guidance_scale 2 --metrics fid,prompt_accuracy --num_images 1000 $(THREADS:%=--num_threads %)
	@echo
	@echo "Digits of prompts:  runs/digits_text/samples/prompts/preview/grid.png"

# Two at a time with one thread each: most tests wait for small processes to start.
test: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

nightly: $(VENV)/.installed
	$(BIN)/pip install --quiet -e ".[test,play]"
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m nightly -n 2 --dist worksteal

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The site, in build/site; no network.
docs: $(VENV)/.installed
	$(BIN)/mkdocs build --strict

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -e ".[test]"
	@touch $@
