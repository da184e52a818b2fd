# `make demo`: from a clone to an answer.  `make test`: everything CI runs.
# Needs Python 3.11 or newer; no root, no C compiler. `make demo PYTHON=python3.12` picks one.

# The first Python that runs, is new enough and can make virtual environments.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	&& { echo $$p; break; }; done)
VENV := .venv
PROJECT := settings.ini setup.py pyproject.toml
PROMPT ?= The three most important ideas in computing are
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PYTHONDONTWRITEBYTECODE :=

.PHONY: help demo test docs clean

help:  ## show this list
	@grep -E '^[a-z]+:.*##' Makefile | sed -E 's/:[^#]*## /	/' | expand -t 8

demo: $(VENV)/installed  ## install, fetch the default model, stream a completion
	$(VENV)/bin/tinyvllm pull
	$(VENV)/bin/tinyvllm generate "$(PROMPT)" --max-tokens 32

test: $(VENV)/installed-dev  ## everything CI runs
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" tools/check.sh

docs: $(VENV)/installed-dev  ## build the site into _docs/
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" python tools/docs.py

clean:  ## remove the environment and everything that was built
	rm -rf $(VENV) _docs _proc build dist *.egg-info .pytest_cache .hypothesis

$(VENV)/bin/pip:
	@test -n "$(PYTHON)" || { echo 'tinyvllm needs Python 3.11 or newer (with venv): none found'; exit 1; }
	$(PYTHON) -m venv $(VENV)

# Editable installs: the environment runs the package as it is in this folder. Bytecode is written when
# a module is first imported: most of what the tests' clients bring never is.
$(VENV)/installed: $(PROJECT) | $(VENV)/bin/pip
	$(VENV)/bin/pip install -q -e .
	@touch $@

$(VENV)/installed-dev: $(PROJECT) | $(VENV)/bin/pip
	$(VENV)/bin/pip install -q --no-compile -e '.[dev,serve,clients]'
	@touch $@ $(VENV)/installed
