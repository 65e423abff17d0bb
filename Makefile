# Everything runs in .venv, which the first target makes. It is made with $(PYTHON); where that
# interpreter already has a torch >= 2.10, .venv uses that torch, otherwise it gets $(TORCH).
PYTHON ?= python3
TORCH ?= torch==2.13.0
DATA ?=
ARGS ?=
BASE ?=
# The oldest that pyproject.toml accepts.
OLDEST_TRITON := triton==3.5.0

BIN := .venv/bin
PY := $(BIN)/python
CSRC := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' 2>/dev/null)
CXX_FILES = $(shell find csrc tests benchmarks -name '*.cpp' -o -name '*.h' -o -name '*.cu' 2>/dev/null)
FIND_TORCH := from importlib import metadata, util; \
  assert tuple(map(int, metadata.version("torch").split(".")[:2])) >= (2, 10); \
  print(util.find_spec("torch").origin.rsplit("/torch/", 1)[0])

.DEFAULT_GOAL := help
.PHONY: help train test mutation bench bench-compare bench-gru bench-linear bench-attention bench-gpt bench-models convergence triton-check cuda-check peers build lint format abi-check clean torch-requirement triton-sanitize test-gpu bench-gpu

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-15s %s\n", $$1, $$2 }' Makefile
	@echo "Variables: PYTHON=python3.12 (makes .venv), TORCH='torch==2.13.0 --index-url URL', ARGS='...' (added to the command)"

train: .venv/built .venv/installed  ## train a GRU language model on real text (DATA=notes.txt: on your own)
	$(BIN)/genkernels train rnn $(if $(DATA),--data "$(DATA)") $(ARGS)

# A process for each core, whose two threads sleep where they would spin: the core is another process's.
PYTEST := OMP_NUM_THREADS=2 OMP_WAIT_POLICY=passive $(PY) -m pytest -n auto --maxprocesses 8

test: .venv/built .venv/installed  ## run the test suite (ARGS='-k gru')
	$(PYTEST) --dist loadfile --no-loadscope-reorder --ignore tests/test_mutation.py $(ARGS)

triton-check: .venv/built .venv/installed  ## the GPU kernels without a GPU: interpreted, sanitized, and compiled for four architectures
	TRITON_INTERPRET=1 $(PYTEST) tests/test_triton_*.py $(ARGS)
	TRITON_INTERPRET=1 $(PY) -m benchmarks.triton_sanitize
	for table in triton_table:triton triton_roofline:triton_roofline; do \
	  $(PY) -m benchmarks.$${table%:*} > .venv/compiled.md && \
	  grep '^|' benchmarks/$${table#*:}.md | tail -n +3 | diff - .venv/compiled.md || exit 1; \
	done
	test -d .venv/oldest/triton || $(PY) -m pip install --quiet --no-deps --target .venv/oldest $(OLDEST_TRITON)
	PYTHONPATH=.venv/oldest $(PY) -m benchmarks.triton_table --only sm_90 --compiles > .venv/compiled.md

cuda-check: .venv/dependencies  ## the CUDA kernels compiled for three architectures, without a GPU (needs nvcc)
	$(PY) -m benchmarks.cuda_table $(ARGS)

triton-sanitize: .venv/built .venv/installed  ## each access of the GPU kernels, without a GPU: out of bounds, races (ARGS='--only gru')
	TRITON_INTERPRET=1 $(PY) -m benchmarks.triton_sanitize $(ARGS)

test-gpu: .venv/built .venv/installed  ## the tests that need a GPU (ARGS='--report gpu_tests.json')
	$(PY) -m pytest -m gpu $(ARGS)

mutation: .venv/built .venv/installed  ## break the kernels line by line and see the tests fail (eleven builds)
	$(PY) -m pytest tests/test_mutation.py $(ARGS)

bench: .venv/built .venv/installed  ## run the benchmarks and print the table
	$(PY) -m pytest benchmarks $(ARGS)

bench-compare: .venv/built .venv/installed  ## compare this tree with another revision (BASE=main)
	$(PY) -m benchmarks.compare --base "$(BASE)" $(ARGS)

# Idle threads stop spinning after a few milliseconds, so that they do not take the cores from the contestant whose turn
# it is. Asleep within a call they would be timed waking up: between a forward and a backward pass 100 us can go by.
bench-gru: .venv/built .venv/installed  ## the GRU beside its peers and its bars (make peers; ARGS='--only B=16')
	GOMP_SPINCOUNT=100000 $(PY) -m benchmarks.bars $(ARGS)

bench-linear: .venv/built .venv/installed  ## linear and linear_cross_entropy beside PyTorch's and their bars
	GOMP_SPINCOUNT=100000 $(PY) -m benchmarks.linear_bars $(ARGS)

bench-attention: .venv/built .venv/installed  ## attention beside its peers and its bars (make peers)
	GOMP_SPINCOUNT=100000 $(PY) -m benchmarks.attention_bars $(ARGS)

bench-gpt: .venv/built .venv/installed  ## a GPT's training step and generation beside PyTorch's, and their bars
	GOMP_SPINCOUNT=100000 $(PY) -m benchmarks.gpt_bars $(ARGS)

bench-gpu: .venv/built .venv/installed  ## the Triton kernels on a GPU beside FlashAttention, cuDNN and torch.compile
	$(PY) -m benchmarks.gpu $(ARGS)

bench-models: .venv/built .venv/installed  ## a whole training step beside PyTorch's and Keras's (make peers; ARGS='--model gan')
	GOMP_SPINCOUNT=100000 $(PY) -m benchmarks.models $(ARGS)

convergence: .venv/built .venv/installed  ## train on real text with genkernels and in plain PyTorch, and compare (ARGS='--model gpt')
	$(PY) -m benchmarks.convergence $(ARGS)

peers: .venv-peers/installed  ## install the libraries that ops are compared with, into .venv-peers

build: .venv/built .venv/installed  ## build the extension into the source tree; quick after an edit in csrc

lint: .venv/dependencies  ## ruff, mypy, clang-format; changes nothing
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)

format: .venv/dependencies  ## let ruff and clang-format rewrite the files
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(CXX_FILES)

abi-check: .venv/dependencies  ## one wheel, run beside torch 2.10.0 and the newest torch (downloads gigabytes)
	$(PY) tools/abi_check.py $(ARGS)

clean:  ## remove what was built; .venv and .venv-peers stay
	rm -rf build dist *.egg-info genkernels/*.so .venv/built .venv/installed

.venv/dependencies: requirements-dev.txt $(if $(filter command line,$(origin TORCH)),torch-requirement)
	@test -x $(PY) || $(PYTHON) -m venv .venv
	@if torch="$$($(PYTHON) -c '$(FIND_TORCH)' 2>/dev/null)"; then \
	  echo "Using the torch in $$torch"; \
	  echo "$$torch" > "$$($(PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/existing_torch.pth"; \
	fi
	$(PY) -m pip install -r requirements-dev.txt
	@$(if $(filter command line,$(origin TORCH)),false,$(PY) -c '$(FIND_TORCH)' >/dev/null 2>&1) || { \
	  echo "Installing $(TORCH)"; $(PY) -m pip install $(TORCH); \
	}
	@touch $@

.venv/built: .venv/dependencies setup.py build_backend.py CMakeLists.txt $(CSRC)
	$(PY) setup.py --quiet build_ext --inplace
	@touch $@

.venv-peers/installed: requirements-peers.txt
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/python -m pip install -r requirements-peers.txt
	@touch $@

# After the build, which pip would run without showing its progress.
.venv/installed: pyproject.toml setup.py build_backend.py | .venv/built
	$(PY) -m pip install --no-build-isolation -e .
	@touch $@
