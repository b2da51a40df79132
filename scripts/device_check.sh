#!/usr/bin/env bash
# Checks this checkout on the machine's accelerator, with the Python packages that are there.
#   scripts/device_check.sh [FOLDER] [--seconds 460] [--only TEXT]...
# Installs and downloads nothing. PYTHON is the interpreter (default: python3); device-check.json
# goes to FOLDER (default: $OUT). Exits 1 where a check failed or did not fit into the time.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
export XLA_PYTHON_CLIENT_PREALLOCATE=false HF_HUB_OFFLINE=1
exec "${PYTHON:-python3}" "$root/scripts/device_check.py" "$@"
