#!/usr/bin/env bash
# Writes the software bill of materials (CycloneDX, JSON) of a package and all that pip installs with it.
#   scripts/sbom.sh PACKAGE FILE [PYTHON]
# PACKAGE is a wheel, or what else pip takes, and FILE what is written. Needs the network.
set -euo pipefail
if [ $# -lt 2 ]; then
  sed -n '2,4s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${3:-python3}

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
unset PYTHONPATH
for name in package tool; do "$python" -m venv "$folder/$name"; done
"$folder/package/bin/python" -m pip install --quiet "$1"
"$folder/package/bin/python" -m pip uninstall --quiet --yes pip setuptools
"$folder/tool/bin/python" -m pip install --quiet cyclonedx-bom
"$folder/tool/bin/cyclonedx-py" environment "$folder/package" --pyproject "$root/pyproject.toml" \
  --output-reproducible --output-file "$2"
