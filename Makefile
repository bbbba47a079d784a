# Everything a reviewer runs: format, lint, types, tests (7 minutes on two recent cores).
check:
	ruff format --check .
	ruff check .
	mypy
	pytest -n 2

.PHONY: check
