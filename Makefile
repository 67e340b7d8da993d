# Three commands do everything: `make demo`, `make test` and `make lint`. Environments are made on first use.
PYTHON ?= python3.11
# Axolotl 0.21 needs Python 3.12; its tests run where one is found.
PYTHON312 ?= $(shell command -v python3.12 >/dev/null 2>&1 && python3.12 --version >/dev/null 2>&1 && echo python3.12 || ls $${PYENV_ROOT:-$$HOME/.pyenv}/versions/3.12*/bin/python 2>/dev/null | tail -1)
# Tests side by side; each keeps to one thread.
JOBS ?= 2
PYTEST = -m pytest -q -n $(JOBS) --dist worksteal --durations 10
PIP_FLAGS = -q --disable-pip-version-check

LINT = .venv-lint/bin

.PHONY: setup demo lint format test test-fast test-axolotl test-axolotl-next test-trl test-llamafactory audit docs clean

setup: .venv/.done .venv-llamafactory/.done

.venv/.done: pyproject.toml
	$(PYTHON) -m venv .venv
	.venv/bin/pip install $(PIP_FLAGS) torch==2.13.0
	.venv/bin/pip install $(PIP_FLAGS) axolotl==0.19.0
	.venv/bin/pip install $(PIP_FLAGS) -e '.[dev]'
	touch $@

.venv-llamafactory/.done: pyproject.toml
	$(PYTHON) -m venv .venv-llamafactory
	.venv-llamafactory/bin/pip install $(PIP_FLAGS) torch==2.11.0 torchaudio==2.11.0 torchvision==0.26.0 llamafactory==0.9.5 bitsandbytes
	.venv-llamafactory/bin/pip install $(PIP_FLAGS) -e '.[dev]'
	touch $@

.venv-axolotl-next/.done: pyproject.toml
	$(PYTHON312) -m venv .venv-axolotl-next
	.venv-axolotl-next/bin/pip install $(PIP_FLAGS) torch==2.13.0 axolotl==0.21.0
	.venv-axolotl-next/bin/pip install $(PIP_FLAGS) -e '.[dev]'
	touch $@

# An environment of its own, made in seconds: the checks read the source and need neither torch nor a host.
.venv-lint/.done: pyproject.toml
	$(PYTHON) -m venv .venv-lint
	$(LINT)/pip install $(PIP_FLAGS) 'pip>=25.1'
	$(LINT)/pip install $(PIP_FLAGS) --group lint
	touch $@

lint: .venv-lint/.done
	$(LINT)/ruff check .
	$(LINT)/ruff format --check .
	$(LINT)/mypy
	NO_MKDOCS_2_WARNING=1 $(LINT)/mkdocs build --strict --quiet

format: .venv-lint/.done
	$(LINT)/ruff check --fix .
	$(LINT)/ruff format .

demo: .venv/.done
	.venv/bin/python -m demo

test: test-axolotl test-trl test-llamafactory test-axolotl-next

# The fast tests: the core alone, no host (under two minutes).
test-fast: .venv/.done
	.venv/bin/python $(PYTEST) tests -m "not slow" --ignore tests/hosts/axolotl --ignore tests/hosts/trl --ignore tests/hosts/llamafactory

test-axolotl: .venv/.done
	.venv/bin/python $(PYTEST) tests --ignore tests/hosts/trl --ignore tests/hosts/llamafactory

test-trl: .venv/.done .venv-llamafactory/.done
	.venv/bin/python $(PYTEST) tests/hosts/trl
	.venv-llamafactory/bin/python $(PYTEST) tests/hosts/trl

test-llamafactory: .venv-llamafactory/.done
	.venv-llamafactory/bin/python $(PYTEST) tests/hosts/llamafactory

ifeq ($(PYTHON312),)
test-axolotl-next:
	@echo "No Python 3.12 was found (looked for python3.12 and pyenv's), so the tests on Axolotl 0.21 did NOT run. Set PYTHON312=<path> to run them."
else
test-axolotl-next: .venv-axolotl-next/.done
	.venv-axolotl-next/bin/python $(PYTEST) tests/hosts/axolotl/test_end_to_end.py tests/hosts/axolotl/test_trainers.py tests/hosts/axolotl/test_golden_axolotl.py tests/hosts/trl
endif

# Known vulnerabilities of our direct dependencies; asks PyPI's advisory service.
audit: .venv/.done
	.venv/bin/pip install $(PIP_FLAGS) pip-audit
	.venv/bin/python -c "import tomllib; print('\n'.join(tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies']))" > .venv/direct.txt
	.venv/bin/pip-audit -r .venv/direct.txt

docs: .venv-lint/.done
	NO_MKDOCS_2_WARNING=1 $(LINT)/mkdocs build --strict

clean:
	rm -rf .venv .venv-lint .venv-llamafactory .venv-axolotl-next demo/build site
