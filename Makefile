# Each command makes its virtual environment first; needs Python 3.11 or newer.
PYTHON ?= python3
VENV ?= .venv
CONFIG ?= configs/tiny.py
ARGS ?=

.PHONY: train test docs

train: $(VENV)/installed  ## make train [CONFIG=FILE] [ARGS="--workdir=DIR ..."]
	$(VENV)/bin/python train.py --config=$(CONFIG) $(ARGS)

test: $(VENV)/installed-test  ## make test [ARGS="tests/ops/lookup_test.py ..."]
	$(VENV)/bin/ruff format --check --quiet .
	$(VENV)/bin/ruff check --quiet .
	$(VENV)/bin/pyright --pythonpath $(VENV)/bin/python
	$(VENV)/bin/python -m pytest --numprocesses=2 --dist=loadfile \
	  --no-loadscope-reorder $(ARGS)

docs: $(VENV)/installed-docs  ## make docs [ARGS="--site-dir=DIR"]
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/python -m mkdocs build --strict $(ARGS)

$(VENV)/installed: requirements.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --editable .
	touch $@

$(VENV)/installed-%: $(VENV)/installed
	$(VENV)/bin/pip install --quiet --editable ".[$*]"
	touch $@
