#!/usr/bin/env bash
# Converts Gemma 4 12B and checks its logits: scripts/convert_12b.sh HF_PATH OUT [LAYOUT]
exec "$(dirname "${BASH_SOURCE[0]}")/convert_and_check.sh" 12b "$@"
