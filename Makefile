# Every target sets up what it needs. `make help` lists them.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= $(shell command -v python3.11 || command -v python3 || echo python3.11)
TORCH ?= cpu
MODEL ?= models/demo
PORT ?= 8000
ARGS ?=
PROFILE ?= cpu
URL ?= http://127.0.0.1:$(PORT)
WORK ?= build/demo
WORKERS ?= 2

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed-$(TORCH)
TEST_STAMP := $(VENV)/.installed-tests-$(TORCH)
STUBS := protos/gen
PROTO_FILES := $(wildcard protos/chiasm/v1/*.proto)
NATIVE := $(wildcard kernels/cpu/*.cpp kernels/cpu/*.h)
CODE := services chiasm/cli chiasm/__init__.py tests examples benchmarks kernels requirements
TYPED_FOLDERS := tests examples benchmarks requirements
PYTEST := $(BIN)/python -m pytest
# Status 5: there are no such tests. Any other is passed on.
OR_NONE := { status=$$?; [ $$status -eq 5 ] || exit $$status; }

.PHONY: help
help: ## Show what can be made
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "%-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(STAMP): requirements/$(TORCH).lock pyproject.toml $(NATIVE)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null || { \
		echo "Chiasm's locks are for Python 3.11, but $(PYTHON) is not that." \
		     "Install it, or name it: make PYTHON=/path/to/python3.11 ..." >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-deps -r requirements/$(TORCH).lock
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation -e .
	@$(BIN)/python -c 'import torch' || { \
		echo "torch was installed but cannot be imported. Without a GPU, give pip the index of the" \
		     "CPU builds (PIP_EXTRA_INDEX_URL); with one, use make TORCH=cuda." >&2; exit 1; }
	touch $@

# What only tests need: who serves on a CPU does without.
$(TEST_STAMP): $(STAMP) requirements/triton.lock
	$(BIN)/python -m pip install --quiet --no-deps -r requirements/triton.lock
	touch $@

.PHONY: install
install: $(STAMP) ## Make .venv with the pinned packages (TORCH=cpu or cuda)

.PHONY: serve
serve: $(STAMP) ## Start the whole stack (MODEL=, PORT=, ARGS='flags of chiasm up')
	exec $(BIN)/chiasm up $(MODEL) --port $(PORT) $(ARGS)

.PHONY: test
test: $(TEST_STAMP) ## Run the tests that need no GPU and no patience (WORKERS=processes)
	$(PYTEST) -m "not slow and not gpu" -n $(WORKERS) --dist loadfile

.PHONY: test-slow
test-slow: $(TEST_STAMP) ## Run the tests that take minutes
	$(PYTEST) -m "slow and not gpu" || $(OR_NONE)

.PHONY: test-gpu
test-gpu: $(TEST_STAMP) ## Run the tests that need a CUDA device
	$(PYTEST) -m gpu || $(OR_NONE)

.PHONY: check
check: fmt-check lint types protos-check compose-check test test-slow ## Run everything that CI runs

.PHONY: fmt
fmt: $(STAMP) ## Format the code
	$(BIN)/ruff format $(CODE)
	$(BIN)/ruff check --fix --select I $(CODE)

.PHONY: fmt-check
fmt-check: $(STAMP)
	$(BIN)/ruff format --check $(CODE)

.PHONY: lint
lint: $(STAMP) ## Check style and spelling
	$(BIN)/ruff check $(CODE)
	git ls-files -z --cached --others --exclude-standard -- ':!models' ':!protos/gen' ':!*.lock' \
		':!*.svg' | xargs -0 $(BIN)/codespell

.PHONY: types
types: $(STAMP) ## Check types
	$(BIN)/mypy -p chiasm
	for folder in $(TYPED_FOLDERS); do $(BIN)/mypy $$folder; done

# $(1): folder that takes the stubs. A file without services has no use for gRPC stubs.
define generate
PATH=$(CURDIR)/$(BIN):$$PATH $(BIN)/python -m grpc_tools.protoc -I protos \
	--python_out=$(1) --grpc_python_out=$(1) --mypy_out=$(1) --mypy_grpc_out=$(1) $(PROTO_FILES)
find $(1) -name 'media_pb2_grpc.py*' -delete
endef

.PHONY: protos
protos: $(STAMP) ## Regenerate the stubs from protos/
	rm -rf $(STUBS)/chiasm/v1
	mkdir -p $(STUBS)
	$(call generate,$(STUBS))

.PHONY: protos-check
protos-check: $(STAMP)
	cd protos && $(CURDIR)/$(BIN)/buf lint
	rm -rf build/protos
	mkdir -p build/protos
	$(call generate,build/protos)
	diff -r --exclude=__pycache__ build/protos $(STUBS) || { \
		echo "The stubs differ from the protos; run make protos." >&2; exit 1; }

.PHONY: compose-check
compose-check: $(STAMP)
	$(BIN)/check-jsonschema --builtin-schema vendor.compose-spec docker-compose.yml

.PHONY: docs
docs: $(STAMP) ## Write the documentation of the settings
	$(BIN)/chiasm config-docs markdown > docs/configuration.md
	$(BIN)/chiasm config-docs toml > config.example.toml

.PHONY: bench
bench: $(STAMP) ## Run the benchmarks on stacks of their own
	$(BIN)/python -m benchmarks.concurrency
	$(BIN)/python -m benchmarks.decoder
	$(BIN)/python -m benchmarks.embedding_hit
	$(BIN)/python -m benchmarks.encoder
	$(BIN)/python -m benchmarks.engine
	$(BIN)/python -m benchmarks.store
	$(BIN)/python -m benchmarks.store_faults
	$(BIN)/python -m benchmarks.streams
	$(BIN)/python -m benchmarks.tower

.PHONY: demo-train
demo-train: $(STAMP) ## Train the demo model (WORK=folder of the run, ARGS=)
	$(BIN)/python -m examples.demo_model.train --work $(WORK) --export $(MODEL) $(ARGS)

.PHONY: demo-eval
demo-eval: $(STAMP) ## Print the demo model's table through the running server (URL=, ARGS=)
	$(BIN)/python -m examples.demo_model.evaluate --url $(URL) $(ARGS)

.PHONY: up
up: ## Start the stack in containers (PROFILE=cpu or gpu, ARGS='--scale encoder=3')
	docker compose --profile $(PROFILE) up --build --detach --wait $(ARGS)

.PHONY: down
down: ## Stop the containers
	docker compose --profile $(PROFILE) down

.PHONY: clean
clean: ## Remove what can be made again; .venv stays
	rm -rf build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis *.egg-info
	find services chiasm/cli tests examples benchmarks protos kernels requirements \
		-name __pycache__ -type d -prune -exec rm -rf {} +
