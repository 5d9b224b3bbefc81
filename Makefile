PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install -q --disable-pip-version-check
META   := settings.ini setup.py pyproject.toml

export MPLBACKEND := Agg

.DEFAULT_GOAL := help
.PHONY: help demo test quick types bench picture docs export release-check clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/.make-base ## set up .venv, fit statistics on images that come with a dependency, write the plot
	$(BIN)/normstats demo

test: $(VENV)/.make-dev ## set up .venv for development, run the notebooks, the sync check and pytest
	$(NOTEBOOKS) $(BIN)/nbdev-test --n-workers 2
	$(BIN)/python tests/check_sync.py
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

# the environment in which notebooks are tested: one thread each, and a cache of their own
NOTEBOOKS = cache=$$(mktemp -d); PATH="$(abspath $(BIN)):$$PATH" OMP_NUM_THREADS=1 XDG_CACHE_HOME=$$cache

quick: $(VENV)/.make-dev ## M=policy: the notebook and the tests of one room; without M: all tests but the slow ones
ifdef M
	$(NOTEBOOKS) $(BIN)/nbdev-test "$$(ls nbs/[0-9]*_$(M).ipynb)"
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -q $(wildcard tests/test_$(M).py tests/test_$(M)_*.py)
else
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -q -m 'not slow'
endif

types: $(VENV)/.make-types ## check the types of the library and of a script that uses it (a minute or two)
	$(BIN)/basedpyright --pythonpath $(BIN)/python --level error

bench: $(VENV)/.make-dev ## measure speed and memory, write benchmarks/results.md (minutes; IMAGES=folder for your own)
	$(BIN)/python benchmarks/run.py $(if $(IMAGES),--images $(IMAGES))

picture: $(VENV)/.make-dev ## draw the picture in the README from chest X-rays (IMAGES=folder with labels.csv)
	$(BIN)/python docs/draw.py $(IMAGES)

docs: $(VENV)/.make-docs ## build the site from the notebooks into _docs/html, without a warning, and check its links
	rm -rf _docs
	$(BIN)/python docs/pages.py _proc
	$(BIN)/sphinx-build -q -W --keep-going -c docs -d _docs/doctrees _proc _docs/html
	$(BIN)/python docs/check.py _docs/html

export: $(VENV)/.make-dev ## write the library from the notebooks, then clean the notebooks
	$(BIN)/nbdev-export
	$(BIN)/python tests/stubs.py
	$(BIN)/nbdev-clean

release-check: $(VENV)/.make-release ## build what would be uploaded, try it in empty environments of each Python
	$(BIN)/python tests/check_release.py

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

# tools, named in settings.ini: for `make types` beside the package, for `make docs` with it, for `make release-check`
# without it; the latter two read notebooks with the nbdev that the sync check needs
tools = $$(sed -n 's/^$(1)_requirements = //p' settings.ini)
NBDEV = $$(grep -oE 'nbdev[<>=][^ ]*' settings.ini)

$(VENV)/.make-types: $(VENV)/.make-dev
	$(PIP) $(call tools,types)
	@touch $@

$(VENV)/.make-docs: $(META) | $(BIN)/pip
	@echo "Installing the package and what builds the site into $(VENV) (PyTorch is large: this can take minutes)"
	$(PIP) -e . $(NBDEV) $(call tools,docs)
	@touch $@ $(VENV)/.make-base

$(VENV)/.make-release: $(META) | $(BIN)/pip
	$(PIP) $(NBDEV) $(call tools,release)
	@touch $@
