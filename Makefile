# Two commands are enough: `make demo` trains the tiny model in a notebook run, `make lab` opens the
# lessons. The first one sets up .venv (about 10 GB, Python 3.11 or 3.12, no sudo); later ones start
# at once, and set up again only what has changed.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

# Some containers forbid Python to keep compiled modules; each start would compile torch anew (6 s).
unexport PYTHONDONTWRITEBYTECODE

PY := .venv/bin/python
UV := uv==0.13.9
# Rented GPU machines often have no other user than root, which Jupyter takes only when told so.
AS_ROOT := $(if $(filter 0,$(shell id -u)),--allow-root)
NOTEBOOK := notebooks/02_train_to_solve.ipynb

# One set-up serves every user of a machine: who may not write to it neither changes it nor sets it
# up again, and works with copies of the lessons in a folder of their own.
MINE := $(shell [ -w . ] && [ ! -e .venv -o -w .venv ] && echo yes)
READY := $(if $(MINE),.venv/.kit,others)
LESSONS := $(shell [ -w notebooks ] && echo notebooks || echo $(HOME)/kit-lessons/notebooks)

.PHONY: help demo lab others docs screenshots reference test test-all test-rest soak lint typecheck format lock clean clean-all

help:  ## List what can be made
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

demo: $(READY)  ## Train the tiny model from start to solved, as a notebook run
	@$(PY) -m kit run $(NOTEBOOK) --keep-warm 0

# Its settings in notebooks/.jupyter ask no questions about news; a browser of your own stays as it is.
lab: $(READY)  ## Open the lessons in JupyterLab, on this machine only (PORT=8890 BROWSER=none)
	@JUPYTER_CONFIG_PATH="$(CURDIR)/notebooks/.jupyter$${JUPYTER_CONFIG_PATH:+:$$JUPYTER_CONFIG_PATH}" \
		$(PY) -m jupyterlab --ip=127.0.0.1 $(if $(PORT),--port=$(PORT)) \
		$(if $(filter none,$(BROWSER)),--no-browser) --ServerApp.root_dir="$(LESSONS)" \
		--LabApp.default_url=/lab/tree/START.md $(AS_ROOT)

docs: .venv/.kit  ## Run all lessons and write their pages into docs/course (about ten minutes)
	@$(PY) docs/make_course.py

screenshots: .venv/.kit  ## Run the tiny model and take the pictures of docs/screenshots (needs chromium)
	@$(PY) docs/make_screenshots.py

reference: .venv/.kit  ## Write docs/settings.md and docs/api.md anew from descriptions and docstrings
	@$(PY) docs/make_reference.py

# Three at a time: sessions often wait. With one core each, their threads do not wait for each other.
PYTEST := KIT_CORES=1 OMP_NUM_THREADS=1 $(PY) -m pytest --numprocesses=3 --dist=loadfile --no-loadscope-reorder

# Beside others, on a machine that others use too, a test may wait longer than it allows for. What
# failed is run once more, alone, and has to pass there; both runs are shown.
AGAIN = || { [ $$? = 1 ] || exit 1; echo; echo "What failed is run once more, alone:"; \
	$(ALONE) --maxfail=5 --last-failed --last-failed-no-failures=none; }
ALONE := KIT_CORES=1 OMP_NUM_THREADS=1 $(PY) -m pytest

test: .venv/.kit  ## Run the tests, the real stack on the tiny model included
	@$(PYTEST) $(AGAIN)

test-all: .venv/.kit  ## Run every case of every test, several times as long
	@export KIT_TESTS=all; $(PYTEST) $(AGAIN)

test-rest: .venv/.kit  ## Run what `make test` leaves out, as far as MINUTES=20 allow
	@export KIT_TESTS=rest KIT_TESTS_MINUTES=$(or $(MINUTES),20); $(PYTEST) $(AGAIN)

soak: .venv/.kit  ## Half an hour of interrupts, kills and full disks at random (MINUTES=30)
	@$(PY) -m tests.faults.soak $(or $(MINUTES),30)

lint: .venv/.kit  ## Check style, formatting, and which room imports which
	@$(PY) -m ruff check
	@$(PY) -m ruff format --check
	@.venv/bin/lint-imports --no-cache --no-logo

typecheck: .venv/.kit  ## Check types
	@$(PY) -m mypy

format: .venv/.kit  ## Put the code into its format
	@$(PY) -m ruff format

lock: .venv/.kit  ## Write requirements.lock anew from pyproject.toml, keeping versions that still fit
	@$(PY) -m uv pip compile --quiet --universal --python-version 3.11 pyproject.toml --group dev \
		--no-emit-index-url --no-annotate --custom-compile-command "make lock" \
		--output-file requirements.lock
	@sed -i -E "s/python_full_version < '3\.13' and //; s/ and sys_platform == 'linux'//; \
		s/ and platform_machine == 'x86_64'|platform_machine == 'x86_64' and //; \
		s/ ; (python_full_version < '3\.13'|platform_machine == 'x86_64')$$//" requirements.lock

clean:  ## Remove caches; the environment and your runs stay
	@rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist
	@find kit tests notebooks \( -name __pycache__ -o -name .ipynb_checkpoints \) -prune \
		-exec rm -rf {} +

clean-all: clean  ## Remove the environment too; your runs stay
	@rm -rf .venv

others:
	@if [ ! -e .venv/.kit ]; then \
		echo "$(CURDIR) is not set up, and $$(id -un) may not write there."; \
		echo "What to do: have its owner run \`make demo\` once."; \
		exit 1; \
	fi
	@if ! $(PY) -c "import importlib.util as util; open(util.find_spec('torch').origin)" 2>/dev/null; then \
		echo "$$(id -un) may not read the packages in $(CURDIR)/.venv, or not run its Python."; \
		echo "What to do: have its owner set it up anew, readable for all and with a Python outside of a"; \
		echo "home folder: umask 022; make clean-all; make PYTHON=/usr/bin/python3 demo"; \
		exit 1; \
	fi
	@if [ ! -w notebooks ]; then \
		mkdir -p "$(HOME)/kit-lessons"; \
		tar --exclude=.ipynb_checkpoints --exclude=checkpoints -cf - config.yaml notebooks \
			| tar --skip-old-files --no-same-owner -C "$(HOME)/kit-lessons" -xf -; \
		echo "Your copies of the lessons are in $(LESSONS); what you have changed there stays."; \
	fi

# Set-up, in three steps that are each repeated only when needed.

.venv/.python:
	@for python in $(PYTHON) python3 python3.12 python3.11; do \
		if "$$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' \
			2>/dev/null; then found=$$python; break; fi; \
	done; \
	if [ -z "$${found:-}" ]; then \
		echo "Python 3.11 or 3.12 is needed, and none was found ($$(python3 --version 2>&1))."; \
		echo "What to do: install one, or name it: make PYTHON=/path/to/python3.12 $(MAKECMDGOALS)"; \
		exit 1; \
	fi; \
	echo "Setting up .venv with $$("$$found" --version)"; \
	if ! "$$found" -m venv .venv; then \
		rm -rf .venv; \
		echo "$$found cannot make virtual environments."; \
		echo "What to do: on Debian and Ubuntu, install its package python3-venv."; \
		exit 1; \
	fi
	@touch $@

.venv/.packages: requirements.lock .venv/.python
	@echo "Installing the packages of requirements.lock (about 10 GB the first time)"
	@$(PY) -m pip install --quiet --disable-pip-version-check $(UV)
	@$(PY) -m uv pip install --quiet --python $(PY) -r requirements.lock
	@touch $@

.venv/.kit: pyproject.toml .venv/.packages
	@echo "Installing the kit itself"
	@$(PY) -m uv pip install --quiet --python $(PY) --no-deps --editable .
	@echo "Compiling what every start imports (once, about half a minute)"
	@SGLANG_USE_CPU_ENGINE=1 CUDA_VISIBLE_DEVICES= PYTHONPATH=kit/engine/cpu/site $(PY) -W ignore -c \
		"from kit.cluster import fork_server; fork_server.preload(); import ray" >/dev/null 2>&1 || true
	@touch $@
