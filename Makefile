# Everything a developer does, one word each; `make help` lists them.
# The environment is made and filled once, and again when pyproject.toml or constraints.txt change.

PYTHON ?= python3
VENV ?= .venv
JOBS ?= auto
# Further arguments for pytest, e.g.  make test PYTEST_ARGS="-k schedules"
PYTEST_ARGS ?=

export PIP_DISABLE_PIP_VERSION_CHECK = 1

PY := $(VENV)/bin/python
INSTALL := $(PY) -m pip install -c constraints.txt
INSTALLED := $(VENV)/.installed
PYTEST := $(PY) -m pytest -n $(JOBS) --maxprocesses 4
QUICK := not slow and not gpu

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test test-slow typecheck-runtime lint format types docs wheel bench clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-18s %s\n", $$1, $$2}' Makefile

demo: $(INSTALLED) ## learn the paper's mixture from its energy alone; the figure goes to out/
	@mkdir -p out
	$(PY) examples/demo.py

test: $(INSTALLED)-test ## quick tests and docstring examples
	$(PYTEST) -m "$(QUICK)" $(PYTEST_ARGS)

test-slow: $(INSTALLED)-test ## the tests that the quick suite leaves out
	$(PYTEST) -m "slow and not gpu" $(PYTEST_ARGS)

typecheck-runtime: $(INSTALLED)-test ## tests with every annotated shape checked at run time
	$(PYTEST) tests --check-types -m "$(QUICK) and not bad_input and not numbers" $(PYTEST_ARGS)

lint: $(INSTALLED)-dev ## ruff: rules and format
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

format: $(INSTALLED)-dev ## let ruff mend what it can
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

types: $(INSTALLED)-dev ## mypy
	$(PY) -m mypy

docs: $(INSTALLED)-dev ## HTML pages in docs/_build/html; warnings are errors
	rm -rf docs/generated docs/_build
	$(PY) -m sphinx -W --keep-going -q -b html docs docs/_build/html
	@echo "docs/_build/html/index.html"

# The fresh environment borrows the dependencies of $(VENV) through a .pth file. It does not see
# the development install there, because .pth files in a borrowed folder are not read.
wheel: $(INSTALLED)-dev ## build the wheel, install it elsewhere, import it there
	@set -eu; elsewhere=$$(mktemp -d); trap 'rm -rf "$$elsewhere"' EXIT; \
	$(PY) -m build --wheel --no-isolation --outdir "$$elsewhere" .; \
	$(PY) -m venv "$$elsewhere/venv"; \
	"$$elsewhere/venv/bin/python" -m pip install -q --no-index --no-deps "$$elsewhere"/*.whl; \
	site='import sysconfig; print(sysconfig.get_path("purelib"))'; \
	$(PY) -c "$$site" > "$$("$$elsewhere/venv/bin/python" -c "$$site")/borrowed.pth"; \
	cd "$$elsewhere"; \
	venv/bin/python -I -W error -c 'import pathlib, sys; import rsm_sampler, energies; \
		from rsm_sampler import rl; rooms = [rsm_sampler, energies, rl]; \
		folders = [pathlib.Path(room.__file__).parent for room in rooms]; \
		assert all(folder.is_relative_to(sys.prefix) for folder in folders), folders; \
		assert all((folder / "py.typed").is_file() for folder in folders), folders; \
		print("imported from the wheel:", rsm_sampler.__version__, *map(str, folders))'; \
	venv/bin/rsm-sampler --help > help.txt; \
	echo "rsm-sampler --help: $$(wc -l < help.txt) lines"

bench: $(INSTALLED) ## the table of the core benchmarks (long)
	$(PY) examples/benchmarks/core.py

clean: ## remove what the targets above make, except the environment
	rm -rf build dist out docs/_build docs/generated
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find rsm_sampler energies rl tests examples docs -name __pycache__ -type d -prune -exec rm -rf {} +

# An environment whose making was interrupted has no pip, and is made anew.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PY) -m pip --version >/dev/null 2>&1 || { \
		command -v $(PYTHON) >/dev/null || { \
			echo "There is no '$(PYTHON)' here. Install Python 3.11 or newer, or name it:" \
				"make PYTHON=/path/to/python3" >&2; exit 1; }; \
		$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
			echo "Python 3.11 or newer is needed, but '$(PYTHON)' is $$($(PYTHON) --version 2>&1)." \
				"Name a newer one: make PYTHON=python3.12" >&2; exit 1; }; \
		$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
			echo "'$(PYTHON)' lacks the modules venv and ensurepip. On Debian and Ubuntu:" \
				"apt install python3-venv" >&2; exit 1; }; \
		echo "making $(VENV)"; \
		$(PYTHON) -m venv --clear $(VENV); }
	$(INSTALL) -e .
	@touch $@

$(INSTALLED)-test: $(INSTALLED)
	$(INSTALL) -q -e '.[test]'
	@touch $@

$(INSTALLED)-dev: $(INSTALLED)-test
	$(INSTALL) -q -e '.[dev]'
	@touch $@
