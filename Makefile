# Targets that need .venv create or update it first.
PYTHON     ?= python3
DETECTRON2 ?=
ARGS       ?=
PY         := .venv/bin/python

.DEFAULT_GOAL := help
.PHONY: help install ops demo test lint format bench gpu-check clean distclean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo
	@echo "  PYTHON=python3.11        Python to create .venv with (3.10 or newer)"
	@echo "  DETECTRON2=wheel|git     source of Detectron2 (tools/README.md)"
	@echo "  ARGS='...'               passed on to the command of demo, test, lint, format, bench or gpu-check"

install:  ## create .venv, or update it if anything changed
	@$(PYTHON) tools/setup/install.py $(if $(DETECTRON2),--detectron2 $(DETECTRON2))

ops:  ## recompile the kernels of hiervl.ops
	@$(PYTHON) tools/setup/install.py --ops

demo: install  ## train on generated images in minutes: labeled-only vs. semi-supervised
	$(PY) -m tools.setup.run_demo $(ARGS)

test: install  ## run the tests (ARGS='-k name' selects some)
	$(PY) -m pytest $(ARGS)

lint: install  ## check code and formatting with ruff (ARGS=--fix repairs what it can)
	$(PY) -m ruff check $(ARGS) .
	$(PY) -m ruff format --check .

format: install  ## format the code with ruff
	$(PY) -m ruff format $(ARGS) .

bench: install  ## run the benchmarks of docs/PERFORMANCE.md (ARGS=op runs one part)
	$(PY) -m tools.benchmark $(ARGS)

gpu-check: install  ## check training on a GPU, and time it, in 8 minutes (ARGS=--quick: without the timings)
	$(PY) -m tools.gpu_check $(ARGS)

clean:  ## remove caches, outputs and compiled kernels, but keep .venv
	rm -rf output .pytest_cache .ruff_cache hiervl/ops/*.so
	find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +

distclean: clean  ## clean, and also remove .venv
	rm -rf .venv .venv.lock
