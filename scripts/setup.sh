#!/usr/bin/env bash
# Makes .venv with everything that the checks and the tests need. Safe to run again.
# Versions are pinned by scripts/constraints.txt; torch goes in first, so that no looser requirement
# of another package pulls a different build. Python compiles what the commands import here and once,
# whatever PYTHONDONTWRITEBYTECODE says: it is thousands of modules, and ten seconds of each command.
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
  torch=$(grep '^torch==' scripts/constraints.txt)
  .venv/bin/python -m pip install --quiet --no-compile "$torch"
  .venv/bin/python -m pip install --quiet --no-compile --constraint scripts/constraints.txt --editable '.[dev]'
  env -u PYTHONDONTWRITEBYTECODE .venv/bin/python - << 'END'
import importlib, pkgutil
import gemma_convert
from transformers import AutoTokenizer, Gemma4ForConditionalGeneration, Gemma4UnifiedForConditionalGeneration

for module in pkgutil.walk_packages(gemma_convert.__path__, "gemma_convert."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
for name in ("jax.numpy", "orbax.checkpoint", "tensorstore", "safetensors.torch", "torch.nn", "typer.rich_utils"):
    importlib.import_module(name)
END
  echo "$wanted" > .venv/installed
fi
