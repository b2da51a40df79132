#!/usr/bin/env bash
# Converts Gemma 4 26B-A4B and checks its logits: scripts/convert_26b_a4b.sh HF_PATH OUT [LAYOUT]
exec "$(dirname "${BASH_SOURCE[0]}")/convert_and_check.sh" 26b-a4b "$@"
