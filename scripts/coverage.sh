#!/usr/bin/env bash
# Prints which branches of planning, stores and transfer the tests take: scripts/coverage.sh [PERCENT]
# Exits 1 where a test failed, or where a module has less than PERCENT of its branches, 95 by
# default. Commands in processes of their own count; those that a test kills do not. Wants a quiet
# machine: tests/fuzz bounds the time of a case, and counting takes time.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
scripts/setup.sh

least=${1:-95}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/settings" <<END
[run]
branch = true
parallel = true
patch = subprocess
source_pkgs = gemma_convert
relative_files = true
data_file = $folder/data
[report]
include =
    gemma_convert/arrays/*
    gemma_convert/checkpoint/*
    gemma_convert/engine/*
    gemma_convert/mapping/*
    gemma_convert/model/*
    gemma_convert/stores/*
END

modules=(architecture plan table notation region placement inventory values convert export
  verification safetensors staging publishing stores journal resume faults numbers raw_chunks
  processes cluster_processes inspection fast_llm fast_llm_metadata gemma_jax)
modules=("${modules[@]/#/tests/test_}" tests/fuzz/test_{orbax,safetensors,sidecar}_fuzz)
.venv/bin/python -m pytest --numprocesses "${PYTEST_WORKERS:-2}" \
  --every --cov --cov-config="$folder/settings" --cov-report=json:"$folder/report" \
  "${modules[@]/%/.py}"
.venv/bin/python - "$folder/report" "$least" <<'END'
import json, sys

files = json.load(open(sys.argv[1], encoding="utf-8"))["files"]
least, below, taken, every = float(sys.argv[2]), [], 0, 0
for name, file in sorted(files.items()):
    covered, count = file["summary"]["covered_branches"], file["summary"]["num_branches"]
    taken, every = taken + covered, every + count
    share = 100 * covered / count if count else 100.0
    below += [name] if share < least else []
    lines = [f"{start} → {end}" for start, end in file["missing_branches"]]
    print(f"{share:5.1f} %  {covered:3} of {count:3}  {name}  {', '.join(lines)}".rstrip())
print(f"{100 * taken / every:5.1f} %  {taken:3} of {every:3}  all")
sys.exit(f"less than {least:g} % of the branches: {', '.join(below)}" if below else 0)
END
