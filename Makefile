# make test    make bench    make experiments    make docs    make lint    make wheel    make wheels    make sdist    make clean
# Everything runs in an environment of its own, VENV, made with PYTHON on the first call.

PYTHON ?= python3
VENV ?= .venv
BENCH_PROFILE ?= quick
PYTEST_ARGS ?=
TEST_PROCESSES ?= 2
DIST ?= dist
bin := $(VENV)/bin
sources := $(shell find csrc -type f) CMakeLists.txt setup.py pyproject.toml $(wildcard pydeq/ops/*.py)
formatted := $(shell find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

.PHONY: test bench experiments docs lint format wheel wheels check-wheels sdist clean
.DELETE_ON_ERROR:

test: $(VENV)/test.installed $(VENV)/pydeq.installed
	PYDEQ_REQUIRE_KERNELS=1 $(bin)/python -m pytest --numprocesses $(TEST_PROCESSES) --dist loadfile $(PYTEST_ARGS)

bench: $(VENV)/bench.installed $(VENV)/pydeq.installed
	PYDEQ_REQUIRE_KERNELS=1 $(bin)/python -m benchmarks --profile $(BENCH_PROFILE)

# The environment of python -m experiments.
experiments: $(VENV)/experiments.installed $(VENV)/pydeq.installed

# The site, in build/site. The variable silences a notice about the theme's successor.
docs: $(VENV)/docs.installed
	NO_MKDOCS_2_WARNING=1 $(bin)/python -m mkdocs build --strict

lint: $(VENV)/lint.installed $(VENV)/bench.installed
	$(bin)/ruff check .
	$(bin)/ruff format --check .
	$(bin)/pyright --pythonpath $(bin)/python
	$(bin)/clang-format --dry-run --Werror $(formatted)

format: $(VENV)/lint.installed
	$(bin)/ruff check --fix .
	$(bin)/ruff format .
	$(bin)/clang-format -i $(formatted)

wheel: $(VENV)/build.installed
	$(bin)/python -m build --wheel --no-isolation

# A wheel that PyPI takes, for this Python: it runs on every Linux from glibc 2.28 on. torch's libraries stay torch's.
wheels: $(VENV)/wheels.installed
	rm -rf build/linked
	PYDEQ_MANYLINUX=1 PYDEQ_REQUIRE_KERNELS=1 $(bin)/python -m build --wheel --no-isolation --outdir build/linked
	PATH="$(abspath $(bin)):$$PATH" $(bin)/auditwheel repair --plat manylinux_2_28_$$(uname -m) --only-plat \
	  --exclude 'libtorch*.so' --exclude 'libc10*.so' --wheel-dir $(DIST) build/linked/*.whl
	$(MAKE) check-wheels

# Also that they use only what is stable of torch; torch-abi-audit reads folders, not wheels.
check-wheels: $(VENV)/wheels.installed
	$(bin)/twine check --strict $(DIST)/*
	rm -rf build/unpacked
	for wheel in $(DIST)/*.whl; do \
	  folder="build/unpacked/$$(basename "$$wheel" .whl)"; \
	  $(bin)/python -m zipfile --extract "$$wheel" "$$folder" || exit 1; \
	  $(bin)/torch-abi-audit --check torch "$$folder/pydeq" || exit 1; \
	done

sdist: $(VENV)/build.installed
	$(bin)/python -m build --sdist --no-isolation --outdir $(DIST)

clean:
	rm -rf build dist *.egg-info pydeq/*.so pydeq/no_kernels.txt $(VENV)

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# One set of requirements each; the files include each other, so any change installs anew what has changed.
$(VENV)/%.installed: requirements/%.txt $(wildcard requirements/*.txt) | $(VENV)/bin/python
	$(bin)/python -m pip install --requirement $<
	touch $@

# Python files need no reinstall: the package is imported from this folder.
$(VENV)/pydeq.installed: $(sources) $(VENV)/build.installed
	PYDEQ_REQUIRE_KERNELS=1 $(bin)/python -m pip install --no-build-isolation --no-deps --editable .
	touch $@
