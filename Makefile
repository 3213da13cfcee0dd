# Everything a fresh machine needs is Python >= 3.10 with venv, pip, make and a C compiler.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test check format clean

# The environment, made once: again only when what it holds has changed.
.venv/.made: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

# Train, convert and score a small GPT and a small BERT on Python's own documentation, on two CPU ranks.
demo: .venv/.made
	$(BIN)/fleetune demo

# Every test; those that need what this machine lacks are skipped with the reason. Those of one process share the cores,
# those with ranks have them to themselves, or their timeouts would measure their neighbours.
test: .venv/.made
	$(BIN)/python -m pytest -n 2 --dist loadfile tests/architecture tests/golden tests/unit
	$(BIN)/python -m pytest tests/distributed tests/e2e tests/slurm

# What is quick to know: style, types, structure, what is rendered and what is said.
check: .venv/.made
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/architecture tests/golden

format: .venv/.made
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf .venv runs .mypy_cache .ruff_cache .pytest_cache
