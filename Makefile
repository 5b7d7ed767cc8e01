# Everything runs in .venv, made by the first command that needs it. PYTHON is the interpreter it is made of;
# TORCH_SPEC, if set, is what pip installs as torch (see tools/bootstrap.py); OLDEST is that of test-oldest, whose
# Triton's interpreter needs an older NumPy.
PYTHON ?= python3
VENV ?= .venv
OLDEST ?= torch==2.11.0 triton==3.6.0 numpy<2.4

.PHONY: quickstart test test-oldest chaos check clean

quickstart: ## the whole job on this machine's CPU: corpus, tokenizer, train, resume, convert, generate
	$(PYTHON) tools/bootstrap.py --venv $(VENV) quickstart
	$(VENV)/bin/python examples/quickstart/run.py

test: ## the whole test suite; ARGS goes to pytest
	$(PYTHON) tools/bootstrap.py --venv $(VENV) dev
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest $(ARGS)

test-oldest: ## the suite with the oldest torch that setup.py allows, in an environment of its own; not part of .ci/run
	TORCH_SPEC="$(OLDEST)" $(PYTHON) tools/bootstrap.py --venv .venv-oldest dev
	OMP_NUM_THREADS=1 .venv-oldest/bin/python -m pytest $(ARGS)

chaos: ## real faults in real runs, for about half an hour; the table goes into docs/reliability.md. ARGS: see --help
	$(PYTHON) tools/bootstrap.py --venv $(VENV) dev
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m tests.chaos $(ARGS)

check: ## format, lint, types, spelling
	$(PYTHON) tools/bootstrap.py --venv $(VENV) dev
	PATH="$(abspath $(VENV))/bin:$$PATH" bash tools/check.sh

clean: ## the environment and everything built
	rm -rf $(VENV) .venv-oldest build quickstart-out *.egg-info megatron_aquila/*.so .mypy_cache .ruff_cache .pytest_cache
