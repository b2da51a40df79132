#!/usr/bin/env bash
# Asks the Python Packaging Advisory Database about every pinned package. Needs the network.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder"
"$folder/bin/python" -m pip install --quiet pip-audit
"$folder/bin/pip-audit" --strict --no-deps --disable-pip --requirement scripts/constraints.txt
