#!/usr/bin/env bash
# Converts one checkpoint to MaxText and checks its logits; exits with logit-check's code.
#   scripts/convert_and_check.sh MODEL HF_PATH OUT
# MODEL is e2b, e4b, 26b-a4b or 31b. 26b-a4b and 31b are converted unscanned (OUT/unscanned) and
# scanned (OUT/scanned), E2B and E4B unscanned alone, as MaxText has it.
# GEMMA_CONVERT is the command (default: gemma-convert); CHECK_OPTIONS goes to logit-check.
set -euo pipefail

if [ $# -ne 3 ]; then
  sed -n '2,6s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
model=$1 source=$2 out=$3
convert=${GEMMA_CONVERT:-gemma-convert}

case $model in
  e2b | e4b) forms=(unscanned) ;;
  26b-a4b | 31b) forms=(unscanned scanned) ;;
  *) echo "unknown model $model: e2b, e4b, 26b-a4b or 31b" >&2; exit 2 ;;
esac

found=$($convert inspect "$source" --json | sed -n 's/^  "family": "\(.*\)",$/\1/p')
if [ "$found" != "$model" ]; then
  echo "$source is ${found:-no Gemma 4}, not $model" >&2
  exit 3
fi

for form in "${forms[@]}"; do
  option=--no-scan-layers
  [ "$form" = scanned ] && option=--scan-layers
  $convert to-native "$source" "$out/$form" --format maxtext "$option"
  # shellcheck disable=SC2086
  $convert logit-check "$source" "$out/$form" ${CHECK_OPTIONS:-}
done
