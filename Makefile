# Every target works first on a fresh clone: it makes .venv where there is none.
PYTHON ?= python3
BIN := .venv/bin
OLDEST := build/oldest
RUN ?= runs/$(patsubst train-%,%,$@)-$(shell date +%Y%m%d-%H%M%S)
DATASET ?= datasets/metaworld_tiny
RECIPE ?= recipes/lora.json
SET ?=
SETS = $(foreach pair,$(SET),--set $(pair))
HAS_GPU := $(shell nvidia-smi -L >/dev/null 2>&1 && echo yes)
# The CPU build has a local version of its own, which the main index does not carry and PyTorch's index does: asking for it by
# name can never pull the CUDA packages.
CPU_TORCH := torch==$(shell sed -n 's/^torch==//p' constraints.txt)+cpu
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
# Quiet: of a training that fails it would print its own traceback below the reason.
LAUNCH := $(BIN)/accelerate launch --quiet
# torch.distributed else kills what hasn't written its checkpoint 30 s after it was asked to stop.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT ?= 600

.PHONY: install train-tiny train-safe train-balanced train-max train-lora train-qlora plan doctor style quality test test-slow \
        test-sim test-gpu test-oldest clean

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --upgrade pip
ifeq ($(HAS_GPU)$(shell uname -s),Linux)
	$(BIN)/pip install --quiet "$(CPU_TORCH)" 2>/dev/null || $(BIN)/pip install --quiet "$(CPU_TORCH)" --index-url $(TORCH_INDEX)
endif
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	-@$(BIN)/python -m hf_vla.rollout.graphics
	touch $@

train-tiny: install  # on the CPU: PyTorch would ask things of a GPU that is there, and fail where it is full
	CUDA_VISIBLE_DEVICES= $(BIN)/python data_scripts/train_tiny.py --dataset $(DATASET) --run $(RUN)

# Doctor and plan first: the one stops at what can't work here (exit code 1), the other at what doesn't fit (3).
train-safe train-balanced train-max train-lora train-qlora: install
	$(BIN)/hf-vla doctor recipes/$(patsubst train-%,%,$@).json $(SETS)
	$(BIN)/hf-vla plan recipes/$(patsubst train-%,%,$@).json $(SETS)
	$(LAUNCH) hf_vla/train.py recipes/$(patsubst train-%,%,$@).json --output $(RUN) $(SETS)

plan doctor: install
	$(BIN)/hf-vla $@ $(RECIPE) $(SETS)

style: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

quality: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

test: install
	$(BIN)/pytest

test-slow: install
	$(BIN)/pytest -m slow

test-sim: install
	$(BIN)/pytest -m sim

test-gpu: install
	$(BIN)/pytest -m gpu

test-oldest:  # with the oldest releases that pyproject.toml allows
	test -x $(OLDEST)/bin/python || $(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/pip install --quiet --disable-pip-version-check uv
	$(OLDEST)/bin/uv pip install --quiet --python $(OLDEST)/bin/python --resolution lowest-direct --editable ".[dev]"
	$(OLDEST)/bin/pytest

clean:
	rm -rf .venv build *.egg-info .pytest_cache .ruff_cache
