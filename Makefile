# Every target works on a fresh machine with Python >= 3.10 and pip: it creates .venv and installs what it needs.
# The stamps in .venv make the second call start at once; they expire when a requirement changes.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
WORKERS := 2
REQUIREMENTS := pyproject.toml constraints.txt

# The theme announces its successor at each build; the versions are pinned.
export NO_MKDOCS_2_WARNING := 1

.PHONY: quickstart test test-slow matrix lint docs clean

quickstart: $(VENV)/.installed
	$(BIN)/lightning-hybrid fit --config recipes/quickstart.yaml

# Lint runs beside the tests, on files that they leave alone; pytest's summary comes last, unless lint fails.
test: $(VENV)/.installed-dev
	@$(MAKE) --no-print-directory lint > $(VENV)/lint.log 2>&1 & lint=$$!; \
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m "not slow"; tests=$$?; \
	wait $$lint || { cat $(VENV)/lint.log; exit 1; }; exit $$tests

test-slow: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -m slow

# A few tests with several versions of Python and torch; MATRIX="--torches 2.14" chooses some.
matrix: $(BIN)/python
	$(BIN)/python -m tests.matrix $(MATRIX)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/lint-imports
	$(BIN)/mkdocs build --strict --quiet

# The site in `site/`.
docs: $(VENV)/.installed-dev
	$(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) .matrix runs site

# Some distributions ship Python without the wheels that `venv` takes pip from; there the system's pip fetches it.
$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "lightning-hybrid needs Python >= 3.10, set PYTHON=...")'
	$(PYTHON) -m venv $(VENV) || { \
		$(PYTHON) -m venv --clear --without-pip $(VENV) && $(PYTHON) -m pip --python $(BIN)/python install pip; }

# torch first and by itself, pinned, so that no other package decides which build of it is installed.
$(VENV)/.torch: constraints.txt | $(BIN)/python
	$(PIP) torch
	touch $@

$(VENV)/.installed: $(REQUIREMENTS) $(VENV)/.torch
	$(PIP) --editable .
	touch $@

$(VENV)/.installed-dev: $(REQUIREMENTS) $(VENV)/.torch
	$(PIP) --editable '.[dev]'
	touch $@
