# make distill   the main job on the built-in data, ending with a report
# make test      all tests that need no GPU and are quick
# make test-all  those that take longer as well
# make lint      ruff and mypy
# make docs      the pages with the API reference, in site/
#
# Variables: PYTHON (interpreter, 3.11 or newer), TORCH (such as torch==2.12.0) and TORCH_INDEX (such as
# https://download.pytorch.org/whl/cpu) choose the environment when it is first made; ARGS are further flags of the command.

VENV := .venv
STAMP := $(VENV)/installed
export PYTHON TORCH TORCH_INDEX
# Two files of tests at a time, each file in one process: most tests have one thread.
PYTEST := $(VENV)/bin/python -m pytest -q -n 2 --dist loadfile

.PHONY: help environment distill test test-all lint docs

help:
	@sed -n 's/^# \{0,1\}//p' Makefile

environment: $(STAMP)

$(STAMP): pyproject.toml setup.py constraints.txt
	@.ci/environment
	@touch $@

distill: $(STAMP)
	$(VENV)/bin/python -m pdfast.launch --standalone -m pdfast.distill --rounds 8 $(ARGS)

test: $(STAMP)
	$(PYTEST) $(ARGS)

test-all: $(STAMP)
	$(PYTEST) -m "not gpu" $(ARGS)

lint: $(STAMP)
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy

docs: $(STAMP)
	$(VENV)/bin/python -m pip install -q -c $(VENV)/constraints.txt -e '.[docs]'
	$(VENV)/bin/mkdocs build --strict --quiet
