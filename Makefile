# Two commands do everything on a fresh machine: `make demo` and `make test`. The rest is for those who work here.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# Left alone where it is set: the number of test processes. Two cores, two processes.
JOBS   ?= 2

.PHONY: setup demo demo-effb4 demo-fashion test test-slow lint peers clean
.PHONY: cpp cpp-packages cpp-peers cpp-python test-cpp test-cpp-sanitizers fuzz lint-cpp

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
	$(BIN)/pytest -m "not slow and not cpp" $(SIGNALS)
	$(BIN)/pytest -m "not slow and not cpp" -n $(JOBS) --dist loadfile $(SIGNALS:%=--ignore=%)

# Kill tests, the base install in an environment of its own, damaged images by the thousand.
test-slow: setup
	$(BIN)/pytest -m "slow and not cpp" -n $(JOBS) --dist loadfile

lint: setup lint-cpp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Where there is a clang-format (Debian 12 has 14; others may lay lines out in another way).
lint-cpp:
	@if command -v clang-format > /dev/null; then find runtime/cpp benchmarks -name '*.[ch]' -o -name '*.[ch]pp' \
	    | xargs --no-run-if-empty clang-format --style=file:runtime/cpp/.clang-format --dry-run --Werror; \
	else echo "no clang-format here: the layout of runtime/cpp was not checked"; fi

# The C++ runtime. All that it needs from Debian 12 or Ubuntu 24.04 (as root); OpenVINO is the one in $(VENV).
CPP_PACKAGES := g++ cmake ninja-build pkg-config libjpeg-dev libpng-dev libwebp-dev libmd-dev libdeflate-dev nlohmann-json3-dev \
    libcli11-dev doctest-dev patchelf clang libclang-rt-dev clang-format debootstrap
OPENVINO_DIR  = $$($(BIN)/python -c "from openvino.utils import get_cmake_path; print(get_cmake_path())")
CMAKE        := cmake -G Ninja -S runtime/cpp
FUZZ_SECONDS ?= 60

cpp-packages:
	dpkg -s $(CPP_PACKAGES) > /dev/null 2>&1 || { apt-get update && \
	apt-get install -y --no-install-recommends $(CPP_PACKAGES); }

# Library, programs and tests in build/cpp, Release.
cpp: setup
	$(CMAKE) -B build/cpp -DOpenVINO_DIR="$(OPENVINO_DIR)" -DPython3_EXECUTABLE="$(abspath $(BIN))/python"
	cmake --build build/cpp -j $(JOBS)

# The C++ engine as a module for Python, in $(VENV): optional. It compiles the runtime's sources into itself.
cpp-python: $(VENV)/.cpp-python

$(VENV)/.cpp-python: $(VENV)/.installed runtime/cpp/CMakeLists.txt \
    $(wildcard runtime/cpp/python/* runtime/cpp/src/* runtime/cpp/include/edgedistill/*)
	CMAKE_BUILD_PARALLEL_LEVEL=$(JOBS) $(BIN)/pip install --quiet --disable-pip-version-check --force-reinstall --no-deps \
	    ./runtime/cpp/python
	touch $@

test-cpp: cpp cpp-python
	ctest --test-dir build/cpp --output-on-failure --no-tests=error
	$(BIN)/pytest -m cpp

# AddressSanitizer with UndefinedBehaviorSanitizer, then ThreadSanitizer, each in a build of its own.
SANITIZED := -DCMAKE_BUILD_TYPE=RelWithDebInfo -DEDGEDISTILL_PROGRAMS=OFF
test-cpp-sanitizers: setup
	for check in SANITIZE TSAN; do \
	    $(CMAKE) -B build/cpp-$$check $(SANITIZED) -DEDGEDISTILL_$$check=ON -DOpenVINO_DIR="$(OPENVINO_DIR)" \
	        -DPython3_EXECUTABLE="$(abspath $(BIN))/python" && \
	    cmake --build build/cpp-$$check -j $(JOBS) && \
	    ctest --test-dir build/cpp-$$check --output-on-failure --no-tests=error || exit 1; \
	done

# Every target for FUZZ_SECONDS, from the corpus in the tree; what it finds on the way stays in build/.
fuzz: setup
	CC=clang CXX=clang++ $(CMAKE) -B build/cpp-fuzz $(SANITIZED) -DEDGEDISTILL_FUZZ=ON -DOpenVINO_DIR="$(OPENVINO_DIR)"
	cmake --build build/cpp-fuzz -j $(JOBS)
	for target in build/cpp-fuzz/bin/fuzz_*; do \
	    corpus=build/cpp-fuzz/corpus/$${target##*_}; mkdir -p $$corpus; \
	    $$target -max_total_time=$(FUZZ_SECONDS) -timeout=20 -rss_limit_mb=4096 -artifact_prefix=build/cpp-fuzz/ \
	        -dict=runtime/cpp/fuzz/$${target##*_}.dict -print_final_stats=1 $$corpus runtime/cpp/fuzz/corpus/$${target##*_} || exit 1; \
	done

# Peers that ask for other versions live in an environment of their own; bench-fps finds it by itself.
peers: .venv-peers/.installed

.venv-peers/.installed: constraints.txt
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/pip install --quiet --disable-pip-version-check -c constraints.txt openvino-model-api==0.4.7 openvino numpy opencv-python-headless ncnn
	.venv-peers/bin/pip install --quiet --disable-pip-version-check --no-deps pnnx  # its converter is a program; torch is not needed
	touch $@

# What C++ users write instead, for benchmarks/cpp_runtime.py. Needs Debian's libopencv-imgcodecs-dev libopencv-imgproc-dev.
cpp-peers: setup
	cmake -G Ninja -S benchmarks/cpp -B build/cpp-peers -DOpenVINO_DIR="$(OPENVINO_DIR)"
	cmake --build build/cpp-peers -j $(JOBS)

clean:
	rm -rf $(VENV) .venv-peers build dist *.egg-info src/*.egg-info runs/demo runs/demo-*
