# Two commands: `make demo` sets up and does the main job, `make test` sets up and passes every check.
# Needs Python 3.11 or 3.12 and make; everything else is installed into .venv (and .venv-standalone).

PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
VENV := .venv
STANDALONE := .venv-standalone
# One math thread for the tests: two threads on two cores gain nothing on tiny models.
TEST := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false

.PHONY: demo test test-full test-standalone lint types bench install clean

demo: $(VENV)/installed
	$(VENV)/bin/mixer demo

test: lint types test-full test-standalone

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml
	$(PYTHON) -c 'import sys; assert (3, 11) <= sys.version_info < (3, 13), "needs Python 3.11 or 3.12, got " + sys.version; import venv; venv.create("$(VENV)", with_pip=True)'
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[composer,dev,ray]'
	touch $@

# The mixer and converters alone, without Composer, on the newest torch.
$(STANDALONE)/installed: pyproject.toml
	$(PYTHON) -c 'import venv; venv.create("$(STANDALONE)", with_pip=True)'
	$(STANDALONE)/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0 --editable '.[dev]'
	touch $@

lint: $(VENV)/installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check --quiet .

types: $(VENV)/installed
	$(VENV)/bin/mypy

test-full: $(VENV)/installed
	$(TEST) $(VENV)/bin/python -m pytest

test-standalone: $(STANDALONE)/installed
	$(STANDALONE)/bin/python -c 'import importlib.util as u; assert u.find_spec("composer") is None, "Composer must be absent here"'
	$(TEST) $(STANDALONE)/bin/python -m pytest -m 'not once' tests/mixer tests/converters mixer converters

# An hour; what we compare with is installed into .venv-bench.
bench: $(VENV)/installed
	$(VENV)/bin/python -m benchmarks.peers
	$(VENV)/bin/python -m benchmarks --full

clean:
	rm -rf $(VENV) $(STANDALONE) .venv-bench demo-run .mypy_cache .pytest_cache .ruff_cache
