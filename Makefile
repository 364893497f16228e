# Needs Python 3.11 or newer, git and make; everything else goes into .venv.
PYTHON ?= python3
SCALE  ?= quick
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check install --quiet -c constraints.txt
PINS   := constraints.txt settings.ini setup.py
SERIAL := OMP_NUM_THREADS=1 MPLBACKEND=agg

.PHONY: help install test reproduce bench lab export clean-notebooks readme lint

help: ## show this list
	@sed -n 's/^\([a-z-]*\):.*## /\1|/p' Makefile | awk -F'|' '{printf "make %-16s %s\n", $$1, $$2}'

install: $(VENV)/.ok ## make .venv with the package and everything its development needs

test: $(VENV)/.ok ## check that notebooks and modules agree, then run every notebook and pytest
	$(BIN)/python tests/check_sync.py
	$(SERIAL) $(BIN)/python tests/run_notebooks.py
	$(SERIAL) $(BIN)/python -m pytest -q -n 2 --dist worksteal

reproduce: $(VENV)/.runtime ## rerun the papers at SCALE (smoke, quick, small or full; default quick)
	$(BIN)/pcvae reproduce all --scale $(SCALE)

bench: $(VENV)/.bench ## measure the fast paths against plain code and published packages
	$(BIN)/pcvae bench

lab: $(VENV)/.runtime ## open the notebooks in JupyterLab
	$(BIN)/jupyter lab nbs

export: $(VENV)/.ok ## write the package from the notebooks
	$(BIN)/nbdev_export

clean-notebooks: $(VENV)/.ok ## strip execution counts and stray metadata from the notebooks
	$(BIN)/nbdev_clean

readme: $(VENV)/.ok ## put the committed tables into README.md
	$(BIN)/python tests/fill_readme.py

lint: $(VENV)/.ok ## look for syntax errors and undefined names
	$(BIN)/ruff check nbs tests

# torch comes first and by its plain version, so that pip takes the CPU build where it is shown one.
# pyproject.toml is left out of the prerequisites: it holds nothing that is installed.
$(VENV)/.runtime: $(PINS)
	@command -v "$(PYTHON)" >/dev/null || { echo "make: PYTHON=$(PYTHON) is not found; name a Python 3.11 or newer, as in: make $(MAKECMDGOALS) PYTHON=python3.11" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "make: PYTHON=$(PYTHON) is $$("$(PYTHON)" --version 2>&1), but 3.11 or newer is needed, as in: make $(MAKECMDGOALS) PYTHON=python3.11" >&2; exit 1; }
	@echo "installing into $(VENV): some minutes, 1.5 GB (5 GB where pip takes torch's CUDA build)"
	"$(PYTHON)" -m venv $(VENV)
	$(PIP) $$(grep '^torch==' constraints.txt)
	$(PIP) -e .
	@touch $@

$(VENV)/.ok: $(VENV)/.runtime
	$(PIP) -e '.[dev]'
	@touch $@

$(VENV)/.bench: $(VENV)/.runtime
	$(PIP) -e '.[bench]'
	@touch $@
