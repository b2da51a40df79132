#!/usr/bin/env bash
# Plants every mistake of tests/mutations and prints which check found it, and at what KL.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
scripts/setup.sh

report=$(mktemp)
trap 'rm -f "$report"' EXIT
GEMMA_CONVERT_MUTATIONS=$report .venv/bin/python -m pytest \
  --numprocesses "${PYTEST_WORKERS:-2}" tests/mutations "$@"
.venv/bin/python - "$report" <<'END'
import collections, json, math, sys

lines = [json.loads(line) for line in open(sys.argv[1], encoding="utf-8")]
lines.sort(key=lambda one: (one["sense"], one["layout"], one["mistake"]))
for one in lines:
    kl = "" if one["kl"] is None else f"{one['kl']:.1e}"
    print(f"{one['sense']:8}  {one['layout']:9}  {kl:>8}  {one['mistake']}: {one['by']}")
print()
score = collections.Counter((one["sense"], one["by"].partition(":")[0]) for one in lines)
for (sense, by), count in sorted(score.items()):
    print(f"{count:4} in a {sense} one, found by {by}")
unseen = [one for one in lines if one["kl"] is not None and one["kl"] <= 1e-5]
print(f"{len(lines)} mistakes planted, all found; logits alone miss {len(unseen)}")
END
