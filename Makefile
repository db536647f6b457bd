# make demo | test | docs | claims | format | clean.  A machine needs Python >= 3.11 and nothing else; the rest is installed into .venv.
#   PYTHON    interpreter for a new environment, for example: make test PYTHON=python3.12
#   PIP_ARGS  extra arguments for pip, for example an index with CPU-only builds of torch
PYTHON ?= python3
VENV ?= .venv
PIP_ARGS ?=
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install -q $(PIP_ARGS) -c constraints.txt
RUN := $(BIN)/python -m

.DEFAULT_GOAL := help
.PHONY: help demo test lint docs claims format clean

help:
	@echo "make demo    train a small ParaFormer on real images (about two minutes) and write a report"
	@echo "make test    format, lint, types, imports, documentation, then all tests"
	@echo "make docs    build the documentation into site/"
	@echo "make claims  write docs/claims.md from the results in studies/ and benchmarks/"
	@echo "make format  format and fix the sources"
	@echo "make clean   remove caches, the demo run and the environment"

# A stamp says that the environment has what pyproject.toml and constraints.txt ask for; editing either renews it.
$(VENV)/.stamp-venv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "paradepth needs Python >= 3.11, but '$(PYTHON)' is $$($(PYTHON) --version 2>&1 || true)." >&2; \
		echo "Name a newer one: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.stamp-train: $(VENV)/.stamp-venv pyproject.toml constraints.txt
	@echo "Installing paradepth[train] into $(VENV) ..."
	@$(PIP) -e '.[train]'
	@touch $@

$(VENV)/.stamp-dev: $(VENV)/.stamp-venv pyproject.toml constraints.txt
	@echo "Installing paradepth[train,export,quantize,dev] into $(VENV) ..."
	@$(PIP) -e '.[train,export,quantize,dev]'
	@touch $(VENV)/.stamp-train $@

demo: $(VENV)/.stamp-train
	$(BIN)/paradepth train digits_paraformer --run-dir runs/demo --overwrite
	@echo
	@echo "The report is in runs/demo/report.html: open it in a browser."

lint: $(VENV)/.stamp-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

test: lint docs
	$(RUN) pytest -n 2 -q

docs: $(VENV)/.stamp-dev
	NO_MKDOCS_2_WARNING=1 $(RUN) mkdocs build --strict

claims: $(VENV)/.stamp-train
	$(RUN) paradepth.studies.claims

format: $(VENV)/.stamp-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist site runs/demo .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find src tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
