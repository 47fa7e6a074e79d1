PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# What pip resolves without a GPU. A machine that has one takes the CUDA build, or what TORCH= names.
GIVEN := $(filter-out undefined,$(origin TORCH))
TORCH ?= torch==2.13.0
# The GPU machines' version: tiles, registers and spills are this compiler's.
TRITON ?= triton==3.6.0
SHARDS ?= 2
WORKERS ?= 1
# Of `make test-gpu`, on one GPU.
PROCESSES ?= 14
# Empty: the one for this machine (common/serve.py).
PROCFILE ?=

# These may share the machine, two at a time; the rest starts processes and measures time-outs.
SHARING := $(wildcard tests/test_kernels*.py tests/test_api*.py) $(addprefix tests/test_,$(addsuffix .py,\
	asyncapi compile detokenizer grammar openapi responses_api sampling_params tokenize tools))
# These start MPS, which no other process may use at the time: each by itself, after the rest.
WITH_MPS := tests/test_kernels_link.py tests/test_gpu_link.py

export PATH := $(CURDIR)/$(BIN):$(PATH)

define HELP
make serve     set up .venv and start a cluster: WORKERS=$(WORKERS) SHARDS=$(SHARDS)
make install   set up .venv alone
make test      set up .venv, lint, type-check, run every test that needs no GPU
make test-gpu  run every test that needs a GPU, with the pytest that is here, else as `make test`: PROCESSES=$(PROCESSES)
make lint      mend and format what ruff can
make browser   drive the page in a headless Chromium, which must be there (apt-get install chromium)
make screenshots  take the pictures of the page anew, with the same Chromium
make settings  print the settings in force
make clean     remove .venv and the caches

`python -m services.gateway --help`, inside .venv, explains every setting.
endef
export HELP

.PHONY: serve test test-gpu browser screenshots playwright lint settings help install clean

serve: install
	@honcho run python -m common.supervisor --check
	@exec python -m common.serve expert_shard=$(SHARDS),gpu_worker=$(WORKERS) $(PROCFILE)

test: install
	ruff check .
	mypy
	OMP_NUM_THREADS=1 pytest -m "not gpu" -n 2 $(SHARING)
	OMP_NUM_THREADS=1 pytest -m "not gpu" $(addprefix --ignore=,$(SHARING))

# With whatever torch and pytest are here: a GPU's torch often comes with its machine, and a .venv would hide it.
test-gpu:
	@command -v pytest >/dev/null || $(MAKE) install
	trap 'exit 130' INT; failed=0; \
	export OMP_NUM_THREADS=1; \
	pytest -m gpu -n $(PROCESSES) --dist loadfile $(addprefix --ignore=,$(WITH_MPS)) || failed=1; \
	for file in $(WITH_MPS); do pytest -m gpu $$file || failed=1; done; \
	exit $$failed

browser: playwright
	pytest tests/test_page_browser.py

screenshots: playwright
	python -m tests.screenshots docs

playwright: install
	@python -c 'import playwright' 2>/dev/null || python -m pip install --quiet --editable ".[browser]"

lint: install
	ruff check --fix .
	ruff format .

settings: install
	@honcho run python -m services.gateway --settings

help:
	@echo "$$HELP"

install: $(STAMP)

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Moecule needs Python 3.11 or newer: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV): a minute or two"
	@test -z "$(GIVEN)" && command -v nvidia-smi >/dev/null 2>&1 || \
		{ torch='$(TORCH)'; $(BIN)/python -m pip install --quiet $$torch; }
	@command -v nvidia-smi >/dev/null 2>&1 || $(BIN)/python -m pip install --quiet "$(TRITON)"
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	@touch $@

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
