# Everything from a bare checkout with Python 3.11+: each target makes what it needs, once.
#   make demo            the whole way on real usage, ends with invoices and a reconciliation
#   make test            all tests, on a real Kafka and PostgreSQL (make test ARGS="-k rater" for some)
#   make bench           figures as JSON lines (make bench ONLY="rater sink" for some)
#   make chaos           faults by a seeded plan under load, then every event checked (MINUTES=30 EVENTS= SEED=)
#   make simulation      histories of rater and sink with a crash point between any two steps (EXAMPLES= SEED=)
#   make fuzz            damaged messages through the whole way (MESSAGES=1000000 SEED=)
#   make lint            ruff and mypy
#   make lock            resolve pyproject.toml anew into requirements*.txt
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet

.PHONY: demo test bench chaos simulation fuzz lint format lock clean

demo: $(VENV)/.runtime
	$(BIN)/tally demo $(ARGS)

# Two processes, each with services of its own: most of the time is waiting. Files go in order, the long ones first.
test: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

bench: $(VENV)/.dev
	@$(BIN)/python -m tests.bench $(ONLY)

chaos: $(VENV)/.dev
	@$(BIN)/python -m tests.chaos

simulation: $(VENV)/.dev
	@$(if $(EXAMPLES),TALLY_SIM_EXAMPLES=$(EXAMPLES)) $(if $(SEED),TALLY_SIM_SEED=$(SEED)) $(BIN)/python -m tests.simulation

fuzz: $(VENV)/.dev
	@$(BIN)/python -m tests.fuzz

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Without --upgrade only what pyproject.toml asks for moves: make lock UPGRADE=--upgrade for the newest of everything.
COMPILE = CUSTOM_COMPILE_COMMAND="make lock" $(BIN)/pip-compile --quiet --generate-hashes --allow-unsafe --strip-extras \
	--no-emit-index-url --no-emit-find-links --no-emit-trusted-host --build-deps-for editable $(UPGRADE)
lock: $(VENV)/.dev
	$(COMPILE) --extra embedded --output-file requirements.txt pyproject.toml
	$(COMPILE) --extra embedded --extra dev --constraint requirements.txt --output-file requirements-dev.txt pyproject.toml

clean:
	rm -rf pipeline/*/fastpath.*.so $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist *.egg-info

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Tally needs Python 3.11 or newer, %s is %s: make PYTHON=python3.12" % (sys.executable, sys.version.split()[0]))'
	$(PYTHON) -m venv $(VENV)

# What makes a new installation needed; the fast paths are compiled there.
BUILT_FROM := pyproject.toml hatch_build.py pipeline/rating/fastpath.pyx pipeline/billing/fastpath.pyx

# The package itself is installed without isolation and dependencies: the lock holds its build backend too.
$(VENV)/.runtime: requirements.txt $(BUILT_FROM) | $(VENV)/bin/python
	$(PIP) --require-hashes -r requirements.txt
	$(PIP) --no-deps --no-build-isolation -e .
	@touch $@

$(VENV)/.dev: requirements-dev.txt $(BUILT_FROM) | $(VENV)/bin/python
	$(PIP) --require-hashes -r requirements-dev.txt
	$(PIP) --no-deps --no-build-isolation -e .
	@touch $@ $(VENV)/.runtime
