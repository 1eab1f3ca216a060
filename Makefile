# Everything a person needs is a target here; `make` alone lists them.
.DEFAULT_GOAL := help
.PHONY: help setup serve test check bench gpu chaos clients page pebble evaluate system-packages clean

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
DEV    := $(VENV)/.installed-dev
HOST   ?= 127.0.0.1
PORT   ?= 8000

help:
	@echo "make serve    set up, start the server and the chat page on the bundled model (HOST, PORT, MODEL)"
	@echo "make test     set up, run every test (needs Redis and Chromium; installs them where it may)"
	@echo "make check    ruff, strict mypy, import layers"
	@echo "make setup    only the set-up: .venv with the command .venv/bin/millrace"
	@echo "make page     build the chat page (Node.js 20 or newer)"
	@echo "make bench    the benchmark tables (quiet machine; BENCH=engine|serve for one)"
	@echo "make gpu      checks and figures on an NVIDIA GPU, in ten minutes (OUT=folder, ONLY=parts, ROWS=patterns, COMMIT)"
	@echo "make chaos    harm real servers for long and print the reliability table (SEED; COUNT for short; needs Redis)"
	@echo "make clients  try the client libraries (openai, LangChain, PydanticAI, …) and print what works (needs Node.js)"
	@echo "make pebble   train the bundled model anew (DATA=folder of packed text, MINUTES=90)"
	@echo "make evaluate the tables of the model card (DATA=the same folder, MODEL, CARD=file to update)"

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Millrace needs Python 3.11 or newer; set PYTHON=...")'
	$(PYTHON) -m venv $(VENV)

$(STAMP): pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/pip install --quiet --disable-pip-version-check torch -c constraints.txt
	$(BIN)/pip install --quiet --disable-pip-version-check -e . -c constraints.txt
	@# Compiled now, so that the first start does not wait for it.
	$(BIN)/python -m kernels.cpu
	@touch $@

$(DEV): $(STAMP)
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[dev]' -c constraints.txt
	@touch $@

setup: $(STAMP) page-if-possible

PAGE_SOURCES := $(shell find web -path web/node_modules -prune -o -path web/dist -prune -o -type f -print 2>/dev/null)

web/node_modules/.installed: web/package.json web/package-lock.json
	cd web && npm ci --no-audit --no-fund --loglevel=error
	@touch $@

web/dist/index.html: web/node_modules/.installed $(PAGE_SOURCES)
	cd web && npm run --silent build
	@touch $@

page: web/dist/index.html

.PHONY: page-if-possible
page-if-possible:
	@if command -v npm >/dev/null && node -e 'process.exit(parseInt(process.versions.node) >= 20 ? 0 : 1)'; then \
		$(MAKE) --no-print-directory page; \
	else \
		echo "No Node.js 20 or newer here: the API works, the chat page is not built. Install Node.js, then: make page"; \
	fi

serve: setup
	$(BIN)/millrace serve $(MODEL) --host $(HOST) --port $(PORT)

system-packages:
	@sh tests/system_packages.sh

test: $(DEV) system-packages page-if-possible
	@if [ -f web/node_modules/.installed ]; then cd web && npm run --silent check && npm test --silent; fi
	$(BIN)/pytest $(PYTEST_ARGS)

check: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

BENCH ?= engine serve
bench: $(DEV)
	@for table in $(BENCH); do $(BIN)/python -m tests.bench.$$table || exit 1; done

# Where a GPU is, the project's packages may lie beside the system's torch: GPU_PYTHON=python3.
GPU_PYTHON ?= $(BIN)/python
gpu: $(if $(filter $(BIN)/python,$(GPU_PYTHON)),$(DEV))
	@test -n "$(OUT)" || { echo "Say where what is measured goes: make gpu OUT=folder"; exit 2; }
	$(GPU_PYTHON) -m tests.gpu --out $(OUT) $(if $(ONLY),--only $(ONLY)) $(if $(ROWS),--rows $(ROWS)) \
		$(if $(COMMIT),--commit $(COMMIT)) $(if $(SECONDS),--seconds $(SECONDS)) $(if $(DRY),--dry)

SEED  ?= 1
COUNT ?=
chaos: $(DEV) system-packages
	@status=0; \
	$(BIN)/python -m tests.chaos --seed $(SEED) $(if $(COUNT),--count $(COUNT)) || status=1; \
	$(BIN)/python -m tests.fuzz --seed $(SEED) --requests $(or $(COUNT),10000) --frames $(or $(COUNT),10000) || status=1; \
	$(BIN)/python -m tests.engine.scheduler_runs --seed $(SEED) --count $(or $(COUNT),100000) || status=1; \
	exit $$status

build/clients/.installed: tests/clients/requirements.txt tests/clients/node/package-lock.json
	$(PYTHON) -m venv build/clients/venv
	build/clients/venv/bin/pip install --quiet --disable-pip-version-check -r tests/clients/requirements.txt
	cd tests/clients/node && npm ci --no-audit --no-fund --loglevel=error
	@touch $@

clients: $(DEV) build/clients/.installed
	$(BIN)/python -m tests.clients

MINUTES ?= 90
pebble: $(DEV)
	@test -n "$(DATA)" || { echo "Say where the training text lies: make pebble DATA=folder"; exit 2; }
	$(BIN)/python -m engine.train --data $(DATA) --out build/pebble --export engine/assets/pebble --minutes $(MINUTES)

evaluate: $(DEV)
	@test -n "$(DATA)" || { echo "Say where the text lies: make evaluate DATA=folder"; exit 2; }
	$(BIN)/python -m engine.train.evaluation --model $(or $(MODEL),engine/assets/pebble) --data $(DATA) \
		--out build/evaluation/report.json $(if $(CARD),--card $(CARD))

clean:
	rm -rf $(VENV) build web/dist web/node_modules tests/clients/node/node_modules
