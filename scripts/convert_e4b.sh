#!/usr/bin/env bash
# Converts Gemma 4 E4B and checks its logits: scripts/convert_e4b.sh HF_PATH OUT [LAYOUT]
exec "$(dirname "${BASH_SOURCE[0]}")/convert_and_check.sh" e4b "$@"
