# make demo, make test, make bench, make lint: each sets up .venv first if it has to.
# VENV=path uses another environment as it is (nothing is installed there besides this package).

PYTHON ?= python3
ifneq ($(filter command% environment%,$(origin VENV)),)
OWN_VENV := $(if $(wildcard $(VENV)/bin/python),no,yes)
else
VENV := .venv
OWN_VENV := yes
endif
PY := $(VENV)/bin/python
SOURCES := setup.py pyproject.toml csrc/module.cpp $(filter-out %.cu %.cuh,$(wildcard csrc/*/*))
CUDA_SOURCES := csrc/build_cuda.py $(wildcard csrc/*.* csrc/*/*.h csrc/*/cuda_*)
CXX ?= g++
SANITIZE := -std=c++17 -O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all -U_FORTIFY_SOURCE

.PHONY: demo test bench bench-compiled gpu lint format sanitize fuzz clean
.DEFAULT_GOAL := test

$(VENV)/.ready: requirements/full.txt
ifeq ($(OWN_VENV),yes)
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet -r requirements/full.txt
endif
	touch $@

# The package, editable, with its part for CPUs.
$(VENV)/.built: $(VENV)/.ready $(SOURCES)
	POSMLP_SKIP_CUDA=1 $(PY) -m pip install --quiet --no-build-isolation --no-deps -e .
	touch $@

# Its part for GPUs, where there is nvcc: it takes minutes, and only tests and GPUs need it.
$(VENV)/.cuda: $(VENV)/.built $(CUDA_SOURCES)
	$(PY) csrc/build_cuda.py posmlp_kernels/_C_cuda.abi3.so
	touch $@

demo: $(VENV)/.built  ## train on real digits, evaluate, draw
	$(PY) -m posmlp demo

test: lint $(VENV)/.cuda  ## everything that CI runs
	$(PY) -m pytest

lint: $(VENV)/.ready
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

format: $(VENV)/.ready
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

BF16 := --dtype bfloat16 --case "stage 1" "stage 2" "stage 3" "stage 4" --no-compile --no-sweeps

bench: $(VENV)/.built  ## measure on this machine, in less than ten minutes
	$(PY) -m benchmarks.bench_pos_gate --out benchmarks/results/cpu.json
	$(PY) -m benchmarks.bench_pos_gate $(BF16) --out benchmarks/results/cpu_bf16.json
	$(PY) -m benchmarks.bench_models --no-compile --out benchmarks/results/cpu_models.json
	$(PY) -m benchmarks.report

# Whole models take torch.compile minutes each the first time.
RIVALS := posmlp_tiny convnext_tiny swin_tiny_patch4_window7_224

bench-compiled: $(VENV)/.built  ## PosMLP-T and its rivals again, each also by torch.compile, which takes longer
	$(PY) -m benchmarks.bench_models --models $(RIVALS) --out benchmarks/results/cpu_compiled.json
	$(PY) -m benchmarks.report

# Takes an environment with torch, Triton and pytest as it is, and builds there: GPU machines come with theirs.
gpu:  ## build, test, sanitize and measure on this machine's GPU, in ten minutes; GPU="--only test" and the like
	$(or $(wildcard $(PY)),$(PYTHON)) benchmarks/gpu.py $(GPU)

sanitize:  ## the C++ kernels, and the CUDA ones on an emulated device, under AddressSanitizer and UndefinedBehaviorSanitizer
	mkdir -p build/sanitize
	$(CXX) $(SANITIZE) -pthread -DPOSMLP_AMX_EMULATED -Icsrc/pos_gate -Itests/csrc tests/csrc/test_kernels.cpp $(filter-out %cpu_ops.cpp,$(wildcard csrc/pos_gate/cpu_*.cpp)) -o build/sanitize/test_kernels
	build/sanitize/test_kernels
	$(CXX) $(SANITIZE) -Icsrc/pos_gate -Itests/csrc tests/csrc/test_emulator.cpp -o build/sanitize/test_emulator
	build/sanitize/test_emulator
	$(CXX) $(SANITIZE) -Icsrc/pos_gate -Itests/csrc tests/csrc/test_cuda.cpp -o build/sanitize/test_cuda
	build/sanitize/test_cuda 0 30
	$(CXX) $(SANITIZE) -Icsrc/pos_gate -Itests/csrc tests/csrc/test_cuda_tensor.cpp -o build/sanitize/test_cuda_tensor
	build/sanitize/test_cuda_tensor 15
	$(CXX) $(SANITIZE) -Icsrc/pos_gate -Itests/csrc tests/csrc/test_cuda_rebuild.cpp -o build/sanitize/test_cuda_rebuild
	build/sanitize/test_cuda_rebuild

FUZZ_SEED ?= $(shell date +%Y%m%d)
FUZZ_SECONDS ?= 240

fuzz: $(VENV)/.built sanitize  ## random problems for five minutes, a minute of them under the sanitizers
	$(PY) tests/kernels/fuzz.py --seed $(FUZZ_SEED) --seconds $(FUZZ_SECONDS)
	build/sanitize/test_kernels $(FUZZ_SEED) 60

clean:
	rm -rf build dist *.egg-info posmlp_kernels/*.so .venv .venv-*
