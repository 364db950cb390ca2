# On a machine with Python 3.11 and make, `make demo` and `make test` install everything else.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
PIP := -m pip --quiet --disable-pip-version-check install
INSTALLED := .venv/.installed
PROTOC_INSTALLED := .protos-venv/.installed
PEERS_INSTALLED := .peers-venv/.installed
FUZZ_INSTALLED := .fuzz/.installed
TRAINERS_INSTALLED := .trainers-venv/.installed
DEPLOY_INSTALLED := .deploy-venv/.installed
GRAFANA_SCHEMA := .grafana-schema/dashboard.json
# --python_out and its kin follow: the output folder. The path below `protos` is the import path.
PROTOC := .protos-venv/bin/python -m grpc_tools.protoc -I protos foreshock_protos/v1/telemetry.proto
GENERATED = --python_out=$(1) --pyi_out=$(1) --grpc_python_out=$(1)
# Tests wait for processes about half of the time: two workers more than there are cores keep the cores busy.
CORES := $(shell env -u OMP_NUM_THREADS nproc)
WORKERS ?= $(shell echo $$(($(CORES) + 2)))
PARALLEL := --dist loadscope --no-loadscope-reorder
# Where it is set, each worker and each process that a test starts would compile all modules anew: a tenth of the time.
unexport PYTHONDONTWRITEBYTECODE

# $(call apt-install,what for,packages)
define apt-install
	command -v apt-get >/dev/null || { echo "$(1): please install $(2)" >&2; exit 1; }; \
	if [ "$$(id -u)" = 0 ]; then as_root=(); elif command -v sudo >/dev/null; then as_root=(sudo); \
	else echo "$(1): as root, please run: apt-get install $(2)" >&2; exit 1; fi; \
	echo "$(1): installing $(2)"; \
	"$${as_root[@]}" apt-get update -qq; \
	"$${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $(2) >/dev/null
endef

.PHONY: help
help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-15s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: demo
demo: $(INSTALLED) ## train a small model until it explodes, and show why; sets everything up
	@$(BIN)/foreshock demo $(ARGS)

.PHONY: test
test: $(INSTALLED) system-deps $(GRAFANA_SCHEMA) ## run the tests; sets everything up; ARGS="-k name" goes to pytest
	@$(BIN)/python -m pytest -n $(WORKERS) $(PARALLEL) $(ARGS)

.PHONY: test-unit
test-unit: $(INSTALLED) ## run the tests that start no process, except the longest: a minute
	@$(BIN)/python -m pytest -n $$(($(CORES) + 1)) $(PARALLEL) -m unit $(ARGS)

.PHONY: test-trainers
test-trainers: $(TRAINERS_INSTALLED) prometheus ## run the tests of the callbacks for trainers, with the real packages; ARGS="-k name"
	@.trainers-venv/bin/python -m pytest -n $(CORES) --dist load -m trainers $(ARGS)

.PHONY: check
check: static test ## everything that a change must pass: static, then test

.PHONY: static
static: $(INSTALLED) generated ## check format, lint, types, and that generated files are up to date
	@$(BIN)/ruff format --check
	@$(BIN)/ruff check
	@$(BIN)/mypy

.PHONY: generated
generated: $(INSTALLED) protos-drift
	@$(BIN)/python docs/make_metrics.py --check
	@$(BIN)/python docs/make_verdicts.py --check
	@$(BIN)/python docs/make_configuration.py --check
	@$(BIN)/python docs/make_detection.py --check
	@$(BIN)/python -m grafana.make --check

.PHONY: docs
docs: $(INSTALLED) ## write the generated pages and tables of docs/ from the catalogue, verdicts, alerts and settings
	@$(BIN)/python docs/make_metrics.py
	@$(BIN)/python docs/make_verdicts.py
	@$(BIN)/python docs/make_configuration.py
	@$(BIN)/python docs/make_detection.py

.PHONY: screenshots
screenshots: $(INSTALLED) chromium ## take docs/screenshots of small, real runs in a real browser (3 minutes)
	@$(BIN)/python -m docs.make_screenshots

.PHONY: dashboards
dashboards: $(INSTALLED) ## write Grafana's dashboards from the catalogue of series
	@$(BIN)/python -m grafana.make dashboards

.PHONY: rules
rules: $(INSTALLED) ## write the alert rules for Prometheus and Grafana; ARGS="--collector-url URL --grafana-url URL"
	@$(BIN)/python -m grafana.make rules $(ARGS)

.PHONY: protos
protos: $(PROTOC_INSTALLED) ## write the Python code of the contract from telemetry.proto
	@$(PROTOC) $(call GENERATED,protos)

.PHONY: bench
bench: $(INSTALLED) ## measure the overhead of a training step, as ratios; ARGS="--json" and others
	@$(BIN)/python benchmarks/step.py $(ARGS)

.PHONY: bench-gpu
bench-gpu: $(INSTALLED) ## test and measure on a GPU: correctness, overhead, launches, copies, waits; ARGS="--output DIR"
	@$(BIN)/python -m benchmarks.gpu $(ARGS)

.PHONY: soak
soak: $(INSTALLED) ## train two ranks for 20,000 steps: flat memory, no extra threads, nothing left behind (minutes)
	@$(BIN)/python -m benchmarks.soak $(ARGS)

.PHONY: chaos
chaos: $(INSTALLED) ## break things at 1,000 random moments under load and count what was lost (an hour); ARGS="--faults 100 --seed 7"
	@$(BIN)/python -m benchmarks.chaos $(ARGS)

.PHONY: fuzz
fuzz: $(INSTALLED) ## send 100,000 random histories and messages through the collector (an hour), then by coverage, briefly; ARGS="--count 1000 --seed 7"
	@$(BIN)/python -m benchmarks.fuzz $(ARGS)
	@$(MAKE) --no-print-directory fuzz-guided ARGS="--seconds 60"

.PHONY: fuzz-guided
fuzz-guided: $(INSTALLED) $(FUZZ_INSTALLED) ## fuzz by coverage what reads wire, rings, logs and settings (20 minutes); ARGS="--target wire --seconds 60"
	@PYTHONPATH=.fuzz $(BIN)/python -m benchmarks.fuzz.guided $(ARGS)

.PHONY: bench-detection
bench-detection: $(INSTALLED) $(PEERS_INSTALLED) ## measure detection accuracy on recorded faults, next to other rules and programs; ARGS="--json --part tune"
	@$(BIN)/python -m benchmarks.detection --peers .peers-venv/bin/python $(ARGS)

.PHONY: bench-logs
bench-logs: $(INSTALLED) ## measure how fast long logs are diagnosed, and the memory; ARGS="--rows 100000 --json"
	@$(BIN)/python -m benchmarks.logs $(ARGS)

.PHONY: faults
faults: $(INSTALLED) ## record the fault corpus again (20 minutes); ARGS="--only 'bit_flip-*'"
	@$(BIN)/python -m benchmarks.faults $(ARGS)

.PHONY: wheel-check
wheel-check: $(INSTALLED) ## build sdist and wheel, and try the wheel in a clean environment
	@PYTHON=$(PYTHON) .ci/wheel-check

.PHONY: deploy-check
deploy-check: $(DEPLOY_INSTALLED) prometheus ## validate the chart, manifests and Slurm scripts with Helm, kustomize and Kubernetes' schemas
	@command -v kubectl >/dev/null || { echo "deploy-check: please install kubectl, which has kustomize" >&2; exit 1; }
	@.deploy-venv/bin/python .ci/deploy_check.py

.PHONY: kubernetes
kubernetes: $(DEPLOY_INSTALLED) ## write the kustomize base from the Helm chart
	@.deploy-venv/bin/python .ci/deploy_check.py --write

.PHONY: bench-collector
bench-collector: $(INSTALLED) ## measure a collector under simulated ranks: core, memory, disk, scrapes; ARGS="--ranks 64 256 --json"
	@$(BIN)/python -m benchmarks.collector $(ARGS)

.PHONY: bench-sinks
bench-sinks: $(INSTALLED) ## measure a collector beside Pushgateway and VictoriaMetrics, where these are installed; ARGS="--json"
	@$(BIN)/python -m benchmarks.metric_sinks $(ARGS)

.PHONY: bench-flood
bench-flood: $(INSTALLED) ## measure what a peer that begins 12,000 runs does to another one's run; ARGS="--runs 2000 --json"
	@$(BIN)/python -m benchmarks.flood $(ARGS)

.PHONY: test-matrix
test-matrix: $(INSTALLED) prometheus ## run the fast tests with the oldest and newest dependencies, on every installed Python
	@$(BIN)/python .ci/matrix.py $(ARGS)

.PHONY: release-check
release-check: $(INSTALLED) generated wheel-check ## check that version, changelog, release notes, tag, wheel and documents agree
	@$(BIN)/python .ci/release_check.py

# Prerequisites of the targets above, not listed by `make help`.

.PHONY: system-deps
system-deps: prometheus chromium ## install the Debian packages that the tests need, as root or with sudo

.PHONY: prometheus
prometheus:
	@for tool in prometheus promtool prometheus-alertmanager amtool; do \
	  command -v $$tool >/dev/null || { $(call apt-install,The tests run a real Prometheus and Alertmanager,prometheus prometheus-alertmanager); break; }; \
	done

.PHONY: chromium
chromium:
	@for tool in chromium chromedriver; do \
	  command -v $$tool >/dev/null || { $(call apt-install,The tests of the page run a real browser,chromium chromium-driver); break; }; \
	done

# Grafana publishes the dashboard's types; a JSON schema of them is made here, to the exact version.
$(GRAFANA_SCHEMA): tests/grafana/tsconfig.json Makefile
	@command -v npm >/dev/null || { $(call apt-install,The dashboards are held against Grafana's own types,npm); }
	@npm install --silent --fetch-timeout=60000 --no-save --no-audit --no-fund --prefix $(@D) \
	  @grafana/schema@13.2.3 ts-json-schema-generator@2.4.0 typescript@5.9.3
	@$(@D)/node_modules/.bin/ts-json-schema-generator --tsconfig $< --no-type-check --type Dashboard --out $@ \
	  --path $(@D)/node_modules/@grafana/schema/dist/types/raw/dashboard/x/types.gen.d.ts

.PHONY: protos-drift
protos-drift: $(PROTOC_INSTALLED)
	@fresh=$$(mktemp -d); trap 'rm -r "$$fresh"' EXIT; \
	$(PROTOC) $(call GENERATED,"$$fresh"); \
	diff -r -x __init__.py -x __pycache__ -x '*.proto' "$$fresh/foreshock_protos/v1" protos/foreshock_protos/v1 \
	  || { echo "The generated code does not match telemetry.proto; run: make protos" >&2; exit 1; }

$(INSTALLED): requirements-dev.txt pyproject.toml
	@$(call make-venv,.venv)
	@$(BIN)/python $(PIP) -r requirements-dev.txt
	@$(BIN)/python $(PIP) --no-deps --no-build-isolation -e .
	@touch $@

$(PROTOC_INSTALLED): requirements-protos.txt
	@$(call make-venv,.protos-venv)
	@.protos-venv/bin/python $(PIP) -r requirements-protos.txt
	@touch $@

$(PEERS_INSTALLED): requirements-peers.txt
	@$(call make-venv,.peers-venv)
	@.peers-venv/bin/python $(PIP) -r requirements-peers.txt
	@touch $@

# It has all packages of .venv too: a second torch would take most of the time.
$(TRAINERS_INSTALLED): requirements-trainers.txt $(INSTALLED)
	@$(call make-venv,.trainers-venv)
	@$(BIN)/python -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
	  >"$$(.trainers-venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/development.pth"
	@.trainers-venv/bin/python $(PIP) -r requirements-trainers.txt
	@touch $@

$(FUZZ_INSTALLED): requirements-fuzz.txt $(INSTALLED)
	@$(BIN)/python $(PIP) --upgrade --target $(@D) -r requirements-fuzz.txt
	@touch $@

$(DEPLOY_INSTALLED): requirements-deploy.txt
	@$(call make-venv,.deploy-venv)
	@.deploy-venv/bin/python $(PIP) -r requirements-deploy.txt
	@touch $@

define make-venv
	[ -n "$(PYTHON)" ] && $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "Python 3.11 or newer is required: install python3.11 or python3, or use make PYTHON=..." >&2; exit 1; }; \
	$(PYTHON) -c 'import ensurepip' 2>/dev/null || { $(call apt-install,A virtual environment needs it,$(notdir $(PYTHON))-venv); }; \
	[ -x $(1)/bin/pip ] || { echo "Setting up $(1); the first time takes a few minutes"; $(PYTHON) -m venv --clear $(1); }
endef
