# make demo    quantize, export, verify and ask the embedded demo model
# make test    lint, types and the test suite
# make accept  the demo's acceptance: float = Hugging Face, quantized = its simulation, answers kept
# make venv    the environment alone
#
# PYTHON=python3.12 picks the interpreter. torch comes from the index pip is configured for; to take its CPU build
# set PIP_EXTRA_INDEX_URL to PyTorch's CPU index before the first `make`.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
OUT    ?= demo-out

.PHONY: venv demo test accept lint clean

venv: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV) || { echo "make: $(PYTHON) has no venv module; on Debian: apt install python3-venv" >&2; exit 1; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[quant,export,runtime,json,serve,yaml,rtx,dev]'
	touch $@

demo: venv
	$(BIN)/python -m qvlm_export.demo $(OUT)

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# One thread a worker: several torch processes with all cores each spend their time waiting for one another.
test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile --ignore=tests/end_to_end/test_demo.py

# The demo's acceptance: both exports, 1,200 questions; six minutes on two cores.
accept: venv
	$(BIN)/python -m pytest tests/end_to_end/test_demo.py

clean:
	rm -rf $(VENV) $(OUT) .pytest_cache .mypy_cache .ruff_cache
