# `make help` lists the targets. Everything is set up in ./.venv; nothing else on the machine is touched.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.DEFAULT_GOAL := help
.PHONY: help setup demo lab test check bench gpu notebooks pictures clean

help:  ## list the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## (.*)/  make \1\t\2/' | expand -t 20

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "specdec_lab needs Python 3.11 or newer; \
	$(PYTHON) is $$($(PYTHON) --version 2>&1). Name another one: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.base: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing specdec_lab and what it needs into $(VENV) (a few minutes the first time)"
	$(PIP_INSTALL) --editable .
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing specdec_lab with its test tools into $(VENV) (a few minutes the first time)"
	$(PIP_INSTALL) --editable ".[test,e2e,notebook,report,check,kernels-ci]"
	@touch $@ $(VENV)/.base

setup: $(VENV)/.dev  ## install everything, tools for tests and notebooks included

demo: $(VENV)/.base  ## the main job on this machine: profile, tune, write a policy, say what it means
	$(BIN)/specdec-lab demo

lab: $(VENV)/.dev  ## open the notebooks in JupyterLab
	$(BIN)/jupyter lab --notebook-dir notebooks

# The browser first and alone; then two files at a time, each on one thread: whoever tests several asks for them.
test: $(VENV)/.dev  ## run all tests, notebooks and browser included
	$(BIN)/python -m pytest tests/e2e
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests --ignore tests/e2e --numprocesses 2 --dist loadfile
	$(BIN)/python -m pytest --nbmake --nbmake-timeout=300 notebooks

check: $(VENV)/.dev  ## lint and types
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(VENV)/.dev  ## race ours against other engines; a peer whose tokens differ gets no speed
	$(BIN)/specdec-lab bench race

# A CUDA build of torch is the user's own: it is used where it is, nothing is installed beside it, least of all another Triton.
HAS_CUDA := import sys, torch; sys.exit(torch.version.cuda is None)
gpu:  ## measure this machine's GPU in at most ten minutes (STAGES="calibrate kernels", or STAGES=--rehearse without a GPU)
	@python=; for candidate in "$(PYTHON)" "$(BIN)/python"; do \
	    if "$$candidate" -c '$(HAS_CUDA)' >/dev/null 2>&1; then python="$$candidate"; break; fi; done; \
	if [ -z "$$python" ]; then for candidate in "$(BIN)/python" "$(PYTHON)"; do \
	    if "$$candidate" -c 'import torch' >/dev/null 2>&1; then python="$$candidate"; break; fi; done; fi; \
	if [ -z "$$python" ]; then \
	    echo "make gpu needs a Python with torch: $(PYTHON) has none. Name another one (make gpu PYTHON=...), or install the CUDA"; \
	    echo "build of torch, transformers and numpy there. It installs nothing itself. Without a GPU: make setup, then"; \
	    echo "make gpu STAGES=--rehearse"; exit 1; fi; \
	PYTHONPATH=".:kernels$${PYTHONPATH:+:$$PYTHONPATH}" "$$python" -m specdec_lab gpu $(STAGES)

notebooks: $(VENV)/.dev  ## run the notebooks again and store their outputs
	$(BIN)/python -m nbconvert --to notebook --execute --inplace --ExecutePreprocessor.store_widget_state=False --ExecutePreprocessor.record_timing=False notebooks/*.ipynb

pictures: $(VENV)/.dev  ## take the pictures of the README again, in a real browser, from the recorded run in tuning_db
	SPECDEC_ARTEFACTS=notebooks/pictures $(BIN)/python -m pytest tests/e2e -k recorded

clean:  ## remove the environment and all caches
	rm -rf $(VENV) runs build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
