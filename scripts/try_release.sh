#!/usr/bin/env bash
# Builds the sdist, and the wheel out of it, and tries each in a bare environment of every Python named.
#   scripts/try_release.sh DIST [PYTHON...]
# DIST is a folder to create. A try converts a tiny model there and back in an empty folder, with the
# plain dependencies alone. PYTHON is an interpreter, by default python3. Needs the network.
set -euo pipefail
if [ $# -lt 1 ]; then
  sed -n '2,5s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
mkdir "$1"
dist=$(cd "$1" && pwd)
shift
[ $# -gt 0 ] || set -- python3

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
unset PYTHONPATH

"$1" -m venv "$folder/build"
"$folder/build/bin/python" -m pip install --quiet build
"$folder/build/bin/python" -m build --outdir "$dist" "$root"

for python in "$@"; do
  for file in "$dist"/*.whl "$dist"/*.tar.gz; do
    rm -rf "$folder/venv" "$folder/empty"
    "$python" -m venv "$folder/venv"
    "$folder/venv/bin/python" -m pip install --quiet "$file"
    mkdir "$folder/empty"
    (
      cd "$folder/empty"
      PATH=$folder/venv/bin:$PATH
      gemma-convert --help > help.txt
      gemma-convert tiny e2b hf > tiny.txt
      gemma-convert to-native hf out --format maxtext > to-native.txt
      gemma-convert verify out --against hf > verify.txt
      gemma-convert to-hf out back > to-hf.txt
      diff -r hf back
    )
    echo "$("$python" --version), ${file##*/}: converted, verified, and every file came back"
  done
done
