# make demo       train, export, run without torch, benchmark, on real handwritten digits
# make test       the test suite
# make test-cuda  the tests of the runtime, of benchmarks and of imported models on onnxruntime's CUDA provider, without a GPU
# make lint       ruff and mypy
# Each does its own set-up in .venv and may be run again.

PYTHON ?= python3
DEMO := demo

.PHONY: demo test test-cuda lint clean

demo: .venv/installed .venv-edge/installed
	mkdir -p $(DEMO)
	.venv/bin/vae-train --data digits --output $(DEMO)/digits --seed 0 --force
	.venv/bin/vae-export $(DEMO)/digits/model.pt --output $(DEMO)/digits.vae --force
	.venv-edge/bin/python -c "import importlib.util as u; assert not u.find_spec('torch'); print('from here on: an environment without torch')"
	.venv-edge/bin/vae-run selftest $(DEMO)/digits.vae
	.venv-edge/bin/vae-run reconstruct $(DEMO)/digits.vae --golden --output $(DEMO)/reconstructions.png --force
	.venv-edge/bin/vae-run sample $(DEMO)/digits.vae --seed 0 --output $(DEMO)/samples.png --force
	.venv-edge/bin/vae-bench $(DEMO)/digits.vae --batch 1,32 --threads 1

# Two processes with one thread each: as fast as one with two, and steadier. Byte code is written, or each of the many
# processes that tests start would compile the packages anew.
test: .venv/installed
	PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# A GPU may be slow or quick: work is done as late as it may be, then at once.
STAND_IN := $(CURDIR)/.cuda-stand-in
ON_STAND_IN = LD_LIBRARY_PATH=$(STAND_IN)/lib PYTHONPATH=$(STAND_IN)/engine VAE_TEST_GPU=1 OMP_NUM_THREADS=1 \
    .venv/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder
test-cuda: .venv/installed
	.venv/bin/python tests/cuda_stand_in/build.py $(STAND_IN)
	$(ON_STAND_IN) tests/runtime tests/benchmarks tests/export/importers/test_on_a_gpu.py
	CUDA_STAND_IN_EARLY=1 $(ON_STAND_IN) tests/runtime/test_cuda.py tests/runtime/test_cuda_stream.py tests/runtime/test_trial.py

lint: .venv/installed
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/mypy --platform darwin --cache-dir .mypy_cache/darwin runtime
	.venv/bin/mypy --platform win32 --cache-dir .mypy_cache/win32 runtime

.venv/installed: pyproject.toml install.py
	$(PYTHON) install.py .venv --extras cpu,openvino,images,train,tensorboard,export,diffusers,pythae,bench,race,dev
	touch $@

.venv-edge/installed: pyproject.toml install.py
	$(PYTHON) install.py .venv-edge --extras cpu,images,bench
	touch $@

clean:
	rm -rf .venv .venv-edge .cuda-stand-in $(DEMO) dist
