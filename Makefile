# Two commands do all the set-up: `make demo` and `make test`. What is installed is installed once.
PYTHON ?= python3
# `make demo TORCH=...` takes another build, such as TORCH='torch --index-url URL'.
TORCH ?=
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
DEMO_OUTPUT ?= output/demo
PHI_2_CONFIG ?= config.json
PHI_2_FOLDER ?= phi-2

.PHONY: setup demo test campaigns browser screenshots lint check format docs models full-size placement export-memory export-gguf \
  benchmarks busy peers mlx-peers mac gpu fuzz serve-hour torture disk-faults memory-limits kernels scale gpu-kernels clean

setup: $(INSTALLED)

# A torch wheel that pip finds on this machine is taken as it is: an unqualified torch may bring
# gigabytes of CUDA packages to a machine without a GPU. Elsewhere the pinned release is fetched.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(if $(TORCH),$(BIN)/pip install -q $(TORCH),-@$(BIN)/pip install -q --no-index --no-deps torch 2>/dev/null || true)
	$(BIN)/pip install -q $(if $(TORCH),,-c constraints.txt) -e '.[dev]'
	@touch $@

demo: setup
	$(BIN)/phitune demo --output_dir $(DEMO_OUTPUT) --overwrite

# On every core, whatever is left of a worker's tests going to one that has none. Without the tests
# that take long: those are the campaigns, which CI runs too. Byte code is kept, also where containers
# have set that variable: every worker would compile all tests, and every process all of the package.
PYTEST := PYTHONDONTWRITEBYTECODE= $(BIN)/pytest -n logical --dist worksteal

test: setup
	$(PYTEST) -m "not campaign"

campaigns: setup
	$(PYTEST) -m campaign

# For the tests of the page, which skip without it.
browser:
	@command -v chromium >/dev/null || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null \
	  && apt-get update -qq && apt-get install -y -qq chromium >/dev/null; } \
	  || echo "there is no chromium here; the tests of the page are skipped"

lint: setup
	$(BIN)/ruff format --check src tests tools benchmarks
	$(BIN)/ruff check src tests tools benchmarks
	$(BIN)/mypy

check: lint test

format: setup
	$(BIN)/ruff format src tests tools benchmarks
	$(BIN)/ruff check --fix src tests tools benchmarks

# The parts of docs/training.md and the configurations in examples/ that follow from the code.
docs: setup
	$(BIN)/python tools/build_docs.py

# The pictures in docs/ui; needs Chromium.
screenshots: setup
	$(BIN)/pip install -q pillow
	$(BIN)/python tools/take_screenshots.py

# Trains the tiny models that ship with the package again; it took 15 minutes on two busy cores.
models: setup
	$(BIN)/python tools/build_tiny_models.py

# Peak memory of loading and training a full-size model; needs a config.json of Phi-2.
full-size: setup
	$(BIN)/python benchmarks/full_size.py --config $(PHI_2_CONFIG)

# A full-size model whose base lies in its files, in a cgroup of 4 GiB, which needs root; needs a
# config.json of Phi-2. Ten minutes.
placement: setup
	$(BIN)/python benchmarks/placement.py --config $(PHI_2_CONFIG)

# Peak memory of merging a full-size model; needs a folder with Phi-2's config.json and tokenizer.
export-memory: setup
	$(BIN)/python benchmarks/export_memory.py --model $(PHI_2_FOLDER)

# Peak memory of writing full-size llama.cpp files; needs the same folder.
export-gguf: setup
	$(BIN)/python benchmarks/export_gguf.py --model $(PHI_2_FOLDER)

# What is claimed of memory and numerics, measured again; about half an hour.
benchmarks: setup
	$(BIN)/python benchmarks/memory_plan.py
	$(BIN)/python benchmarks/mlx_memory.py
	$(BIN)/python benchmarks/saved_bytes.py
	$(BIN)/python benchmarks/loss_curve.py
	$(BIN)/python benchmarks/small_files.py
	$(BIN)/python benchmarks/scaling.py
	$(BIN)/python benchmarks/layer_proposal.py
	$(BIN)/python benchmarks/faq_split.py
	$(BIN)/python benchmarks/first_ten_minutes.py
	$(BIN)/python benchmarks/cpu_gemm.py
	$(BIN)/python benchmarks/cpu_compile.py
	$(BIN)/python benchmarks/decode.py
	$(BIN)/python benchmarks/serve.py
	$(BIN)/python benchmarks/serve_llama.py
	$(BIN)/python benchmarks/data_scale.py
	$(BIN)/python benchmarks/max_steps.py
	$(BIN)/python benchmarks/data_report.py

# Twenty thousand damaged data files, as many model and adapter folders, as many odd settings and
# requests to the server; an hour.
fuzz: setup
	$(BIN)/python benchmarks/fuzz_settings.py
	$(BIN)/python benchmarks/fuzz_data.py
	$(BIN)/python benchmarks/fuzz_models.py
	$(BIN)/python benchmarks/fuzz_templates.py
	$(BIN)/python benchmarks/fuzz_serve.py

# An hour of random traffic to the server, at two fifths of a core, and schemathesis beside it.
serve-hour: setup
	$(BIN)/python -m pip install -q schemathesis
	$(BIN)/python benchmarks/serve_hour.py

# A hundred kills, each run gone on with to its end; some minutes.
torture: setup
	$(BIN)/python benchmarks/torture.py

# Several processes: cost, speed, kills, two machines as network namespaces, which need root. Twenty
# minutes.
scale: setup
	$(BIN)/python benchmarks/scale.py

# Two hundred runs on disks that fill up or fail; needs the right to mount a tmpfs.
disk-faults: setup
	$(BIN)/python benchmarks/disk_faults.py

# Runs under real limits of memory that they exceed; the cgroups among them need root. Five minutes.
memory-limits: setup
	$(BIN)/python benchmarks/memory_limits.py

# The numeric tests under the kernels of other processors; ten minutes.
kernels: setup
	$(BIN)/python benchmarks/kernels.py

# Training on a busy machine; a quarter of an hour on an idle one.
busy: setup
	$(BIN)/python benchmarks/busy.py --demo

# phitune beside its peers, which it installs into output/peers-env; about an hour on an idle machine.
peers: setup
	$(BIN)/python benchmarks/cpu_peers.py

# phitune on MLX beside mlx-lm, which it installs into output/mlx-peers-env; small models on a CPU.
mlx-peers: setup
	$(BIN)/python benchmarks/mlx_pieces.py
	$(BIN)/python benchmarks/mlx_peers.py

# Everything on a Mac with Apple Silicon, in 15 minutes.
mac: setup
	$(BIN)/python benchmarks/mac.py

# The kernels for NVIDIA GPUs, compiled for five kinds of cards; needs none. Ten minutes.
gpu-kernels: setup
	$(BIN)/python benchmarks/gpu_kernels.py

# Everything on an NVIDIA GPU, in eight minutes.
gpu: setup
	$(BIN)/python benchmarks/gpu.py

clean:
	rm -rf $(VENV) output .mypy_cache .ruff_cache .pytest_cache .hypothesis
