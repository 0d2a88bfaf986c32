# Two commands are enough: `make test` and `make demo`. Both make their own environment first.

# Bytecode is written into the environments even where a container's default forbids it. Without it
# each of an engine's three processes compiles some 3,000 modules again, ten seconds every time.
unexport PYTHONDONTWRITEBYTECODE

VENV ?= .venv
VENV_OLD ?= .venv-old
VENV_LMCACHE ?= .venv-lmcache
# The newest CPU build of vLLM, and an old one inside the supported range whose CPU torch can be
# had everywhere: 0.26 pins torch 2.11, 0.27 to 0.32 pin 2.13.
VLLM ?= 0.32.0
VLLM_OLD ?= 0.28.0
LMCACHE ?= 0.5.6

# The first Python that can make the environment. `command -v` is not enough: a version
# manager's shim may exist for a version that it then refuses to run.
ifndef PYTHON
PYTHON := $(shell for python in python3.11 python3.12 python3.13 python3; do \
	if $$python -c 'import ensurepip, sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' \
	>/dev/null 2>&1; then echo $$python; break; fi; done)
endif

# Tests run in so many processes, a file each at a time; tests/conftest.py gives each a core, and
# the files the order in which they are taken.
JOBS ?= 2
PYTEST := pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

RUN := $(VENV)/bin/python -m
OLD_TESTS := tests/connector/test_contract.py tests/connector/test_restart.py \
	tests/reliability/test_identity_matrix.py tests/reliability/test_hash_seeds.py \
	tests/reliability/live/test_weight_updates.py tests/reliability/live/test_adapters.py \
	tests/reliability/live/test_store_policy.py

.PHONY: help setup setup-old test test-old test-families test-kernels test-joint test-disk check check-kernels soak demo demo-quick serving \
	docs check-deploy release newcomer reference clean

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/' | expand -t 12

setup: have-python  ## .venv with vLLM (CPU build) and this project; instant the second time
	@$(PYTHON) tests/setup_env.py --venv $(VENV) --vllm $(VLLM)

setup-old: have-python  ## .venv-old, the same with the oldest vLLM that CI runs
	@$(PYTHON) tests/setup_env.py --venv $(VENV_OLD) --vllm $(VLLM_OLD)

setup-lmcache: have-python  ## .venv-lmcache, the same with LMCache and a Redis server
	@$(PYTHON) tests/setup_env.py --venv $(VENV_LMCACHE) --vllm $(VLLM) --lmcache $(LMCACHE)

test:  ## every test, and the connector's contract on the old vLLM before
	@$(MAKE) --no-print-directory -j2 setup setup-old
	@$(MAKE) --no-print-directory test-old
	$(RUN) $(PYTEST)

test-old: setup-old  ## the connector's contract and its restart on the old vLLM
	$(VENV_OLD)/bin/python -m $(PYTEST) -m vllm $(OLD_TESTS)

test-families: setup  ## every family of models, and pipeline stages, in an engine
	KVTC_FAMILIES=all $(RUN) $(PYTEST) -m vllm tests/hybrid tests/connector/test_tensor_parallel.py

test-kernels: setup  ## the kernels of every codec in the interpreter, all cases
	KVTC_KERNELS=all $(RUN) $(PYTEST) tests/codec/kernels tests/connector/test_transfer.py \
		tests/connector/test_kernel_startup.py

test-joint: setup  ## joint: delta, degrade and quality in an engine, on artifacts of codec 2 made for it
	KVTC_JOINT=1 $(RUN) $(PYTEST) -m vllm tests/connector/test_joint_delta_engine.py \
		tests/connector/test_halving_engine.py tests/connector/test_quality_engine.py

test-disk: setup  ## every fault and kill -9 of the disk tier on chunks that refer to others
	KVTC_DISK=all $(RUN) $(PYTEST) tests/reliability/test_faults.py tests/reliability/test_processes.py

test-lmcache: setup-lmcache  ## KVTC in LMCache: contract, storages, servers killed and shared
	$(VENV_LMCACHE)/bin/python -m pytest tests/lmcache

check: setup  ## lint, format, types and the fast tests
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	$(RUN) mypy
	$(RUN) $(PYTEST) -q -m "not vllm and not slow"

check-kernels: setup  ## GPU kernels compiled for sm_80, sm_90 and sm_100 and inspected; no GPU
	$(RUN) benchmarks.gpu.offline.check_kernels

soak: setup  ## the long reliability tests, MINUTES=20; writes benchmarks/reliability/results.json
	$(RUN) benchmarks.reliability.soak --minutes $(or $(MINUTES),20)

demo: setup  ## long chats with a public language model, evicted and reloaded
	$(RUN) benchmarks.demo $(if $(MODEL),--model $(MODEL))

demo-quick: setup  ## the same with a small stand-in model, without a download; some minutes
	$(RUN) benchmarks.demo.quick

serving: setup  ## time to first token of a return against recompute; writes build/serving.json
	$(RUN) benchmarks.serving $(if $(MODEL),--model $(MODEL))

docs: setup  ## the documents as a site in build/site; needs the extra docs
	$(RUN) tools.site

check-deploy: setup  ## Kubernetes manifests, Dockerfile and compose file; needs the extra deploy
	$(RUN) tools.manifests $(if $(CHART),--chart $(CHART))

release: setup  ## sdist and wheel in dist/, checked, installed, and the demo run from the wheel
	$(RUN) tools.release

newcomer: setup  ## walks the quick start in an empty directory; MODEL=DIR TEXTS=DIR
	$(RUN) tools.newcomer --model $(MODEL) --texts $(TEXTS)

reference: setup  ## the pages and the dashboard that are made from the code
	$(RUN) tools.reference
	$(RUN) tools.errors
	$(RUN) tools.dashboard

clean:  ## removes environments, caches and builds
	rm -rf $(VENV) $(VENV_OLD) $(VENV_LMCACHE) build dist .pytest_cache .hypothesis .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.PHONY: have-python
have-python:
	@test -n "$(PYTHON)" || { echo "no Python 3.11, 3.12 or 3.13 with ensurepip found;" \
	"name one: make PYTHON=/path/to/python3.12" >&2; exit 1; }
