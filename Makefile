# make train, make test, make test-slow: each sets up what it needs in .venv on a fresh machine (Python 3.11+) and does its job.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed

.PHONY: setup train test test-slow lint docs constraints clean

setup: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed: make PYTHON=python3.12"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt --editable '.[demo,docs,offline,onnx,test]'
	@$(BIN)/python -m compileall -qq -j 0 .venv/lib || true  # on all cores, pip takes one; templates in packages do not compile
	@touch $@

train: setup
	$(BIN)/dml train $(ARGS)

# Tests wait for processes that they start, so that there is work for more of them at a time than a small machine has cores.
# Those of tests/cuda come last, in a process that sees the GPUs; without one they are skipped.
test: setup
	$(BIN)/python -m pytest -m "not slow" -n 3 --dist loadscope --no-loadscope-reorder $(ARGS)
	$(BIN)/python -m pytest tests/cuda

# Lost machines, killed sweeps and job servers: what takes a minute or more each, by its nature.
test-slow: setup
	CHAOS_KILLS=$${CHAOS_KILLS:-5} $(BIN)/python -m pytest -m slow -n 2 --dist loadgroup $(ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

# The newest versions that fit pyproject.toml; what `make test` then finds wrong is mended before they are committed.
constraints:
	rm -rf .venv-newest
	$(PYTHON) -m venv .venv-newest
	.venv-newest/bin/python -m pip install --quiet --editable '.[demo,docs,offline,onnx,test]'
	{ sed -n '/^#/p' constraints.txt; .venv-newest/bin/python -m pip freeze --exclude-editable; } > constraints.new
	mv constraints.new constraints.txt
	rm -rf .venv-newest

clean:
	rm -rf .venv
