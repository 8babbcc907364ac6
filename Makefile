# Each target makes and fills .venv in the repository when it is missing or older than pyproject.toml.
# Variables: PYTHON (3.11 or newer), PIP_ARGS (for pip install, e.g. an index), PYTEST_ARGS.
PYTHON ?= python3
PIP_ARGS ?=
PYTEST_ARGS ?=
VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check

export PYTHONPATH := $(CURDIR)
export OMP_NUM_THREADS ?= 1

.PHONY: demo test test-full lint bench sanitize
.DELETE_ON_ERROR:

demo: $(VENV)/.run-stamp
	@$(PY) launch.py generate --config configs/tiny_cpu_cp2.yaml \
	  --set model.path=assets/tiny-python --set speculative.mtp=1 --chat --max-tokens 128 \
	  --prompt 'Write a Python function `add_numbers`: Return the sum of two numbers.'

test: lint
	$(PY) -m pytest -m "not full and not gpu" $(PYTEST_ARGS)

test-full: lint
	$(PY) -m pytest -m "not gpu" $(PYTEST_ARGS)

lint: $(VENV)/.test-stamp
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

bench: $(VENV)/.test-stamp
	$(PY) -m pytest tests/kernels --run-benchmark -m benchmark $(PYTEST_ARGS)

# On a GPU machine: compute-sanitizer over all CUDA C++ kernels.
sanitize: $(VENV)/.test-stamp
	$(PY) tests/sanitize.py

$(PY):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11 ..." >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)

# A machine without a GPU takes torch's CPU build where pip can see one: no CUDA libraries.
$(VENV)/.torch-stamp: pyproject.toml | $(PY)
	@if command -v nvidia-smi >/dev/null 2>&1; then \
	  $(PIP) install -qq $(PIP_ARGS) "torch>=2.11,<2.14"; \
	else \
	  $(PIP) install -qq $(PIP_ARGS) "torch==2.13.0+cpu" 2>/dev/null || { \
	    echo "no CPU build of torch in pip's index: installing the default build" >&2; \
	    $(PIP) install -qq $(PIP_ARGS) "torch>=2.11,<2.14"; }; \
	fi
	@touch $@

# The four packages are found by PYTHONPATH; only what they need is installed.
define install
$(PY) -c "import tomllib; p = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
print(*p['dependencies'], *(r for e in '$(1)'.split() for r in p['optional-dependencies'][e]), sep='\n')" \
  > $(VENV)/requirements.txt
$(PIP) install -qq $(PIP_ARGS) -r $(VENV)/requirements.txt
endef

$(VENV)/.run-stamp: $(VENV)/.torch-stamp
	@echo "installing packages into $(VENV)" >&2
	@$(call install,plot)
	@touch $@

$(VENV)/.test-stamp: $(VENV)/.run-stamp
	@$(call install,plot test)
	@touch $@
