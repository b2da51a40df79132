#!/usr/bin/env bash
# Converts Gemma 4 E2B to MaxText and checks its logits: scripts/convert_e2b.sh HF_PATH OUT
exec "$(dirname "${BASH_SOURCE[0]}")/convert_and_check.sh" e2b "$@"
