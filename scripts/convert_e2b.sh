#!/usr/bin/env bash
# Converts Gemma 4 E2B and checks its logits: scripts/convert_e2b.sh HF_PATH OUT [LAYOUT]
exec "$(dirname "${BASH_SOURCE[0]}")/convert_and_check.sh" e2b "$@"
