# Both commands make their virtual environment first; needs Python >= 3.11.
PYTHON ?= python3
VENV ?= .venv
CONFIG ?= configs/tiny.py
ARGS ?=

.PHONY: train test

train: $(VENV)/installed  ## make train [CONFIG=FILE] [ARGS="--workdir=DIR ..."]
	$(VENV)/bin/python train.py --config=$(CONFIG) $(ARGS)

test: $(VENV)/installed-test  ## make test [ARGS="tests/retrieval_test.py ..."]
	$(VENV)/bin/ruff check .
	$(VENV)/bin/python -m pytest --numprocesses=2 --dist=loadfile \
	  --no-loadscope-reorder $(ARGS)

$(VENV)/installed: requirements.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --editable .
	touch $@

$(VENV)/installed-test: $(VENV)/installed
	$(VENV)/bin/pip install --quiet --editable ".[test]"
	touch $@
