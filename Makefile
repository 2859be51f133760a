# `make demo` and `make test` work on a fresh machine: each sets up the environment in .venv first.
PYTHON ?= python3
VENV := .venv/bin

.PHONY: demo fit test check

demo: .venv/ready  ## Pretrain, transfer and compare on drawn shapes: no data, no network, two minutes
	$(VENV)/python -m cifar_transfer demo

fit: .venv/ready  ## The whole recipe on CIFAR-10
	$(VENV)/python -m cifar_transfer.fit

test: .venv/ready  ## The tests, but for the slow ones (ARGS="-m slow") and the longest (ARGS="-m whole"); ARGS are those of pytest
	$(VENV)/python -m pytest $(ARGS)

check: .venv/ready  ## Style, types, and which room may import which
	$(VENV)/ruff format --check .
	$(VENV)/ruff check .
	$(VENV)/mypy
	$(VENV)/lint-imports

.venv/ready: pyproject.toml
	@echo "Setting up .venv: PyTorch and what it needs, about 6 GB."
	test -x $(VENV)/python || $(PYTHON) -m venv .venv
	$(VENV)/python -m pip install --editable ".[test]"
	touch $@
