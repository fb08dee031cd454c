# Everything a newcomer types. Needs python3 >= 3.11, make and pip; all else goes into .venv/.

PYTHON ?= python3
BIN := .venv/bin
PINS := deploy/constraints.txt
TORCH := $(shell sed -n 's/^torch==//p' $(PINS))
INSTALLED := .venv/installed
DEMO := demo
# One to two minutes on two cores.
DEMO_TRAINING := --steps 400 --batch 4 --width 256 --depth 4 --heads 4 --patch 4 --learning-rate 2e-3

.DEFAULT_GOAL := help
.PHONY: help setup demo test check fix docs bench clients fuzz chaos wheels clean
.DELETE_ON_ERROR:

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-7s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(INSTALLED) ## virtual environment in .venv/ with everything to run, test and develop

demo: $(INSTALLED) $(DEMO)/corpus ## a small corpus of real videos -> latents with Ray -> snapshot -> a small video DiT trained on it -> a page to look at
	$(BIN)/lathe encode $(DEMO)/corpus $(DEMO)/latents --frames 17 --size 128x128
	$(BIN)/lathe verify $(DEMO)/latents
	$(BIN)/lathe inspect $(DEMO)/latents
	$(BIN)/lathe status $(DEMO)/latents
	$(BIN)/lathe preview $(DEMO)/latents --sheet $(DEMO)/preview.png
	$(BIN)/lathe publish $(DEMO)/latents $(DEMO)/corpus
	$(BIN)/python -m examples.train_dit $(DEMO)/latents@1 $(DEMO)/run $(DEMO_TRAINING)
	$(BIN)/lathe report $(DEMO)/latents@1 --html $(DEMO)/report.html

test: $(INSTALLED) check ## all checks, then the whole test suite
	$(BIN)/python -m pytest -n 4 --max-worker-restart 0 --dist loadfile --no-loadscope-reorder

check: $(INSTALLED) ## format, lint, types and import rules; changes nothing
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

fix: $(INSTALLED) ## format, and repair what the linter can repair
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(INSTALLED) ## write docs/configuration.md and docs/commands.md from the code
	$(BIN)/python -m docs.generate

bench: $(INSTALLED) ## measure what the README claims; one table at the end (BENCH="--quick" only tries everything)
	$(BIN)/python -m benchmarks.run_all $(BENCH)

clients: $(INSTALLED) ## read outputs with Spark, Daft, DataFusion, litdata, Energon and others; needs Java for Spark
	$(BIN)/python benchmarks/clients.py --install .venv-clients

fuzz: $(INSTALLED) ## mutated files and tars through real builds until stopped, or for FUZZ_S=600 seconds
	$(BIN)/python -m tests.fuzz

chaos: $(INSTALLED) ## kills and storage faults through builds, publish, takedown, compact and gc until stopped, or for CHAOS_S=1800 seconds
	$(BIN)/python -m tests.chaos

# What a bare GPU machine lacks for `pytest -m gpu` and for decoders; its torch comes with it. What it has need not be in CARRIED, and is not installed from there.
GPU_PYTHON ?= 3.12
CARRIED ?= av diffusers hypothesis pillow psutil pydantic pytest pytest-timeout pyyaml
# Of what pip adds: the machine has NumPy and safetensors; nothing is fetched with hf_xet. All wheels must stay below 64 MiB.
LEFT_OUT := numpy safetensors hf_xet
# Not named WHEELS: users set that environment variable to a folder of their own for benchmarks/gpu_day.sh; files here are deleted.
GPU_DAY_WHEELS := build/gpu-day-wheels
wheels: $(INSTALLED) ## wheels that benchmarks/gpu_day.sh carries to a GPU machine without a network, into build/gpu-day-wheels/
	rm -f "$(GPU_DAY_WHEELS)"/*.whl
	$(BIN)/pip download --quiet --only-binary=:all: --python-version $(GPU_PYTHON) --implementation cp \
		--platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \
		-c $(PINS) -d "$(GPU_DAY_WHEELS)" $(CARRIED)
	rm -f $(patsubst %,"$(GPU_DAY_WHEELS)"/%-*.whl,$(filter-out $(CARRIED),$(LEFT_OUT)))
	@du -ch "$(GPU_DAY_WHEELS)"/*.whl | tail -n 1

clean: ## remove what make made: .venv/, demo/, caches
	rm -rf .venv $(DEMO) fuzz-failures build *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Made aside and renamed, so that an interrupted run leaves no half corpus that looks whole.
$(DEMO)/corpus: | $(INSTALLED)
	rm -rf $(DEMO)
	$(BIN)/lathe sample $(DEMO)/corpus.partial
	mv $(DEMO)/corpus.partial $@

# torch comes first and by itself: which build of it is right depends on the machine, and pip cannot know.
$(INSTALLED): pyproject.toml $(PINS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "lathe needs python3 >= 3.11, got $$($(PYTHON) --version); set PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	@set -e; \
	if nvidia-smi >/dev/null 2>&1; then \
		echo "== torch $(TORCH): this machine has an NVIDIA GPU, taking the CUDA build"; \
		$(BIN)/pip install 'torch==$(TORCH)'; \
	elif [ "$$(uname -s)" = Darwin ]; then \
		echo "== torch $(TORCH): macOS has one build"; \
		$(BIN)/pip install 'torch==$(TORCH)'; \
	else \
		echo "== torch $(TORCH): no NVIDIA GPU here, taking the CPU build (a tenth of the download)"; \
		$(BIN)/pip install --only-binary=:all: 'torch==$(TORCH)+cpu' \
			|| { echo "== not on the configured index; asking PyTorch's own for the CPU build"; \
			     $(BIN)/pip install --index-url https://download.pytorch.org/whl/cpu 'torch==$(TORCH)+cpu'; }; \
	fi
	@echo "== everything else, pinned by $(PINS)"
	$(BIN)/pip install --quiet -c $(PINS) -e '.[dev]'
	@command -v chromium >/dev/null || echo "== no Chromium: tests of the report page in a browser will be skipped; apt-get install chromium"
	@touch $@
