# One command for each job. `make demo` and `make test` set everything up by themselves, in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEMO_ARGS ?=
TEST_ARGS ?=

.PHONY: help demo test check bench clean
help:  ## what can be made
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	@touch $(STAMP)

demo: $(STAMP)  ## two replicas share the prefixes of long documents on a local cluster; DEMO_ARGS="--dtype bfloat16"
	$(BIN)/tiered-kv demo $(DEMO_ARGS)

test: $(STAMP)  ## all tests; TEST_ARGS="-k name"
	$(BIN)/python -m pytest $(TEST_ARGS)

check: $(STAMP)  ## lint and format
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: $(STAMP)  ## the speed of fetch and store as a ratio to memcpy
	$(BIN)/tiered-kv bench fetch

clean:  ## remove the virtual environment and what was built
	rm -rf $(VENV) build dist *.egg-info
