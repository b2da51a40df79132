#!/usr/bin/env bash
# Makes .venv with everything that the checks and the tests need. Safe to run again.
# Versions are pinned by scripts/constraints.txt and go in as they stand there, in two halves at once;
# what another system or Python needs beside them is resolved behind that. Python compiles what the
# commands import here and once, whatever PYTHONDONTWRITEBYTECODE says: it is thousands of modules,
# and ten seconds of each command.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-python3}
if ! "$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))'; then
  echo "Python 3.11 to 3.13 is needed; PYTHON=... chooses another interpreter" >&2
  exit 2
fi

wanted=$(cat pyproject.toml scripts/constraints.txt | cksum)
if [ "$(cat .venv/installed 2>/dev/null)" != "$wanted" ]; then
  [ -x .venv/bin/python ] || "$python" -m venv .venv
  install() { .venv/bin/python -m pip install --quiet --no-compile "$@"; }
  large='^(jaxlib|torch)==' # as much work as a third of the others
  some() { grep -vE "$large" scripts/constraints.txt | awk "NR % 3 $1"; }
  # shellcheck disable=SC2046
  install --no-deps $(grep -E "$large" scripts/constraints.txt) $(some '== 0') &
  # shellcheck disable=SC2046
  install --no-deps $(some '!= 0')
  wait $!
  install --no-build-isolation --constraint scripts/constraints.txt --editable '.[dev]'
  env -u PYTHONDONTWRITEBYTECODE .venv/bin/python - << 'END'
import importlib, multiprocessing, pkgutil
import gemma_convert

def load(name):
    importlib.import_module(name)

models = [f"transformers.models.{name}" for name in (
    "auto.tokenization_auto", "gemma4.modeling_gemma4", "gemma4_unified.modeling_gemma4_unified")]
others = ["jax.numpy", "orbax.checkpoint", "tensorstore", "safetensors.torch", "torch.nn", "typer.rich_utils"]
ours = [module.name for module in pkgutil.walk_packages(gemma_convert.__path__, "gemma_convert.")]
with multiprocessing.get_context("fork").Pool(2) as pool:
    pool.map(load, [*models, *others, *(name for name in ours if not name.endswith("__main__"))], 1)
END
  echo "$wanted" > .venv/installed
fi
