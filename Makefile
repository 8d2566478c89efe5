# The verbs of this repository; CI calls the same ones. They need Python >= 3.11 with venv, and make.
# Another interpreter: make test PYTHON=python3.12. A .venv that another one made is made anew.

PYTHON ?= python3
PYTHONS ?= python3.11 python3.12 python3.13
SOAK_S ?= 600
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help demo check test test-frameworks test-torch test-newer-torch soak bench docs wheel clean

help:
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile

demo: .venv/.examples ## train the digits example on 8 local workers
	$(BIN)/fleet run examples/train_digits.py --workers 8

check: .venv/.test ## format, lint, types, layers
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy fleet
	$(BIN)/python -m pytest tests/test_layers.py

test: .venv/.test ## every test; those of real clusters last, one at a time, and skipped where there is no Docker or Slurm
	$(BIN)/python -m pytest -n 2 --dist worksteal --ignore tests/cluster --ignore tests/frameworks tests
	$(BIN)/python -m pytest tests/cluster

test-frameworks: .frameworks/.installed ## Lightning, Accelerate and the Hugging Face Trainer on fleet, in an environment of their own
	.frameworks/bin/python -m pytest tests/frameworks

test-torch: .frameworks/.installed ## torch's own distributed tests on fleet, with a table at the end
	.frameworks/bin/python tests/torch/torchs_own.py

test-newer-torch: .newer-torch/.installed ## what stands on torch, with a later one than constraints.txt has
	.newer-torch/bin/python -m pytest tests/torch

soak: .venv/.test ## jobs and tasks on a small cluster for SOAK_S seconds, and what each process gains for 1000 jobs
	FLEET_TEST_SOAK_S=$(SOAK_S) $(BIN)/python -m pytest -s tests/soak

bench: .venv/.bench ## how long a gang takes to start, and to end when it failed, all_reduce against Gloo, tasks, and what the orchestrator's work costs
	$(BIN)/python bench/startup.py
	$(BIN)/python bench/failures.py
	$(BIN)/python bench/allreduce.py --systems fleet,fleet-shared,fleet-tcp,gloo
	$(BIN)/python bench/dispatch.py --systems fleet,processpool
	$(BIN)/python bench/blame.py --runs 5
	$(BIN)/python bench/observed.py
	$(BIN)/python bench/orchestrator.py

docs: .docs/.installed ## the documentation site, in build/docs; a warning is an error
	NO_MKDOCS_2_WARNING=1 .docs/bin/mkdocs build --strict --quiet
	.docs/bin/python docs/site/check.py build/docs

wheel: .release/.installed ## sdist and wheel in dist, each tried in a fresh environment of each Python of PYTHONS that is at hand
	rm -rf dist
	.release/bin/python -m hatchling build
	.release/bin/twine check --strict dist/*
	.release/bin/python .ci/try_wheel.py dist $(PYTHONS)

clean: ## remove what the other verbs made
	rm -rf .venv .frameworks .newer-torch .docs .release .peers build dist .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name .git -prune -o -type d -name __pycache__ -prune -exec rm -rf {} +

# Who names an interpreter wants that one, whatever made the .venv that is there.
ifneq ($(origin PYTHON),file)
ifneq ($(wildcard $(BIN)/python),)
WHO := 'import sys; print(sys.version.split()[0], sys.base_prefix)'
ifneq ($(shell $(BIN)/python -c $(WHO) 2>&1),$(shell $(PYTHON) -c $(WHO) 2>&1))
.venv/.made: away
endif
endif
endif

.PHONY: away
away:
	@$(PYTHON) -c ''
	@echo ".venv was made by another interpreter than $(PYTHON): it is made anew"
	rm -rf .venv

# A stamp is touched last, so an interrupted installation starts over.
.venv/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "fleet needs Python 3.11 or newer: PYTHON=python3.12 make ...")'
	$(PYTHON) -m venv .venv
	@touch $@

# One stamp per extra. The build backend comes first and from the pins, which an isolated build would not see.
.venv/.examples .venv/.test .venv/.bench: .venv/.%: pyproject.toml constraints.txt .venv/.made
	$(PIP) install --quiet -c constraints.txt hatchling editables
	$(PIP) install --quiet --no-build-isolation -c constraints.txt -e '.[$*]'
	@touch $@

# The frameworks would bring their own versions of what the other tests use.
.frameworks/.installed: pyproject.toml constraints.txt tests/frameworks/requirements.txt
	$(PYTHON) -m venv --clear .frameworks
	.frameworks/bin/python -m pip --disable-pip-version-check install --quiet -c constraints.txt hatchling editables
	.frameworks/bin/python -m pip --disable-pip-version-check install --quiet --no-build-isolation -c constraints.txt -r tests/frameworks/requirements.txt -e .
	@touch $@

# torch 2.14 has a Backend that Python can make, and hooks around the collectives of others.
.newer-torch/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv --clear .newer-torch
	grep -v -E '^(torch|triton|nvidia-|cuda-)' constraints.txt >.newer-torch/constraints.txt
	.newer-torch/bin/python -m pip --disable-pip-version-check install --quiet -c .newer-torch/constraints.txt hatchling editables
	.newer-torch/bin/python -m pip --disable-pip-version-check install --quiet --no-build-isolation -c .newer-torch/constraints.txt torch==2.14.1 -e '.[test]'
	@touch $@

.docs/.installed: pyproject.toml constraints.txt docs/site/requirements.txt
	$(PYTHON) -m venv --clear .docs
	.docs/bin/python -m pip --disable-pip-version-check install --quiet -c constraints.txt hatchling editables
	.docs/bin/python -m pip --disable-pip-version-check install --quiet --no-build-isolation -c constraints.txt -r docs/site/requirements.txt -e .
	@touch $@

.release/.installed: constraints.txt .ci/release-requirements.txt
	$(PYTHON) -m venv --clear .release
	.release/bin/python -m pip --disable-pip-version-check install --quiet -c constraints.txt hatchling -r .ci/release-requirements.txt
	@touch $@
