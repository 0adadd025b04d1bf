# Two commands do everything on a fresh machine: `make demo` and `make test`. The rest is for those who work here.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# Left alone where it is set: the number of test processes. Two cores, two processes.
JOBS   ?= 2

.PHONY: setup demo demo-effb4 demo-fashion test test-slow lint peers clean

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[all,dev]"
	touch $@

# The main job on real photographs (2,624 solar cells), sized for two cores: about 10 minutes after set-up.
demo: setup
	BIN=$(BIN) benchmarks/demo.sh elpv

# The same with the design's own teacher, EfficientNet-B4 from random weights: slower, and weaker without a GPU.
demo-effb4: setup
	BIN=$(BIN) benchmarks/demo.sh elpv-effb4

# The same on Fashion-MNIST (Debian: apt-get install dataset-fashion-mnist).
demo-fashion: setup
	BIN=$(BIN) benchmarks/demo.sh fashion-mnist

# Interrupts and dying loader processes reach a whole process: these files run in one of their own, the rest side by side.
SIGNALS := tests/test_batches_depend_on_the_seed_alone.py tests/test_training_resumes_bit_for_bit.py

test: setup lint
	$(BIN)/pytest -m "not slow" $(SIGNALS)
	$(BIN)/pytest -m "not slow" -n $(JOBS) --dist loadfile $(SIGNALS:%=--ignore=%)

# Kill tests, the base install in an environment of its own, damaged images by the thousand.
test-slow: setup
	$(BIN)/pytest -m slow -n $(JOBS) --dist loadfile

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Peers that ask for other versions live in an environment of their own; bench-fps finds it by itself.
peers: .venv-peers/.installed

.venv-peers/.installed: constraints.txt
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/pip install --quiet --disable-pip-version-check -c constraints.txt openvino-model-api==0.4.7 openvino numpy opencv-python-headless
	touch $@

clean:
	rm -rf $(VENV) .venv-peers build dist *.egg-info src/*.egg-info runs/demo runs/demo-*
