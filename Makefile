# `make demo` and `make test` set everything up by themselves, in $(VENV).
PYTHON ?= python3
VENV ?= .venv
VENV_UPSTREAM ?= .venv-upstream
BIN := $(VENV)/bin
BIN_UPSTREAM := $(VENV_UPSTREAM)/bin
READY := $(VENV)/.ready
DEMO_CONFIG := configs/mini/fpn_inceptionnext_a.py
DEMO_DATA := data/mini_ade20k
DEMO_OUT := work_dirs/mini/fpn_inceptionnext_a

.PHONY: demo test test-all test-upstream test-neighbours lint format

demo: $(READY)
	test -d $(DEMO_DATA) || $(BIN)/python tools/make_mini_ade20k.py --out $(DEMO_DATA)
	$(BIN)/python tools/train.py $(DEMO_CONFIG) --work-dir $(DEMO_OUT) --seed 0 --overwrite
	$(BIN)/python tools/test.py $(DEMO_CONFIG) $$(cat $(DEMO_OUT)/last_checkpoint) --work-dir $(DEMO_OUT) \
		--show-dir $(DEMO_OUT)/pictures --report $(DEMO_OUT)/report --json $(DEMO_OUT)/figures.json
	@echo "Pictures of image, truth and prediction are in $(DEMO_OUT)/pictures, a report in $(DEMO_OUT)/report/index.html"

test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/pytest -m 'not slow' --numprocesses auto --dist worksteal

test-all: $(READY)
	$(BIN)/pytest

# By hand: with mmengine, mmcv and mmsegmentation of OpenMMLab itself. PYTHONPATH because mmengine 0.10.7 looks for the
# configs of a package that is installed as editable in site-packages, where they are not.
test-upstream: $(VENV_UPSTREAM)/.ready
	PYTHONPATH=$(CURDIR) OMP_NUM_THREADS=1 $(BIN_UPSTREAM)/pytest -m 'not slow' --numprocesses auto --dist worksteal

# By hand: the tests of mmengine, or of source trees given as NEIGHBOURS, with our package imported and without.
test-neighbours: $(READY)
	$(BIN)/python -m pip install --quiet parameterized lmdb
	OMP_NUM_THREADS=1 $(BIN)/python tests/neighbours.py $(NEIGHBOURS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# grad-cam apart: it requires opencv-python-headless, whose files are those of opencv-python.
$(READY): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --no-deps grad-cam
	touch $@

# mmcv is compiled, a quarter of an hour on two cores: with the last setuptools that have pkg_resources, and with
# torch 2.6, the lowest that pyproject.toml allows, because mmcv 2.1.0 is compiled as C++17 and torch 2.14 needs C++20.
# mmseg 1.2.2 imports ftfy and regex without requiring them. At the end comes what pyproject.toml requires besides.
$(VENV_UPSTREAM)/.ready: pyproject.toml
	test -x $(BIN_UPSTREAM)/python || $(PYTHON) -m venv $(VENV_UPSTREAM)
	$(BIN_UPSTREAM)/pip install --quiet 'setuptools>=77,<81' wheel ninja psutil torch==2.6.0 torchvision==0.21.0
	$(BIN_UPSTREAM)/pip install --quiet mmengine==0.10.7
	$(BIN_UPSTREAM)/pip install --quiet --no-deps --no-build-isolation --no-binary mmcv mmcv==2.1.0
	$(BIN_UPSTREAM)/pip install --quiet mmsegmentation==1.2.2 ftfy regex
	$(BIN_UPSTREAM)/pip install --quiet --no-deps --editable .
	$(BIN_UPSTREAM)/python -c "from importlib.metadata import requires; \
		print(*(r.split(';')[0] for r in requires('mmseg-inceptionnext') if 'mmseg' not in r and 'onedl' not in r))" \
		| xargs $(BIN_UPSTREAM)/pip install --quiet
	touch $@
