#!/usr/bin/env bash
# Lint, strict types and the tests. Arguments go to pytest; --every runs all cases of the large ones.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
scripts/setup.sh
unset PYTHONDONTWRITEBYTECODE # a module is compiled by one process, not by each

.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
.venv/bin/python -m pytest --numprocesses "${PYTEST_WORKERS:-3}" "$@"
