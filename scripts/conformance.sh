#!/usr/bin/env bash
# Has the real frameworks load, run, train and save tiny checkpoints that were converted for them,
# converts those back, and compares: scripts/conformance.sh [maxtext] [gemma] [tunix] [fast-llm]
#   --latest                    the newest releases instead of the pinned ones
#   --environments FOLDER       where the frameworks are installed (default: build/conformance)
#   --models "e2b 31b-scanned"  these models alone, in these forms
#   --out FOLDER                where conformance.json and conformance.md go (default: docs)
# Without names, all frameworks are run. Makes one virtual environment a framework, of gigabytes,
# with PYTHON312 (default: python3.12). Exits 1 where a comparison failed, 2 on wrong use.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

usage() {
  sed -n '2,9s/^# \{0,1\}//p' "$root/scripts/conformance.sh" >&2
  exit 2
}

environments=$root/build/conformance releases=pinned names=() options=()
while [ $# -gt 0 ]; do
  case $1 in
    --latest) releases=latest; shift ;;
    --environments) environments=${2:?--environments wants a folder}; shift 2 ;;
    --models | --out) options+=("$1" "${2:?$1 wants a value}"); shift 2 ;;
    -*) usage ;;
    *) [ "$1" != peft ] && [ -f "$root/scripts/conformance/$1.txt" ] || usage; names+=("$1"); shift ;;
  esac
done
if [ ${#names[@]} = 0 ]; then
  for file in "$root"/scripts/conformance/*.txt; do
    name=$(basename "$file" .txt)
    [ "$name" = peft ] || names+=("$name")
  done
fi
mkdir -p "$environments"
environments=$(cd "$environments" && pwd)

# Prints the first Python 3.12 that answers: PYTHON312, python3.12, or one of pyenv's.
python312() {
  local each
  for each in "${PYTHON312:-}" python3.12 "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.12*/bin/python; do
    if [ -n "$each" ] && "$each" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' 2>/dev/null; then
      echo "$each"
      return
    fi
  done
  echo "Python 3.12 is needed for the frameworks; PYTHON312=... names one" >&2
  exit 2
}

# Makes environments/NAME, unless it stands there from the same list of packages. A folder that has
# no list was made by somebody else, and is taken as it is.
#   NAME.txt: every package with its version   NAME.in: what --latest asks for
# What is `# built` is made from its sources, by the packages that stand there.
environment() {
  local lists=$root/scripts/conformance/$1 folder=$environments/$1 wanted python
  [ -x "$folder/bin/python" ] && [ ! -f "$folder/installed" ] && return
  wanted=$releases$([ "$releases" = latest ] && date +%F | cat - "$lists.in" | cksum || cksum < "$lists.txt")
  [ "$(cat "$folder/installed" 2>/dev/null)" = "$wanted" ] && return
  python=$(python312)
  "$python" -m venv --clear "$folder"
  : > "$folder/installed"
  if [ "$releases" = latest ]; then
    sed -n 's/ *# alone$//p' "$lists.in" > "$folder/alone.txt"
    "$folder/bin/python" -m pip install --quiet --no-deps --requirement "$folder/alone.txt"
    grep -v -e '# alone$' -e '# built$' "$lists.in" > "$folder/others.txt"
    "$folder/bin/python" -m pip install --quiet --requirement "$folder/others.txt"
    sed -n 's/ *# built$//p' "$lists.in" > "$folder/built.txt"
  else
    grep -v -e '# built$' "$lists.txt" > "$folder/others.txt"
    "$folder/bin/python" -m pip install --quiet --no-deps --requirement "$folder/others.txt"
    sed -n 's/ *# built$//p' "$lists.txt" > "$folder/built.txt"
  fi
  "$folder/bin/python" -m pip install --quiet --no-deps --no-build-isolation --requirement "$folder/built.txt"
  echo "$wanted" > "$folder/installed"
}

"$root/scripts/setup.sh"
for name in peft "${names[@]}"; do environment "$name"; done
# PEFT runs in .venv, beside transformers, and is not of .venv: nothing else needs it.
PYTHONPATH=$(echo "$environments"/peft/lib/python3.*/site-packages):$root${PYTHONPATH:+:$PYTHONPATH}
export PYTHONPATH JAX_PLATFORMS=cpu HF_HUB_OFFLINE=1
export XLA_FLAGS=--xla_backend_optimization_level=0 # programs run for milliseconds, compile for minutes
unset PYTHONDONTWRITEBYTECODE
JAX_COMPILATION_CACHE_DIR=$(mktemp -d)
export JAX_COMPILATION_CACHE_DIR JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0
export JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES=-1
trap 'rm -rf "$JAX_COMPILATION_CACHE_DIR"' EXIT
"$root/.venv/bin/python" "$root/scripts/conformance/judge.py" --environments "$environments" \
  ${options[@]+"${options[@]}"} "${names[@]}"
