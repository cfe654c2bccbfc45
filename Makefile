# `make demo` and `make test` do all the set-up they need; the rest is for people who work on the code.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
# Threads that wait for each other sleep: spinning, they make training several times slower as soon as something else runs.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: install demo test test-fast soak gpu lint format clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	@command -v ffmpeg >/dev/null || if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; \
		then apt-get update -qq && apt-get install -y -qq ffmpeg >/dev/null; \
		else echo "ffmpeg is missing, and nerfstudio needs it for videos; install it (Debian: apt-get install ffmpeg)." >&2; exit 1; fi
	@command -v chromium >/dev/null || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && apt-get update -qq \
		&& apt-get install -y -qq chromium >/dev/null; } \
		|| echo "chromium is missing; the tests that need a browser will be skipped." >&2
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev]'
	@touch $@

demo: install
	$(BIN)/python -m ovs3d_nerfstudio.demo

# Two files at a time: most of the time goes into starting nerfstudio's commands, on one core each.
PYTEST := $(BIN)/python -m pytest --numprocesses 2 --dist loadfile

test: install
	$(PYTEST)

test-fast: install
	$(PYTEST) -m "not slow and not browser"

# Many times the faults that `make test` tries; writes their table into docs/reliability.md.
SOAK ?= 20
soak: install
	OVS3D_SOAK=$(SOAK) $(BIN)/python -m pytest tests/test_fault_extraction.py tests/test_fault_training.py

# For the first GPU that you have: the tests that need one, then what everything takes on it; ten minutes at most, no network.
# Writes benchmarks/results/gpu-*.json and docs/performance.md.
gpu: install
	@$(BIN)/python benchmarks/gpu.py --check
	@status=0; \
		$(BIN)/python -m pytest -m gpu || status=1; \
		$(BIN)/python benchmarks/gpu.py || status=1; \
		exit $$status

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) demo outputs renders exports
