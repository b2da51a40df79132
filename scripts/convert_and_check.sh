#!/usr/bin/env bash
# Converts one checkpoint to a native layout and checks its logits; exits with logit-check's code.
#   scripts/convert_and_check.sh MODEL HF_PATH OUT [LAYOUT]
# MODEL is e2b, e4b, 12b, 26b-a4b or 31b; HF_PATH a folder or a repository of the hub; LAYOUT is
# maxtext (default), gemma-jax, fast-llm or tunix. MaxText gets OUT/unscanned and, but for e2b and e4b,
# OUT/scanned; the others get OUT/LAYOUT.
# GEMMA_CONVERT is the command (default: gemma-convert); CHECK_OPTIONS goes to logit-check.
set -euo pipefail

if [ $# -lt 3 ] || [ $# -gt 4 ]; then
  sed -n '2,7s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
model=$1 source=$2 out=$3 layout=${4:-maxtext}
convert=${GEMMA_CONVERT:-gemma-convert}

case $layout-$model in
  maxtext-e2b | maxtext-e4b) forms=(unscanned) ;;
  maxtext-12b | maxtext-26b-a4b | maxtext-31b) forms=(unscanned scanned) ;;
  *-e2b | *-e4b | *-12b | *-26b-a4b | *-31b) forms=("$layout") ;;
  *) echo "unknown model $model: e2b, e4b, 12b, 26b-a4b or 31b" >&2; exit 2 ;;
esac

found=$($convert inspect "$source" --json | sed -n 's/^  "family": "\(.*\)",$/\1/p')
if [ "$found" != "$model" ]; then
  echo "$source is ${found:-no Gemma 4}, not $model" >&2
  exit 3
fi

for form in "${forms[@]}"; do
  option=--no-scan-layers
  [ "$form" = scanned ] && option=--scan-layers
  $convert to-native "$source" "$out/$form" --format "$layout" "$option"
  # shellcheck disable=SC2086
  $convert logit-check "$source" "$out/$form" ${CHECK_OPTIONS:-}
done
