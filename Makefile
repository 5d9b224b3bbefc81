PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install -q --disable-pip-version-check
META   := settings.ini setup.py pyproject.toml

export MPLBACKEND := Agg

.DEFAULT_GOAL := help
.PHONY: help demo test bench export clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/.make-base ## set up .venv, fit statistics on images that come with a dependency, write the plot
	$(BIN)/normstats demo

test: $(VENV)/.make-dev ## set up .venv for development, run the notebooks, the sync check and pytest
	cache=$$(mktemp -d); PATH="$(abspath $(BIN)):$$PATH" OMP_NUM_THREADS=1 XDG_CACHE_HOME=$$cache $(BIN)/nbdev-test --n-workers 2
	$(BIN)/python tests/check_sync.py
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

bench: $(VENV)/.make-dev ## measure speed and memory beside their yardsticks, write benchmarks/results.md (minutes; IMAGES=folder for your own)
	$(BIN)/python benchmarks/run.py $(if $(IMAGES),--images $(IMAGES))

export: $(VENV)/.make-dev ## write the library from the notebooks, then clean the notebooks
	$(BIN)/nbdev-export
	$(BIN)/nbdev-clean

clean: ## remove what builds, tests and the demo leave behind (`rm -rf .venv` for a fresh environment)
	rm -rf build dist _proc _docs .pytest_cache *.egg-info normstats-demo.png normstats-demo.json
	find fastai_normstats nbs tests \( -name __pycache__ -o -name .ipynb_checkpoints \) -prune -exec rm -rf {} +

# pip is the last thing venv installs: without it the environment is not complete
$(BIN)/pip:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.make-base: $(META) | $(BIN)/pip
	@echo "Installing the package and what it needs into $(VENV) (PyTorch is large: this can take minutes)"
	$(PIP) -e .
	@touch $@

$(VENV)/.make-dev: $(META) | $(BIN)/pip
	@echo "Installing the package and its development tools into $(VENV) (PyTorch is large: this can take minutes)"
	$(PIP) -e '.[dev]'
	@touch $@ $(VENV)/.make-base
