# make app    set up, then open the app on http://localhost:8501 (PORT=8501)
# make test   set up, then lint, types and tests; FAST=1 leaves out what takes minutes
#             (two files of tests at once: SIDE= takes them one after the other)
# make bench  set up, then measure (half an hour on a quiet machine) and write the tables of README.md and docs/
# make setup  the set-up alone: .venv, packages, the default model
# make lock   write requirements.lock anew: what is installed here, with the checksums of all files
#
# PYTHON=python3.12 takes another interpreter (3.11 or later). TORCH_INDEX=URL takes torch from that package index:
# on Linux without a GPU name PyTorch's index of CPU builds (see pytorch.org/get-started), which saves gigabytes.

PORT ?= 8501
PYTHON ?= $(shell command -v python3.11 || command -v python3)
TORCH_INDEX ?=
FAST ?=
SIDE ?= -n 2 --dist loadfile --no-loadscope-reorder

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --progress-bar off -qq
TORCH := $(shell sed -n 's/^\(torch==[0-9.]*\).*/\1/p' requirements.txt)
CHROMIUM := $(shell command -v chromium || command -v chromium-browser || command -v google-chrome)
MARKED := not gpu$(if $(FAST), and not slow)$(if $(CHROMIUM),$(if $(FAST), and not browser), and not browser)

.PHONY: app test bench setup lint lock clean
.DEFAULT_GOAL := app

app: setup
	@echo "The app: http://localhost:$(PORT) (Ctrl-C stops it; runs go on and are found again)"
	@$(BIN)/streamlit run app.py --server.port $(PORT)

setup: $(VENV)/.installed
	@$(BIN)/python -m trsp_core fetch smollm2-135m

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

test: setup lint
	$(if $(CHROMIUM),,@echo "No Chromium here: the browser tests are left out.")
	$(BIN)/python -m pytest -m "$(MARKED)" $(SIDE) $(ARGS)

bench: setup $(VENV)/.installed-dev
	$(BIN)/python -m benchmarks --json > benchmarks/results.jsonl
	$(BIN)/python -m benchmarks._table

# Versions as they were tested, but torch's, which may be a build for CPUs alone: requirements.txt pins it.
lock: $(VENV)/.installed-dev
	@sed -n '/^#/p;/^[^#]/q' requirements.lock > $(VENV)/lock.head
	@$(BIN)/python -m pip list --format=freeze --disable-pip-version-check | grep -v '^torch=' > $(VENV)/tested.txt
	@$(BIN)/uv pip compile --quiet --no-config --generate-hashes --universal --python-version 3.11 --no-annotate \
		--no-header --no-emit-index-url --constraints $(VENV)/tested.txt requirements.txt --output-file $(VENV)/lock.body
	@cat $(VENV)/lock.head $(VENV)/lock.body > requirements.lock

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "Python 3.11 or later is needed: install it, or set PYTHON=/path/to/it."; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "Python 3.11 or later is needed, $(PYTHON) is older. Set PYTHON=/path/to/another."; exit 1; }
	@echo "1/4  A virtual environment in $(VENV)"
	@$(PYTHON) -m venv $(VENV)

$(VENV)/.torch: | $(BIN)/python
	@echo "2/4  $(TORCH) (the largest part; minutes on a slow line)"
	@$(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $(TORCH)
	@touch $@

$(VENV)/.installed: requirements.txt $(VENV)/.torch
	@echo "3/4  The other packages of requirements.txt"
	@$(PIP) -r requirements.txt
	@touch $@
	@echo "4/4  The default model (93 MB), converted once"

$(VENV)/.installed-dev: requirements-dev.txt $(VENV)/.installed
	@echo "Packages for tests: requirements-dev.txt"
	@$(PIP) -r requirements-dev.txt
	@touch $@
