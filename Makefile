# `make demo` and `make test` set everything up by themselves, in $(VENV).
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DEMO_CONFIG := configs/mini/fpn_inceptionnext_a.py
DEMO_DATA := data/mini_ade20k
DEMO_OUT := work_dirs/mini/fpn_inceptionnext_a

.PHONY: demo test test-all lint format

demo: $(READY)
	test -d $(DEMO_DATA) || $(BIN)/python tools/make_mini_ade20k.py --out $(DEMO_DATA)
	$(BIN)/python tools/train.py $(DEMO_CONFIG) --work-dir $(DEMO_OUT) --seed 0
	$(BIN)/python tools/test.py $(DEMO_CONFIG) $$(cat $(DEMO_OUT)/last_checkpoint) --work-dir $(DEMO_OUT) \
		--show-dir $(DEMO_OUT)/pictures --report $(DEMO_OUT)/report --json $(DEMO_OUT)/figures.json
	@echo "Pictures of image, truth and prediction are in $(DEMO_OUT)/pictures, a report in $(DEMO_OUT)/report/index.html"

test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/pytest -m 'not slow' --numprocesses auto --dist worksteal

test-all: $(READY)
	$(BIN)/pytest

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(READY): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@
