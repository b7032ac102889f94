# `make demo` and `make test` do everything on a fresh machine, set-up included.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DEVICE := .venv-device

.PHONY: demo test lint types unit fuzz clean

demo: $(READY)
	$(BIN)/tdfx demo --out build/demo

test: lint types unit

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

# A latency kit runs where there is no PyTorch: in a second environment.
unit: $(READY) $(DEVICE)
	OMP_NUM_THREADS=1 TDFX_DEVICE_PYTHON=$(CURDIR)/$(DEVICE)/bin/python $(BIN)/python -m pytest -n auto --dist loadfile

# Not part of `make test`, where a hundred layers are drawn; some 20 minutes.
fuzz: $(READY)
	TDFX_FUZZ=10000 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -s tests/test_properties_layers.py

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[demo,test,benchmarks]"
	touch $@

$(DEVICE): constraints.txt
	$(PYTHON) -m venv $@
	$@/bin/python -m pip install --quiet -c constraints.txt numpy onnxruntime
	touch $@

clean:
	rm -rf $(VENV) $(DEVICE) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
