# Every target works on a bare machine: python3 (3.11 or newer, with venv), apt and pip are all that is assumed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: setup demo test check browser gpu-check bench docs ecosystem package-check clean

setup: $(READY)  ## install everything into .venv

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $(READY)

DEMO := --methods sgd,async-lu:forward-threads=1:backward-threads=2 --seeds 1

demo: $(READY)  ## train a network by SGD and by Async LU (1 forward, 2 backward threads), and print one table
	@if $(BIN)/asyncprop data fetch fashion-mnist; then \
	  $(BIN)/asyncprop compare fashion-mnist $(DEMO) --width 8 --train-samples 12800 --epochs 4; \
	else \
	  echo "Fashion-MNIST cannot be fetched here (see above): training on digits instead"; \
	  $(BIN)/asyncprop compare digits $(DEMO); \
	fi

test: check browser  ## lint, types, and all tests that need no GPU
	$(BIN)/pytest

browser:  ## a headless Chromium, which looks at report pages; without one those tests are skipped, and pytest says so
	@command -v chromium >/dev/null || command -v chromium-browser >/dev/null || command -v google-chrome >/dev/null || \
	  { apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium; } >/dev/null 2>&1 || \
	  echo "chromium cannot be installed here: the tests that show pages in a browser will be skipped"

check: $(READY)  ## lint and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

gpu-check:  ## on a machine with a GPU, in whatever environment is active: its tests, then its benchmark
	PYTHONPATH=src $(PYTHON) -m pytest -m cuda
	PYTHONPATH=src $(PYTHON) -m asyncprop bench gpu

bench: $(READY)  ## throughput of every workload against what the machine can give
	$(BIN)/asyncprop bench engine

docs: $(READY)  ## the documentation site, into build/site
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[docs]'
	$(BIN)/mkdocs build --quiet

ecosystem: $(READY)  ## tests against other libraries of PyTorch's users, which it installs
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[ecosystem]'
	$(BIN)/pytest tests/test_ecosystem.py tests/test_docs.py

PACKAGE := build/package

package-check:  ## wheel and sdist, each installed into a fresh environment and run there, away from the sources
	rm -rf $(PACKAGE) && $(PYTHON) -m venv $(PACKAGE)/tools && $(PACKAGE)/tools/bin/pip install --quiet build
	$(PACKAGE)/tools/bin/python -m build --outdir $(PACKAGE)/dist . > /dev/null
	for file in $(PACKAGE)/dist/*.whl $(PACKAGE)/dist/*.tar.gz; do \
	  $(PYTHON) -m venv --clear $(PACKAGE)/fresh && \
	  $(PACKAGE)/fresh/bin/pip install --quiet --constraint constraints.txt "$$file[tasks,report]" && \
	  ( cd $(PACKAGE) && rm -rf run && fresh/bin/asyncprop --version && \
	    fresh/bin/asyncprop train digits --epochs 2 --trace --quiet --out run && \
	    fresh/bin/asyncprop report run --out run/report.html && fresh/bin/asyncprop trace run --quiet && \
	    fresh/bin/asyncprop reproduce table10 --scale tiny --out run/exhibits ) || exit 1; \
	done

clean:  ## remove the environment
	rm -rf $(VENV)
