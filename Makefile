PYTHON ?= python3
BIN := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help quickstart test coverage mutants audit style clean

help:  ## list the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

quickstart: .venv/.installed  ## distil the packaged teacher into a small student and print their AP
	$(BIN)/accelerate launch --config_file configs/accelerate/one_process.yaml scripts/train.py --config configs/quickstart.yaml

test: .venv/.installed  ## run the tests
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/python -m pytest --quiet -n 2 --dist loadfile --durations 15

coverage: .venv/.installed  ## run the tests and fail where they reach less than 90 % of lines and branches
	$(BIN)/python -m pytest --quiet -n 2 --dist loadfile --cov --cov-report=term-missing:skip-covered

mutants: .venv/.installed  ## plant small errors in what computes the numbers, and list those that no test notices
	$(BIN)/python -m tests.mutants --number 120

audit: .venv/.installed  ## look up known vulnerabilities of the installed packages (asks pypi.org)
	$(BIN)/pip-audit --local --strict --skip-editable

style: .venv/.installed  ## format the code and mend what ruff can
	$(BIN)/ruff check --fix . ; $(BIN)/ruff format .

clean:  ## remove the environment and all outputs
	rm -rf .venv outputs

.venv/.installed: setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[dev]'
	touch $@
