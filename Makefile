# Two commands for a newcomer: `make demo` and `make test`. Everything else is for working on the code.
SHELL := /bin/bash
.DEFAULT_GOAL := help
BIN := .venv/bin
RUN ?= jobs/runs/demo.yaml
# Files at once: each process has a Ray and an engine of its own, some 6 GiB. Unit tests want a process
# that has neither yet; then come the longest files, so that none is left alone at the end.
PARALLEL ?= -n 2 --dist loadfile --no-loadscope-reorder
CHECKED := pear_ray jobs tests scripts benchmarks docker

.PHONY: help venv demo test test-gpu lint format docs bench lock clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

venv: ## .venv with the locked CPU install; at once when it is current
	@scripts/bootstrap.sh

demo: venv ## corpus, scores, PEAR SFT, GRPO, evaluation and report on this machine
	@$(BIN)/pear run $(RUN)

test: lint ## everything CI runs: lint, types, import layers, docs, tests
	@$(BIN)/python -m pytest $(PARALLEL) -m "not slow and not gpu" tests/unit tests/e2e tests/integration

test-gpu: ## what needs a CUDA device, in the environment that `python` is of
	@python -m pytest -m gpu tests/gpu

lint: venv ## the checks without the tests
	@$(BIN)/ruff check --quiet $(CHECKED)
	@$(BIN)/ruff format --quiet --check $(CHECKED)
	@$(BIN)/lint-imports --no-logo
	@$(BIN)/pyrefly check --summary=none
	@$(BIN)/python scripts/make_config_docs.py --check
	@$(BIN)/hadolint docker/Dockerfile.cpu docker/Dockerfile.gpu

format: venv ## rewrite the code as ruff wants it
	@$(BIN)/ruff check --quiet --fix $(CHECKED)
	@$(BIN)/ruff format --quiet $(CHECKED)

docs: venv ## docs/configuration.md from the schema
	@$(BIN)/python scripts/make_config_docs.py

bench: venv ## speed and memory, into benchmarks/results/
	@for name in weights score plan sft rl evaluate study scheduling demo serve; do $(BIN)/python benchmarks/$$name.py || exit 1; done

lock: venv ## requirements/*.txt from pyproject.toml (needs uv)
	@$(BIN)/python scripts/lock.py

clean: ## remove caches and build leftovers; .venv and outputs/ stay
	@rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	@find . -path ./.venv -prune -o -name __pycache__ -type d -exec rm -rf {} +
