#!/usr/bin/env bash
# The whole way on a tiny Gemma 4 E2B: make it, convert it, check the logits. Downloads no model.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
"$here/scripts/setup.sh"

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
convert="$here/.venv/bin/gemma-convert"

"$convert" tiny e2b "$folder/gemma-4-tiny"
"$convert" to-native "$folder/gemma-4-tiny" "$folder/maxtext" --format maxtext
"$convert" inspect "$folder/maxtext"
"$convert" logit-check "$folder/gemma-4-tiny" "$folder/maxtext"

"$convert" to-native "$folder/maxtext" "$folder/gemma" --format gemma-jax
"$convert" logit-check "$folder/gemma-4-tiny" "$folder/gemma"
"$convert" to-hf "$folder/gemma" "$folder/back"
diff -r "$folder/gemma-4-tiny" "$folder/back" && echo "the original files are back, bit for bit"
