# Two commands matter: `make run` and `make test`. Each sets everything up by itself.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

# The unit tests and the lessons in fast mode: one thread a process, and as many processes as cores.
TEST_ENV := OMP_NUM_THREADS=1 DDPM_OUTPUT_DIR="$(CURDIR)/outputs/test" DDPM_CHECKPOINT_DIR="$(CURDIR)/outputs/test/checkpoints"
COPIES := outputs/test/lessons

# Waiting threads of OpenMP sleep soon instead of spinning on: beside other busy programs a lesson is then several times faster.
ifndef OMP_WAIT_POLICY
export GOMP_SPINCOUNT ?= 200
endif

# Values that people give reach the shell as text: no part of them is run.
override REPO := $(value REPO)
override LESSON := $(value LESSON)
export REPO LESSON

.PHONY: help run quick script lab test test-all render pretrained doctor address clean

help:
	@echo "make run [LESSON=03]   set up, then run lessons 00-05 (or one) on this machine; results in outputs/"
	@echo "make quick             set up, then run lesson 00 alone: the whole method in a few minutes"
	@echo "make run ALL=1         the same for the whole series"
	@echo "make lab               set up, then open JupyterLab"
	@echo "make test              set up, then lint, unit tests and every lesson in fast mode"
	@echo "make test-all          the same and the slow tests"
	@echo "make render [LESSON=]  re-execute the lessons at full size into notebooks/"
	@echo "make script            write lesson 00 as a Python file into examples/"
	@echo "make pretrained        train the shipped weights again"
	@echo "make doctor            say what is installed and what is missing"
	@echo "make address REPO=https://github.com/you/name   put your repository's address everywhere"

$(VENV)/made:
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'Python 3.11 or newer is needed, this is ' + sys.version.split()[0] + ': try make PYTHON=python3.12 …')"
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/run: $(VENV)/made requirements.txt
	@echo "installing requirements.txt (torch is large: a few minutes the first time) …"
	$(PIP) -r requirements.txt
	@touch $@

$(VENV)/test: $(VENV)/run requirements-test.txt
	$(PIP) -r requirements-test.txt
	@touch $@

run: $(VENV)/run
	$(BIN)/python tools/lessons.py run $(if $(ALL),--all) -- $$LESSON

quick: $(VENV)/run
	$(BIN)/python tools/lessons.py run -- 00

lab: $(VENV)/run
	$(BIN)/jupyter lab notebooks

test: $(VENV)/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --quiet .
	$(BIN)/python tools/lessons.py copy $(COPIES)
	$(TEST_ENV) DDPM_FAST=1 $(BIN)/python -m pytest --nbmake --overwrite --nbmake-timeout=300 -n auto --durations=5 $(COPIES)
	$(TEST_ENV) $(BIN)/python -m pytest -n auto -m "not slow" tests

test-all: test
	$(TEST_ENV) $(BIN)/python -m pytest -n auto -m slow --durations=10 tests

render: $(VENV)/run
	$(BIN)/python tools/lessons.py render -- $$LESSON

script: $(VENV)/run
	$(BIN)/python tools/lessons.py script examples/ddpm_on_one_page.py

pretrained: $(VENV)/run
	$(BIN)/python -m ddpm_utils.pretrained.make

doctor: $(VENV)/run
	$(BIN)/python -m ddpm_utils doctor

# Through the environment and as it was typed, so that neither make nor the shell runs what stands in it.
address: $(VENV)/run
	@$(BIN)/python tools/lessons.py address -- "$$REPO"

clean:
	rm -rf $(VENV) outputs checkpoints build dist
