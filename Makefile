# Everything a reviewer runs: format, lint, types, tests (about seven minutes on two cores).
check:
	ruff format --check .
	ruff check .
	mypy
	pytest -n 2

.PHONY: check
