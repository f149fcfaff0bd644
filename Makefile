# Every target sets up what it needs: a virtual environment in $(VENV), once.
VENV ?= .venv
PYTHON ?=
EXTRAS ?= test,tools,lint,docs,release,transformers
OUTPUT ?= outputs/demo
TOOL ?= memcheck racecheck
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help demo test test-gpu sanitize lint format docs package clean

help:
	@echo "make demo      train a small byte-level language model with NSA and its dense twin"
	@echo "make test      run the CPU tests, with coverage"
	@echo "make test-gpu  run the tests that need an NVIDIA GPU; fails where they cannot run"
	@echo "make sanitize  run a small training step under compute-sanitizer, on an NVIDIA GPU"
	@echo "make lint      check style and types; make format mends style"
	@echo "make docs      build the site of the docs in outputs/site; any warning fails"
	@echo "make package   build sdist and wheel in dist/, and use the wheel in a new environment"
	@echo "make clean     remove the virtual environment and outputs"

$(STAMP): pyproject.toml tools/setup_venv.sh
	@PYTHON="$(PYTHON)" tools/setup_venv.sh "$(VENV)" $(EXTRAS)
	@touch $@

demo: $(STAMP)
	$(PY) tools/train_lm.py --attention both --output $(OUTPUT)

test: $(STAMP)
	$(PY) -m pytest -q -m "not gpu" -n auto --maxprocesses 8 --dist worksteal --benchmark-disable \
		--cov --cov-fail-under=95

# Eight processes, because most of the time is compiling kernels; they take over tests from each
# other, because property tests take minutes. Not -q, which hides the seed. Then, alone, the tests that
# need most of the memory.
test-gpu: $(STAMP)
	NSA_REQUIRE_GPU=1 $(PY) -m pytest -m "gpu and not large" -n 8 --dist worksteal --benchmark-disable
	NSA_REQUIRE_GPU=1 $(PY) -m pytest -m large --benchmark-disable

sanitize: $(STAMP)
	$(PY) tools/sanitize.py $(TOOL)

lint: $(STAMP)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format: $(STAMP)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

# The variable hides an announcement about MkDocs itself.
docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict --site-dir outputs/site
	$(PY) tools/docs_site/dead_links.py outputs/site

package: $(STAMP)
	tools/check_package.sh $(PY) dist

clean:
	rm -rf $(VENV) outputs dist
