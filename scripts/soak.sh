#!/usr/bin/env bash
# Reads broken checkpoints for a while, new ones in each run: scripts/soak.sh [CASES]
# CASES is the least number of cases in all, 20000 by default. Exits 1 where one failed, or where
# fewer were run; a failure is printed with the line that runs it again.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
scripts/setup.sh

cases=${1:-20000}
export GEMMA_CONVERT_SOAK_EXAMPLES=$((cases / 22 + 1))
started=$SECONDS
report=$(mktemp)
trap 'rm -f "$report"' EXIT

failed=0
.venv/bin/python -m pytest --numprocesses "${PYTEST_WORKERS:-2}" tests/fuzz | tee "$report" || failed=1
run=$(sed -n 's/^fuzz cases run: \([0-9]*\)$/\1/p' "$report")
echo "soak: ${run:-0} cases in $((SECONDS - started)) s"
[ "$failed" = 0 ] && [ "${run:-0}" -ge "$cases" ]
