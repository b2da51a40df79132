#!/usr/bin/env bash
# Builds the container and converts and checks a tiny model in it. Needs docker and the network.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
docker build --tag gemma-convert .

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
convert() { docker run --rm --network none --volume "$folder:/data" --user "$(id -u):$(id -g)" gemma-convert "$@"; }
convert tiny 31b hf
convert to-native hf out --format maxtext --scan-layers
convert verify out --against hf
convert logit-check hf out
convert to-hf out back
diff -r "$folder/hf" "$folder/back"
