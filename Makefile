# Everything a reviewer runs: format, lint, types, tests.
check:
	ruff format --check .
	ruff check .
	mypy
	pytest

.PHONY: check
