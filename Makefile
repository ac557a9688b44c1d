# make demo     the error study on real activations (a few minutes; on the card if there is one)
# make test     everything that can be tested on this machine
# make lint     formatters and checkers, without changing a file
# make format   formats
# make readme   the measured figures in README.md and docs/, and the pictures, from stored results
# make clean    removes builds and .venv
#
# PYTHON=python3.12        another Python (3.10 to 3.13) for .venv
# INSTANCES='bf16_d128_.*' compiles only the kernels with these names (make test)
# STUDY=...                arguments for `hopper-attention study` (make demo)
PYTHON ?= python3
INSTANCES ?= .*
STUDY ?=

VENV := $(CURDIR)/.venv
BIN := $(VENV)/bin
SETUP := $(PYTHON) tools/setup_venv.py --venv $(VENV)
# Empty without a Hopper card.
CARD = $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | grep -Fx 9.0)
# The installed library, empty without kernels.
LIBRARY = $(wildcard $(VENV)/lib/python3*/site-packages/hopper_attention/libhopper_attention.so)
CXX_FILES = $(shell find include hopper python tests tools \
  \( -name '*.h' -o -name '*.cuh' -o -name '*.cu' -o -name '*.cpp' \) 2>/dev/null | sort)

.NOTPARALLEL:
.PHONY: demo test test-host test-python test-gpu install-test lint-tools lint format readme clean

demo:
	$(SETUP) --extras demo --kernels card
	$(BIN)/hopper-attention study $(STUDY)

test: install-test
	$(MAKE) --no-print-directory test-host test-python test-gpu

install-test:
	$(SETUP) --extras demo,test --kernels auto --instances '$(INSTANCES)'

# cmake and ninja may be .venv's.
test-host: export PATH := $(BIN):$(PATH)
test-host:
	cmake -S . -B build/host -G Ninja -DHOPPER_ATTENTION_KERNELS=OFF -DHOPPER_ATTENTION_PYTHON=OFF \
	  -DHOPPER_ATTENTION_TESTS=ON -DHOPPER_ATTENTION_LIBRARY=$(LIBRARY)
	cmake --build build/host
	ctest --test-dir build/host --output-on-failure

test-python:
	$(BIN)/pytest tests/python

test-gpu:
	$(if $(CARD),OMP_NUM_THREADS=2 $(BIN)/pytest tests/gpu -n auto --maxprocesses 8,@echo "No Hopper card: tests/gpu not run.")

# mypy follows PyTorch's types, so the project's requirements must be there too.
lint-tools:
	@[ -x $(VENV)/bin/hopper-attention ] || $(SETUP) --extras demo,test --kernels off
	@$(SETUP) --only lint

lint: lint-tools
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)

format: lint-tools
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

readme: lint-tools
	$(BIN)/python tools/readme_tables.py

clean:
	rm -rf build dist .venv .mypy_cache .pytest_cache .ruff_cache .hypothesis
