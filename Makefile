# Two commands: `make serve` and `make test`. They need python3 (3.11 or newer) and a package index, nothing else.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# Machines without an NVIDIA GPU get torch's CPU build; an open range would take gigabytes of CUDA packages.
HAS_GPU := $(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1 && echo yes)
CONSTRAINTS := $(if $(HAS_GPU),,-c constraints-cpu.txt)

LINKS   := build/links
INNER   := $(filter-out %/__pycache__,$(patsubst %/,%,$(wildcard $(CURDIR)/manylora/*/)))
FOLDERS := adapters demo loadtest quant server training

.PHONY: serve test clients kernels sanitize lint format bench gpu-check links clean
.DEFAULT_GOAL := serve

serve: $(VENV)/.serve kernels  ## one 4-bit base and four adapters on port 8000
	$(BIN)/manylora serve $(ARGS)

# Neighbours stay together, so that few files' fixtures are made by two processes.
test: $(VENV)/.dev kernels  ## the whole suite on the CPU
	$(BIN)/python -m pytest -n auto $(ARGS)

# Some can't be installed beside the suite's packages, so they get an environment of their own; its tests are skipped else.
clients: build/clients/.made  ## the client libraries that tests/clients runs and that `make test` doesn't install
	! command -v npm >/dev/null || npm ci --prefix tests/clients/node --omit=peer

kernels: $(VENV)/.torch  ## the native CPU kernels, where there is a C++ compiler and a source has changed
	$(BIN)/python server/kernels/cpu/build.py --optional

# torch's own threads and Python's memory are not what is looked at; leaks there would hide everything else.
sanitize: $(VENV)/.dev  ## the kernels' tests under AddressSanitizer and UBSan; half an hour on two cores
	$(BIN)/python server/kernels/cpu/build.py --sanitize address,undefined
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" \
	$(BIN)/python -m pytest --capture=sys tests/server/kernels tests/server/model/test_backend_seam.py \
	tests/server/model/test_kept_model.py $(ARGS); \
	status=$$?; $(BIN)/python server/kernels/cpu/build.py && exit $$status

lint: $(VENV)/.dev links
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	cd $(LINKS) && $(abspath $(BIN))/mypy --cache-dir $(CURDIR)/.mypy_cache --config-file ../../pyproject.toml

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.dev kernels  ## manylora against transformers + peft, 8 streams with 8 adapters, one run
	$(BIN)/python -m manylora.loadtest.bench.beside_peft $(ARGS)

gpu-check:  ## exactness and speed on a GPU; needs torch, transformers, peft, triton, numpy and safetensors only
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) -m manylora.loadtest.checks.gpu_check $(ARGS)

# The folders of the repository as they are once installed, for mypy, which can't see an installation.
links:
	rm -rf $(LINKS) && mkdir -p $(LINKS)/manylora
	ln -s $(CURDIR)/manylora/*.py $(INNER) $(addprefix $(CURDIR)/,$(FOLDERS)) $(LINKS)/manylora/
	ln -s $(CURDIR)/tests $(LINKS)/tests

# torch first and alone, so that nothing that follows can bring another build of it.
$(VENV)/.torch: constraints-cpu.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q torch $(CONSTRAINTS)
	touch $@

$(VENV)/.serve: $(VENV)/.torch pyproject.toml setup.py
	$(BIN)/python -m pip install -q -e '.[nf4]' $(CONSTRAINTS)
	touch $@

$(VENV)/.dev: $(VENV)/.torch pyproject.toml setup.py
	$(BIN)/python -m pip install -q -e '.[dev]' $(CONSTRAINTS)
	touch $@ $(VENV)/.serve

build/clients/.made: tests/clients/requirements.txt
	test -x build/clients/bin/python || $(PYTHON) -m venv build/clients
	build/clients/bin/python -m pip install -q -r tests/clients/requirements.txt
	touch $@

clean:
	rm -rf $(VENV) build dist tests/clients/node/node_modules *.egg-info server/kernels/cpu/_kernels.so
