# Everything sets itself up: `make demo` and `make test` work on a fresh machine with Python 3.11 or later.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
MEGATRONS := $(VENV)/megatron-core/0.14.0 $(VENV)/megatron-core/0.19.2
BRIDGE := $(VENV)/megatron-bridge/0.3.1

.PHONY: demo test test-full nightly lint types bench versions docs clean

demo: $(READY) ## Convert a small Llama to Megatron Core, reshard it, return it, compare every byte
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python examples/demo.py

test: $(READY) ## The everyday suite, the same cases every time
	$(BIN)/python -m pytest -n 2 -m "not full"

# SEED repeats a run; what has failed before is kept in .hypothesis and comes first.
SEED := $(or $(SEED),$(shell od -An -N3 -tu4 /dev/urandom | tr -d ' '))
DRAWN = --hypothesis-profile=drawn --hypothesis-seed=$(SEED)

test-full: $(READY) ## The whole grid, and other cases each time
	@echo "SEED=$(SEED)"
	$(BIN)/python -m pytest -n 2 $(DRAWN)

nightly: $(READY) ## Cases drawn by chance, many more of them, and faults at random places
	@echo "SEED=$(SEED)"
	CKPTX_FAULTS=4 CKPTX_FAULTS_FIRST_SEED=$(SEED) CKPTX_EXAMPLES=20 $(BIN)/python -m pytest -n 2 \
		$(DRAWN) tests/property tests/formats tests/faults tests/fuzz tests/hostile/test_tuples.py \
		tests/unit

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

bench: $(READY) ## Speed and memory, each paired with cp; see docs/performance.md
	$(BIN)/python benchmarks/bench.py

versions: $(READY) ## Every release that is supported, one environment at a time; see docs/versions.md
	$(BIN)/python -m tests.versions.matrix
	$(BIN)/python -m docs.refresh

docs: $(READY) ## Refresh the generated parts of the documentation
	$(BIN)/python -m docs.refresh

# torch first and pinned: otherwise pip takes a build with gigabytes of GPU libraries.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[hf,megatron,dev]"
	$(MAKE) --no-print-directory VENV=$(VENV) $(MEGATRONS) || echo "its tests will be skipped"
	$(MAKE) --no-print-directory VENV=$(VENV) $(BRIDGE) || echo "its tests will be skipped"
	touch $(READY)

# They are unpacked beside the installed one, and 0.19 asks for Python 3.12; the tests put one on the path.
$(VENV)/megatron-core/%:
	mkdir -p $(VENV)/wheels
	$(BIN)/pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: \
		--python-version $(if $(filter 0.19.2,$*),3.12,3.11) --require-hashes -d $(VENV)/wheels \
		-r tests/oracles/megatron-core-$*.txt
	$(BIN)/python -m zipfile -e $(VENV)/wheels/megatron_core-$*-*.whl $@

# Its requirements are hundreds of packages; the tests bring what stands for those that they meet.
$(BRIDGE):
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --require-hashes --target $@ \
		-r tests/oracles/megatron-bridge-0.3.1.txt

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis site
