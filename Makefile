# Everything runs in .venv, which is made on first use and again when the lock changes.
#   make demo | test | check …        ARGS="…" goes to the program, ROUNDS=n to `make crash`

PYTHON3 ?= python3
ROUNDS ?= 20
ARGS ?=
# Three processes on two cores: half of a test is waiting. A file's tests share servers and workers, so it is not split.
PARALLEL ?= -n 3 --dist loadfile --no-loadscope-reorder

PYTHON := .venv/bin/python
READY := .venv/.ready
OLDEST := .venv-oldest
ON_OLD_SERVER := tests/integration/test_settlement.py tests/integration/test_sweeper.py -k "not (settlement and direct)"
PEERS := .venv-bench
UV := $(shell command -v uv 2>/dev/null)
SOURCES := celery_jetstream tests $(wildcard examples benchmarks docs/*.py)

MAKEFLAGS += --no-print-directory
.DEFAULT_GOAL := help
.PHONY: help demo test check lint types imports docs oldest old crash bench format lock clean

help: ## this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## (.*)/  make \1\t\2/' | expand -t 18

demo: $(READY) ## two apps, an outbox, a bridge and real webhooks, with nothing to install or start
	@$(PYTHON) -m examples.demo $(ARGS)

test: $(READY) ## unit, integration and short crash tests; ARGS="-k name", then in one process
	@$(PYTHON) -m pytest $(if $(ARGS),$(ARGS),$(PARALLEL))

check: lint types imports docs test ## what must be green before a commit

lint: $(READY) ## style and spelling
	@$(PYTHON) -m ruff check --quiet $(SOURCES)
	@$(PYTHON) -m ruff format --check --quiet $(SOURCES) || { echo "lint: run 'make format'"; exit 1; }
	@.venv/bin/codespell $(SOURCES) $(wildcard *.md docs)

types: $(READY) ## mypy, strict
	@$(PYTHON) -m mypy --no-error-summary

imports: $(READY) ## imports point down, pure modules do no I/O
	@.venv/bin/lint-imports --no-logo > .venv/imports.log 2>&1 || { cat .venv/imports.log; exit 1; }

docs: $(READY) ## the docs as a site, in build/docs; a broken link or a page that nothing leads to is an error
	@$(PYTHON) docs/cli.py
	@$(PYTHON) -m sphinx -q -W --keep-going -n -c docs . build/docs
	@echo "docs: build/docs/docs/index.html"

oldest: $(OLDEST)/.ready ## the settlement suite on the oldest Celery and nats-py that we support
	@$(OLDEST)/bin/python -m pytest tests/unit/test_celery_internals.py \
		tests/integration/test_settlement.py tests/integration/test_inbox_runs.py \
		-n 2 -k "not every_pool and not (inbox and direct)" $(ARGS)

old: $(READY) ## a part of the tests on the oldest nats-server; ARGS="tests" for all of them
	@$(PYTHON) -m pytest --nats-server=old -n 2 --dist loadfile $(or $(ARGS),$(ON_OLD_SERVER))

crash: $(READY) ## the crash tests, ROUNDS times each, and what is left out of `make test`
	@$(PYTHON) -m pytest tests/crash --rounds=$(ROUNDS) --timeout=0 $(ARGS)
	@$(if $(ARGS),,$(PYTHON) -m pytest tests/integration -m soak --rounds=2)

bench: $(READY) ## figures, beside the peers'; ARGS="--only outbox"
	@$(MAKE) $(PEERS)/.ready || echo "bench: the peers cannot be installed here and are left out"
	@$(PYTHON) benchmarks/run.py $(ARGS)

format: $(READY) ## write the code as ruff wants it
	@$(PYTHON) -m ruff check --fix --quiet $(SOURCES) || true
	@$(PYTHON) -m ruff format --quiet $(SOURCES)

lock: $(READY) ## all locks anew; ARGS="--upgrade" for the newest
	@$(if $(UV),,$(PYTHON) -m pip install --quiet uv)
	@$(compile) --output-file requirements.lock $(ARGS)
	@$(compile) --output-file requirements-oldest.lock --constraint requirements-oldest.txt $(ARGS)
	@$(resolve) benchmarks/requirements.in --python-version 3.11 \
		--output-file benchmarks/requirements.lock $(ARGS)
compile = $(resolve) pyproject.toml --python-version 3.10 --all-extras
resolve = $(or $(UV),.venv/bin/uv) pip compile --quiet --universal --generate-hashes \
	--custom-compile-command "make lock"

clean: ## what was built and installed here
	@rm -rf .venv $(OLDEST) $(PEERS) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache build dist
	@find $(SOURCES) -name __pycache__ -type d -prune -exec rm -rf {} +

$(READY): requirements.lock pyproject.toml
	$(call set_up,.venv,requirements.lock)

$(OLDEST)/.ready: requirements-oldest.lock pyproject.toml
	$(call set_up,$(OLDEST),requirements-oldest.lock)

$(PEERS)/.ready: benchmarks/requirements.lock
	$(call set_up_pinned,$(PEERS),benchmarks/requirements.lock)
	@touch $@

# $(call set_up,environment,lock): the environment with what the lock pins, and this project
define set_up
	$(call set_up_pinned,$(1),$(2))
	@$(call install,$(1)) --no-deps --no-build-isolation -e .
	@touch $@
endef
# $(call set_up_pinned,environment,lock): the environment with what the lock pins
define set_up_pinned
	@$(PYTHON3) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || { \
		echo "Python 3.10 or newer is needed; $(PYTHON3) is" \
			"$$($(PYTHON3) --version 2>/dev/null || echo not there)."; \
		echo "Name another one: make PYTHON3=/path/to/python3.12 $(MAKECMDGOALS)"; exit 1; } >&2
	@echo "setting up $(1) …"
	@$(1)/bin/python -c '' 2>/dev/null || $(if $(UV),$(UV) venv --quiet --clear --no-python-downloads --python $(PYTHON3) $(1),$(PYTHON3) -m venv --clear $(1))
	@$(if $(UV),,$(1)/bin/python -m pip --version > /dev/null 2>&1 || $(1)/bin/python -m ensurepip > /dev/null)
	@$(call install,$(1)) --require-hashes -r $(2)
endef
install = $(if $(UV),$(UV) pip install --quiet --python $(1)/bin/python,$(1)/bin/python -m pip install --quiet --disable-pip-version-check)
