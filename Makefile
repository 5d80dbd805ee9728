# make demo: set up, train and distil on real images, about 4 minutes on 2 idle cores; make demo ARGS=--quick takes 2.
# make test: set up and run every check, 12 minutes on 2 free cores, 8 once Triton has cached its kernels.
# make docs: the site, into build/site, without a network.
# make grid: the kernels' tests on other versions of torch, too; makes environments of 12 GB. make coverage: which lines tests run.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
REPORTS := build/tests

.PHONY: demo test test-newest docs grid coverage clean

demo: $(VENV)/demo.stamp
	$(BIN)/python -m examples.digits --out demo_output $(ARGS)

test: $(VENV)/test.stamp
	@echo 'Every check: about 12 minutes on 2 free cores, 8 once Triton has cached its kernels, longer on busy ones. `pytest -n auto -m "not slow"` answers in 60 seconds.'
	rm -rf $(REPORTS)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(MAKE) docs
	$(BIN)/pytest -n auto --dist worksteal --durations 10 --junit-xml $(REPORTS)/all.xml
	$(BIN)/python -m pytest -n auto --dist worksteal -p tests.ptx.plugin tests/ptx --junit-xml $(REPORTS)/compiled.xml
	$(MAKE) test-newest
	@$(BIN)/python -m tests.counts $(REPORTS)/*.xml build/grid/venv-triton-newest/*.xml

test-newest: $(VENV)/test.stamp
	$(BIN)/python -m tests.grid --torch here --triton newest --suite interpreted compiled-90

docs: $(VENV)/test.stamp  # with --quiet, mkdocs would count no warnings
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build

grid: $(VENV)/test.stamp
	$(BIN)/python -m tests.grid

coverage: $(VENV)/coverage.stamp
	$(BIN)/pytest -n auto --dist worksteal --cov --cov-report term-missing --cov-report html:build/coverage

$(VENV)/demo.stamp: EXTRAS := demo
$(VENV)/test.stamp: EXTRAS := test,dev,demo,models,recipes,docs
$(VENV)/coverage.stamp: EXTRAS := test,dev,demo,models,recipes,docs,coverage
$(VENV)/%.stamp: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("maskd_triton needs Python 3.10 or newer, this is " + sys.version.split()[0])'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[$(EXTRAS)]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info
