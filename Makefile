# make demo   train, score and draw a small FLAP on the sounds that ship with the project
# make test   every test but the slow ones and those of the next two lines
# make test-tools   the tests of search, serve, doctor, plan, profile, reports, shards by URL, other
#                   projects' weights, bench/, and of GPU code on a CPU
# make faults       damaged inputs and disturbed runs: a sample
# make lint   ruff and pyright
# make bench  kernel and loading benchmarks on this machine      make gpu   the same on a GPU, in full
# make speedrun   seconds of a training to a target, the median of five seeds: 6 minutes
# make static the kernels' compile report for seven GPUs and predictions, without a GPU
#
# Each but gpu sets up .venv/ first if it is missing or older than pyproject.toml.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready
# Empty it (make CONSTRAINTS= test) to take the newest versions that pyproject.toml allows.
CONSTRAINTS ?= constraints.txt

# Tests start many processes: compiled once, the project is not compiled at each start.
test test-tools faults walks: export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo test test-tools faults walks lint bench gpu speedrun static data setup clean

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "flap_fast needs Python 3.11 or newer, got $$($(PYTHON) -V); try make PYTHON=python3.12"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
	  $(if $(CONSTRAINTS),-c $(CONSTRAINTS)) -e '.[dev,demo,report]'
	@touch $(READY)

data: $(READY)
	$(BIN)/flap prepare demo/manifest.jsonl data/demo

# Stopped with Ctrl-C, the next `make demo` goes on; rm -r runs/demo to start anew.
demo: data
	$(BIN)/flap train configs/demo.yaml --resume
	$(BIN)/flap show configs/demo.yaml --out runs/demo/masking.png
	$(BIN)/flap report runs/demo
	@echo "The run: runs/demo/ (metrics.jsonl, eval.json, checkpoints/, masking.png, report.html)"
	@echo "Curves:  $(BIN)/tensorboard --logdir runs"
	@echo "Ask it:  $(BIN)/flap rank runs/demo demo/audio/sonicpi_ambi_choir.ogg 'a choir sings' 'a drum' 'a guitar'"

TOOLS := tests/bench tests/tools tests/report tests/interchange tests/test_add_one.py \
  tests/training/test_fake_cuda.py tests/training/test_remote_run.py \
  tests/data/test_remote.py tests/data/test_s3.py

test: $(READY)
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --ignore tests/faults \
	  $(addprefix --ignore ,$(TOOLS))

test-tools: $(READY)
	$(BIN)/python -m pytest -n 2 --dist loadfile $(TOOLS)

# Damaged inputs, kills and full disks: a sample. All of them: `pytest tests/faults -m slow`.
faults: $(READY)
	$(BIN)/python -m pytest -n 2 --dist loadfile tests/faults

# Three users' first days, with all that they see: 5 minutes.
walks: $(READY)
	$(BIN)/python -m pytest tests/walks -m slow -s

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

bench: $(READY)
	$(BIN)/python -m pytest bench --benchmark-only --benchmark-columns=median,iqr,rounds

speedrun: data
	$(BIN)/python -m bench.speedrun

static: $(READY)
	$(BIN)/python -m bench.static

# 13 minutes (`--minutes`, `--resume`: docs/kernels.md). Needs torch, triton, pytest and pytest-benchmark
# alone: it runs in whatever Python is active.
gpu:
	PYTHONPATH=.:kernels $(PYTHON) -m bench.gpu

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache
