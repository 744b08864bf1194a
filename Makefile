# Each target installs and builds what it needs first. If that is already done, it takes a fraction of a second.
#   make PYTHON=/usr/bin/python3.12 …     another interpreter (3.11 or later) for the virtual environment
#   VCPUSET_CACHE=/some/directory make …  another directory for the builds (default: ~/.cache/vcpuset)
#   make test WORKERS=1                   number of tests that run in parallel (default: three per core)

SHELL := /bin/sh
.DEFAULT_GOAL := help
# The parts of one run share a machine and a virtual environment.
.NOTPARALLEL:
.PHONY: help setup demo test test-quick test-long test-cluster check docs docs-site version image chart bench bench-quick bench-drift bench-scale bench-watches

is_new_enough := import sys; sys.exit(sys.version_info < (3, 11))
ifeq ($(origin PYTHON), undefined)
PYTHON := $(shell for each in python3 python3.14 python3.13 python3.12 python3.11; do \
	if $$each -c '$(is_new_enough)' 2>/dev/null; then command -v $$each; break; fi; done)
endif
PY := .venv/bin/python

export PYTHONPATH := $(CURDIR)/tests

# Tests wait most of the time.
WORKERS = $$((3 * $$(nproc)))

# The parts of the set-up (tests/harness/setup) that the demo needs, and the tests, and the tests on a real node.
to-run := system venv guest controlplane
to-test := $(to-run) prometheus controllermanager helm
to-test-cluster := $(to-test) system-cluster node kuberouter images metricsserver keda flux argocd

# $(call set-up,part …)
define set-up
	@if ! '$(PYTHON)' -c '$(is_new_enough)' 2>/dev/null; then \
		echo 'Python 3.11 or later is required; "$(PYTHON)" is older or missing (Debian 12: apt-get install python3).' \
			'Set the path with: make PYTHON=/path/to/python3' >&2; exit 2; fi
	@'$(PYTHON)' -m harness.setup $(1)
endef

help: ## Show this help
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 24

setup: ## Install and build what the demo and the tests need (they do this automatically)
	$(call set-up,$(to-test))

demo: ## Resize a running Linux guest with the operator (KEEP=1 keeps everything running)
	$(call set-up,$(to-run))
	@$(PY) -m harness.demo

test: ## Run all tests, or some: make test ARGS="tests/unit -k plan"
	$(call set-up,$(to-test))
	$(PY) -m pytest -n $(WORKERS) $(ARGS)

test-quick: ## Run the tests that need neither a cluster nor a guest
	$(call set-up,system venv prometheus)
	VCPUSET_TEST_EFFORT=quick $(PY) -m pytest -n $$(($$(nproc) + 1)) tests/unit tests/qmp $(ARGS)

test-long: ## Run all tests and search for longer, as before a release
	$(call set-up,$(to-test))
	VCPUSET_TEST_EFFORT=long $(PY) -m pytest -n $(WORKERS) $(ARGS)

test-cluster: ## Run the tests with a real node, Flux, KEDA and libvirt
	$(call set-up,$(to-test-cluster))
	$(PY) -m harness.sandbox $(PY) -m pytest -o testpaths=tests/cluster $(ARGS)

check: ## Check formatting, lint, types, import contracts, generated pages and the documentation site
	$(call set-up,system venv)
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/mypy
	.venv/bin/lint-imports
	$(PY) -m harness.pages --check
	$(site)

docs: ## Regenerate the tables in docs/ that come from the code
	$(call set-up,system venv)
	@$(PY) -m harness.pages

# Each warning is an error, such as a link that leads nowhere.
site = @NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict

docs-site: ## Build the documentation site into build/site
	$(call set-up,venv)
	$(site)
	@echo "build/site is ready: python3 -m http.server --directory build/site"

version: ## Print the version of the program
	@sed -n 's/^version = "\(.*\)"$$/\1/p' pyproject.toml

IMAGE ?= vcpuset:$$(make --silent version)
image: ## Build the image with Docker (IMAGE=name:tag, BASE=name:tag@digest; PUSH=1 pushes it with provenance and SBOM)
	@mkdir -p build
	docker buildx build --tag="$(IMAGE)" $(if $(BASE),--build-arg=BASE="$(BASE)") \
		$(if $(PUSH),--push --provenance=mode=max --sbom=true,--load) --metadata-file=build/image.json .

chart: ## Package the Helm chart into build/ (IMAGE=name and DIGEST=sha256:… of the image that it installs)
	$(call set-up,venv helm)
	@$(PY) -m harness.chartpackage --image="$(if $(DIGEST),$(IMAGE))" --digest="$(DIGEST)" build

bench: ## Compare the operator's speed with raw QMP on one guest
	$(call set-up,$(to-run))
	@$(PY) bench/latency.py $(ARGS)

bench-quick: ## Measure in three minutes what a change and an observation cost the operator
	$(call set-up,$(to-run))
	@$(PY) -m bench.quick

bench-drift: ## Measure how fast changes by other clients are corrected
	$(call set-up,$(to-run))
	@$(PY) -m bench.drift $(ARGS)

bench-scale: ## Measure one operator with thousands of VCPUSets and simulated machines
	$(call set-up,$(to-run))
	@$(PY) -m bench.scale $(ARGS)

bench-watches: ## Measure what the watches of up to 1,000 agents cost the API server
	$(call set-up,$(to-run))
	@$(PY) -m bench.watches $(ARGS)
