# make demo   set everything up and run the built-in example
# make test   set everything up, check style, types and import contracts, and pass the tests
# make test-chaos  kill, cut, pause and starve a federation of real processes, and kill runs at every step
# make bench  print the benchmarks' figures on the built-in model
# make docs   write the generated pages of docs/ anew
# make proto  write wire/protocol_pb2.py and .pyi anew from protocol.proto
# make fuzz   throw broken messages at the receiving side for a minute, or SECONDS=…

PYTHON ?= python3
BIN := .venv/bin
export HF_HUB_OFFLINE ?= 1

.PHONY: setup demo test test-chaos lint docs proto fuzz bench clean

setup: .venv/.ready

.venv/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: setup
	$(BIN)/commonweight demo

test: lint
	$(BIN)/python -m pytest -n 2 --dist worksteal --ignore=tests/chaos -m "not kills"

test-chaos: setup
	$(BIN)/python -m pytest -n 2 --dist worksteal tests/chaos
	$(BIN)/python -m pytest -n 2 --dist worksteal tests/unit -m kills

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: setup
	$(BIN)/python scripts/write_docs.py

proto: setup
	PATH="$(BIN):$$PATH" $(BIN)/python -m grpc_tools.protoc -I src --python_out=src --mypy_out=src \
		src/commonweight/wire/protocol.proto

fuzz: setup
	$(BIN)/python scripts/fuzz.py --seconds $(or $(SECONDS),60)

bench: setup
	$(BIN)/python benchmarks/fold.py --json
	$(BIN)/python benchmarks/local_step.py --json
	$(BIN)/python benchmarks/engine_overhead.py --trivial --json
	$(BIN)/python benchmarks/engine_overhead.py --json
	$(BIN)/python benchmarks/vault.py --json
	$(BIN)/python benchmarks/network_round.py --mb 1 --sites 2 --rounds 40 --json
	$(BIN)/python benchmarks/network_round.py --mb 512 --sites 4 --json

clean:
	rm -rf .venv build dist src/*.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
