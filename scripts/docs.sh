#!/usr/bin/env bash
# Builds the documentation into site/; a warning is an error. Arguments go to mkdocs build.
# The reference of the commands is written first, from the command line itself.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
scripts/setup.sh

.venv/bin/python scripts/commands_page.py
export NO_MKDOCS_2_WARNING=1 # of a future release that is not installed
exec .venv/bin/python -m mkdocs build --strict "$@"
