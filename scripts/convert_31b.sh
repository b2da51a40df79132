#!/usr/bin/env bash
# Converts Gemma 4 31B and checks its logits: scripts/convert_31b.sh HF_PATH OUT [LAYOUT]
exec "$(dirname "${BASH_SOURCE[0]}")/convert_and_check.sh" 31b "$@"
