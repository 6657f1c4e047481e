# Everything runs in .venv, which the first target that needs it creates; later calls find it ready.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.DEFAULT_GOAL := help
.PHONY: help setup demo demo-traits test lint bench wheel clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 13

setup: $(STAMP) ## create .venv with the project and all that its tests need

# torch comes first: a bare requirement on it would fetch the newest build with several GB of CUDA libraries.
$(STAMP): pyproject.toml constraints.txt hatch_build.py steered_lm.pth steered_lm.start
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet -c constraints.txt -e '.[anthropic,dev,openai,peft,png,tinker]'
	@touch $@

demo: $(STAMP) ## tiny model, vectors, search, comparison and report in about three minutes
	$(BIN)/steered-lm demo

demo-traits: $(STAMP) ## nine tiny models trained, measured and drawn; steered against trained against prompted
	$(BIN)/steered-lm traits demo

lint: $(STAMP) ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint ## lint, then the test suite, one process a core
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder

# Small models and few rounds; each script says with --help what it takes, and --full is the whole table.
bench: $(STAMP) ## benchmarks in a reduced form (some minutes): ratios, both sides in one run; numbers go to bench/
	$(BIN)/python tests/bench/generation.py --size xs --rounds 2
	$(BIN)/python tests/bench/scoring.py --size xs --questions 12 --settings 1 8 --rounds 2
	$(BIN)/python tests/bench/cost.py --size xs --items 12 --rounds 2
	$(BIN)/python tests/bench/adapters.py --size xs --rounds 2
	$(BIN)/python tests/bench/memory.py
	$(BIN)/python tests/bench/overhead.py
	$(BIN)/python tests/bench/startup.py 100
	$(BIN)/python tests/bench/personas.py --budget 16
	$(BIN)/python tests/bench/preventative.py
	$(BIN)/python tests/bench/judge_cache.py
	$(BIN)/python tests/bench/judging.py

wheel: $(STAMP) ## sdist and wheel in dist/
	$(BIN)/python -m build --no-isolation

clean: ## remove what the other targets made
	rm -rf $(VENV) dist build .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
