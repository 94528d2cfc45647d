# The two commands of a newcomer are `make quickstart` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: quickstart test test-all ci-slow crash-test lint format audit clean

# The stamp names what was installed, so that a changed pin installs again.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

quickstart: $(VENV)/.installed
	$(BIN)/alignment run recipes/quickstart.yaml

test: $(VENV)/.installed-dev
	$(BIN)/pytest -n 2 --dist worksteal -m 'not slow and not ci_slow'

test-all: $(VENV)/.installed-dev
	$(BIN)/pytest -m 'slow or ci_slow'
	$(MAKE) test

ci-slow: $(VENV)/.installed-dev
	$(BIN)/pytest -m ci_slow

# 200 kills and every kind of damage; prints its seed, and `make crash-test SEED=...` draws the same again.
crash-test: $(VENV)/.installed-dev
	$(BIN)/python tests/crash $(if $(SEED),--seed $(SEED))

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Known vulnerabilities of the locked dependencies. It needs the network, and fails where one could not be looked up.
audit: $(VENV)/audit/bin/pip-audit
	$(VENV)/audit/bin/pip-audit --strict --disable-pip --no-deps --progress-spinner off -r constraints.txt

# Apart from the others: what it needs must not decide what is tested.
$(VENV)/audit/bin/pip-audit:
	$(PYTHON) -m venv $(VENV)/audit
	$(VENV)/audit/bin/pip install --quiet --disable-pip-version-check 'pip-audit>=2.10,<3'

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
