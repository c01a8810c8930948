# Every target makes .venv by itself when it is missing or out of date.
PYTHON     ?= python3
DETECTRON2 ?=
ARGS       ?=
PY         := .venv/bin/python

.DEFAULT_GOAL := help
.PHONY: help install ops demo test lint bench clean distclean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "  Variables: PYTHON=python3.11 (3.10 or newer), DETECTRON2=wheel|git, ARGS='...' (passed on)."

install:  ## make or update .venv (at once if up to date)
	@$(PYTHON) tools/setup/install.py $(if $(DETECTRON2),--detectron2 $(DETECTRON2))

ops:  ## compile the kernels of hiervl.ops again
	@$(PYTHON) tools/setup/install.py --ops

demo: install  ## train on generated images in minutes: labeled-only against semi-supervised
	$(PY) -m tools.setup.run_demo $(ARGS)

test: install  ## run the tests (ARGS='-k name' selects)
	$(PY) -m pytest $(ARGS)

lint: install  ## look for mistakes and long lines
	$(PY) -m ruff check $(ARGS) .

bench: install  ## time everything that docs/PERFORMANCE.md tells (ARGS=op: one part)
	$(PY) -m tools.benchmark $(ARGS)

clean:  ## remove caches, outputs and compiled kernels; keeps .venv
	rm -rf output .pytest_cache .ruff_cache hiervl/ops/*.so
	find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +

distclean: clean  ## clean, and remove .venv
	rm -rf .venv .venv.lock
