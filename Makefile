# make setup    creates .venv and installs the pinned versions into it (some minutes)
# make test     runs the tests with coverage; creates .venv when it is missing
# make test-stock   runs the tests of commands, tasks and whole runs under stock fairseq 0.12.2 and Python 3.10, in .venv-stock
# make kill-tests   kills training, sampling, perplexity and tuning 20 times each (KILLS) at random moments and starts them again
# make fuzz     tries 16,000 damaged files (INPUTS) on everything that reads one
# make soak DATA=data-bin/FOLDER   trains E-ARM for two hours (MINUTES) and watches its memory, files and threads
# make demo     runs the synthetic demonstration of E-ARM; creates .venv when it is missing
# make demo-residual   the same for residual energy-based models
# make clean    removes .venv, .venv-stock and everything built
#
# PYTHON_STOCK=/path/to/python3.10 make test-stock   names its interpreter (3.9 will do).
# PYTHON=python3.10 make setup   chooses the interpreter: 3.11 and 3.12 get the fork of fairseq's last main,
#                                3.9 and 3.10 stock fairseq 0.12.2. Default: the first supported one found.
# pip's own variables choose the build of torch, for example
#   PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make setup

JOBS ?= 2
PYTHON_STOCK ?= python3.10
STOCK_TESTS ?= $(wildcard tests/test_*.py) tests/tasks tests/cli
KILLS ?= 20
INPUTS ?= 16000
MINUTES ?= 120
BIN := .venv/bin

.PHONY: help setup test test-stock kill-tests fuzz soak demo demo-residual clean

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

setup:
	@./install.sh $(PYTHON)

.venv/installed: install.sh setup.py constraints.txt constraints-stock.txt
	@./install.sh $(PYTHON)

# One thread each: the tests are small, and JOBS of them run side by side.
test: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --cov --cov-report=term --cov-fail-under=95 $(ARGS)

.venv-stock/installed: install.sh setup.py constraints-stock.txt
	@VENV=.venv-stock ./install.sh $(PYTHON_STOCK)

# Coverage is measured by `make test`.
test-stock: .venv-stock/installed
	OMP_NUM_THREADS=1 .venv-stock/bin/python -m pytest -q -n $(JOBS) -p no:cacheprovider $(STOCK_TESTS) $(ARGS)

kill-tests: .venv/installed
	OMP_NUM_THREADS=1 FAIRSEQ_EARM_KILLS=$(KILLS) $(BIN)/python -m pytest -q -s tests/faults/test_kills.py

fuzz: .venv/installed
	OMP_NUM_THREADS=1 FAIRSEQ_EARM_FUZZ=$(INPUTS) $(BIN)/python -m pytest -s tests/test_hostile_input.py tests/test_energy_settings.py

# Of two languages, binarised; what was measured goes to outputs/soak, which must not exist.
soak: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python tests/faults/soak.py run "$(DATA)" outputs/soak --minutes $(MINUTES)
	$(BIN)/python tests/faults/soak.py report outputs/soak

demo: .venv/installed
	$(BIN)/python examples/synthetic/demo.py

demo-residual: .venv/installed
	$(BIN)/python examples/residual_ebm/synthetic/residual_demo.py

clean:
	rm -rf .venv .venv-stock build dist *.egg-info .pytest_cache .hypothesis .coverage .coverage.*
