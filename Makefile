PYTHON ?= python3
BIN := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help quickstart test style clean

help:  ## list the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

quickstart: .venv/.installed  ## distil the packaged teacher into a small student and print their AP
	$(BIN)/accelerate launch --config_file configs/accelerate/one_process.yaml scripts/train.py --config configs/quickstart.yaml

test: .venv/.installed  ## run the tests
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/python -m pytest --quiet -n 2 --dist loadfile --durations 15

style: .venv/.installed  ## format the code and mend what ruff can
	$(BIN)/ruff check --fix . ; $(BIN)/ruff format .

clean:  ## remove the environment and all outputs
	rm -rf .venv outputs

.venv/.installed: setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@
