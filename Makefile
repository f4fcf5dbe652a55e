# nash_lab: `make demo` and `make test` are all a fresh machine needs.
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
VENV   ?= .venv
EXTRAS ?= dev,docs
ARGS   ?=
BIN    := $(VENV)/bin
LEAN   := $(VENV)/.lean
READY  := $(VENV)/.ready

# a fault's test waits for half of its time: one process more than there are processors, four at most
WAITING := $(shell n=$$(getconf _NPROCESSORS_ONLN); echo $$(( n < 3 ? n + 1 : 4 )))

# compiled programs are kept between runs; device settings come from the caller
export JAX_COMPILATION_CACHE_DIR ?= $(CURDIR)/.jax_cache
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS ?= 0

.PHONY: help demo test test-faults mutate docs lab export refresh readme constraints clean clean-venv

help:            ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { gsub(/:.*/, "", $$1); printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo '  variables: PYTHON=python3.12 (for a new .venv), ARGS="..." (handed on to the command)'

# the package alone is enough to run it; .ready adds what testing and the site need to the same environment
$(LEAN): pyproject.toml settings.ini constraints.txt constraints-3.12.txt tools/venv.sh
	@echo "installing into $(VENV) ..."
	@PYTHON="$(PYTHON)" tools/venv.sh $(VENV)
	@touch $@

$(READY): $(LEAN)
	@echo "installing $(EXTRAS) into $(VENV) ..."
	@PYTHON="$(PYTHON)" tools/venv.sh $(VENV) $(EXTRAS)
	@touch $@

demo: $(LEAN)      ## the whole life of a small model on this CPU -> runs/demo/report.html
	$(BIN)/nash_lab demo $(ARGS)

test: $(READY)   ## export, clean, every notebook, every test
	$(BIN)/python tools/sync.py --check
	$(BIN)/python -m pytest -n auto --maxprocesses=4 --dist worksteal $(ARGS)

test-faults: $(READY)  ## every fault and attack, the slow ones too
	$(BIN)/python -m pytest -m faults -n $(WAITING) --dist worksteal --durations=10 --ignore tests/test_faults_cost.py $(ARGS)
	$(BIN)/python -m pytest -m faults -s tests/test_faults_cost.py

mutate: $(READY) ## remove one guard after the other: its test has to fail
	$(BIN)/python tools/mutate.py $(ARGS)

docs: $(READY)   ## the site -> _docs/html/index.html
	$(BIN)/python tools/build_docs.py $(ARGS)

lab: $(READY)    ## Jupyter on the notebooks
	$(BIN)/jupyter lab --notebook-dir=nbs $(ARGS)

export: $(READY) ## notebooks -> package, and clean the notebooks
	$(BIN)/python tools/sync.py

refresh: $(READY) ## run notebooks, store their outputs (ARGS="nbs/model/16_mhc.ipynb --with slow")
	$(BIN)/python tools/refresh.py $(ARGS)

readme: $(READY) ## nbs/index.ipynb -> README.md
	$(BIN)/python tools/readme.py $(ARGS)

constraints: $(READY) ## versions of this environment -> constraints.txt or, from Python 3.12 on, constraints-3.12.txt
	$(BIN)/python tools/constraints.py $(ARGS)

clean:           ## what can be made again, but for .venv and runs/
	rm -rf _docs _proc build dist nash_lab.egg-info .pytest_cache .ruff_cache .jax_cache
	find nash_lab tests tools docs nbs -name __pycache__ -o -name .ipynb_checkpoints | xargs rm -rf

clean-venv:      ## the virtual environment
	rm -rf $(VENV)
