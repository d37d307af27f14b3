# `make serve` and `make test` are all a fresh machine needs: both set up .venv by themselves.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
MODEL ?= demo
ARGS ?=
PROTOS := $(wildcard proto/albireo/v1/*.proto)

.DEFAULT_GOAL := help
.PHONY: help setup serve test soak lint format proto proto-check bench clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(READY)  ## make .venv with everything that serving, testing and linting need

$(READY): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(0 if (3, 11) <= sys.version_info < (3, 14) else "Albireo needs Python 3.11 to 3.13; set PYTHON=")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --editable ".[worker]" --group dev
	touch $@

serve: $(READY)  ## serve MODEL (demo) on 127.0.0.1:50051 and show a first completion; ARGS="--tp 2 ..."
	$(BIN)/albireo serve $(MODEL) --first-prompt "def read_lines(path):" $(ARGS)

ANY := not soak and not gpu
test: $(READY)  ## all tests that need no GPU and no patience: most three at a time, then those that mind the time
	$(BIN)/python -m pytest -m "$(ANY) and not alone" --numprocesses 3 --dist loadfile $(ARGS)
	$(BIN)/python -m pytest -m "$(ANY) and alone" $(ARGS)

soak: $(READY)  ## the long tests and comparisons
	$(BIN)/python -m pytest -m soak --timeout 7200 $(ARGS)

lint: $(READY) proto-check  ## ruff, mypy, import contracts, generated code
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(READY)  ## let ruff format and fix what it can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

proto: $(READY)  ## generate albireo/v1 from proto/
	PATH=$(BIN):$$PATH $(BIN)/python -m grpc_tools.protoc -Iproto --python_out=. --pyi_out=. --grpc_python_out=. \
		--mypy_grpc_out=quiet:. $(PROTOS:proto/%=%)

proto-check: $(READY)  ## fail when albireo/v1 is not what proto/ says
	mkdir -p build/proto && PATH=$(BIN):$$PATH $(BIN)/python -m grpc_tools.protoc -Iproto --python_out=build/proto \
		--pyi_out=build/proto --grpc_python_out=build/proto --mypy_grpc_out=quiet:build/proto $(PROTOS:proto/%=%)
	diff -r -x __pycache__ -x __init__.py build/proto/albireo/v1 albireo/v1

bench: $(READY)  ## measure the server at 127.0.0.1:50051; ARGS="--workload decode ..."
	$(BIN)/albireo bench serve --workload chat $(ARGS)

clean:  ## remove .venv and build products
	rm -rf $(VENV) build dist
