# make demo: train a small model on this machine and sample from it. make test: run the test suite.

PYTHON ?= python3
SCRIPTS := $(if $(filter Windows_NT,$(OS)),Scripts,bin)
BIN := .venv/$(SCRIPTS)
PIP := python -m pip install --quiet --disable-pip-version-check
# set in the environment, not with -c, so that the lock also applies to build dependencies
LOCKED := PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt $(BIN)/$(PIP)
# uv is faster. pip installs torch first, as pip's settings may select CPU builds. make UV= does not use uv
UV := $(if $(shell command -v uv 2>/dev/null),uv)
UV_INSTALL := uv pip install --quiet --compile-bytecode --python $(BIN)/python -c constraints.txt -b constraints.txt
INSTALL := $(if $(UV),$(UV_INSTALL),$(LOCKED))
INSTALLED := .venv/requirements.installed
TESTABLE := .venv/requirements-test.installed
SITE := .venv-docs/requirements.installed
OUT := out-stdlib-char

.PHONY: help install demo serve pictures test test-audio test-latest test-oldest chaos lint docs notebook site lock clean
.DEFAULT_GOAL := help

help: ## list the targets
	@awk -F '## ' '/^[a-z-]+:.*## / {sub(/:.*/, "", $$1); printf "make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(INSTALLED) ## create .venv with the packages for training and sampling

$(INSTALLED): requirements.txt constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
		|| { echo "error: $(PYTHON) is older than 3.10; run: make PYTHON=python3.12 ..." >&2; exit 2; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null \
		|| { echo "error: $(PYTHON) cannot make a .venv; on Debian and Ubuntu: apt install python3-venv" >&2; exit 2; }
	$(PYTHON) -m venv .venv
	$(if $(UV),$(LOCKED) torch)
	$(INSTALL) -r requirements.txt
	@touch $@

$(TESTABLE): requirements-test.txt requirements-serve.txt constraints.txt | $(INSTALLED)
	$(INSTALL) -r requirements-test.txt
	@touch $@

data/stdlib_char/meta.json: | $(INSTALLED)
	$(BIN)/python data/stdlib_char/prepare.py

demo: $(INSTALLED) data/stdlib_char/meta.json ## prepare data, train for a minute or two, and sample; needs no downloads but packages
	$(BIN)/python train.py config/train_stdlib_char.py
	$(BIN)/python sample.py --out_dir=$(OUT) --start="def " --num_samples=3 --max_new_tokens=400
	@echo "These are samples of $(OUT)/ckpt.pt, trained on the source code of Python's standard library"
	@echo "(data/stdlib_char). For more: $(BIN)/python sample.py --out_dir=$(OUT) --start='class ' --temperature=0.5"

serve: $(INSTALLED) ## serve the demo's model as a web page and an API
	$(INSTALL) -r requirements-serve.txt
	$(BIN)/python serve.py --out_dir=$(OUT)

pictures: $(TESTABLE) data/stdlib_char/meta.json ## make the pictures of the docs: two minutes
	$(BIN)/python docs/pictures.py

test: $(TESTABLE) ## run all tests
	$(BIN)/python -m pytest

test-audio: $(TESTABLE) ## test speech: text to speech, transcription, training, sampling aloud; a minute or two
	$(INSTALL) -r requirements-test-audio.txt
	AUDIO=1 $(BIN)/python -m pytest -s -n 0 tests/audio

test-latest: TORCH ?= torch
test-latest: ## run all tests with the newest packages, in .venv-latest; TORCH='torch==2.13.0' pins torch
	$(PYTHON) -m venv .venv-latest
	.venv-latest/$(SCRIPTS)/$(PIP) --upgrade --upgrade-strategy eager '$(TORCH)' -r requirements-test-audio.txt
	.venv-latest/$(SCRIPTS)/python -m pytest

test-oldest: ## run the tests of transformers with its oldest supported version, 5.0, in .venv-oldest
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/$(SCRIPTS)/$(PIP) -r requirements-test.txt transformers==5.0.0 $(shell grep '^torch==' constraints.txt)
	.venv-oldest/$(SCRIPTS)/python -m pytest $$(grep -rl transformers tests --include='test_*.py')

chaos: $(TESTABLE) ## kill a run 60 times at random, and read 4,000 damaged files; a few minutes
	CHAOS_KILLS=60 FUZZ_INPUTS=4000 $(BIN)/python -m pytest -s -n 0 tests/training/test_chaos.py tests/test_fuzz.py tests/test_fuzz_checkpoint.py

lint: $(TESTABLE) ## check code style and formatting
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .

docs: ## write docs/settings.md, the settings reference, and draw docs/architecture.md's diagram
	$(PYTHON) docs/settings.py
	$(PYTHON) docs/architecture.py

notebook: $(TESTABLE) ## run docs/quickstart.ipynb and save its outputs; a few minutes
	$(BIN)/python docs/notebook.py

$(SITE): requirements-docs.txt constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "error: the site needs Python 3.11 or newer; run: make PYTHON=python3.12 site" >&2; exit 2; }
	$(PYTHON) -m venv .venv-docs
	PIP_CONSTRAINT=constraints.txt .venv-docs/$(SCRIPTS)/$(PIP) -r requirements-docs.txt
	@touch $@

site: $(SITE) ## build the documentation as a site in site/; a broken link is an error
	.venv-docs/$(SCRIPTS)/python docs/build_site.py
	.venv-docs/$(SCRIPTS)/zensical build --clean --strict

# Raise torch here, by hand: it is a large download, and has to be tested on a GPU. setuptools and wheel build source
# packages. pyobjc itself pins pyobjc-*. Other package indexes are ignored, as their builds have local versions (+cpu)
lock: TORCH ?= torch==2.13.0
lock: ## write constraints.txt with the newest compatible versions; run make test afterwards
	$(PYTHON) -m venv .venv-lock
	.venv-lock/$(SCRIPTS)/$(PIP) --upgrade uv
	printf '%s\n' '$(TORCH)' setuptools wheel | env -u UV_FIND_LINKS -u UV_INDEX -u UV_EXTRA_INDEX_URL \
		.venv-lock/$(SCRIPTS)/uv pip compile --quiet --upgrade --universal --python-version 3.10 \
		--no-header --no-annotate --output-file .venv-lock/constraints.txt - \
		requirements-test-audio.txt requirements-docs.txt
	@printf '# %s\n' 'The versions that make, the Dockerfile and pip install -c constraints.txt install, for all of' \
		'requirements*.txt on Python 3.10 to 3.13, Linux, macOS and Windows. Made by make lock: do not edit.' \
		> constraints.txt
	sed '/^pyobjc-/d' .venv-lock/constraints.txt >> constraints.txt

clean: ## remove .venv*, the site and caches; keep data and checkpoints
	rm -rf .venv .venv-* .site site .cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +
