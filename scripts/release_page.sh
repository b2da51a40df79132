#!/usr/bin/env bash
# Makes the release page of a tag on GitHub, with FILES. A final version moves the tag of its major
# version, such as v1, which `uses: OWNER/gemma-convert@v1` follows.
#   scripts/release_page.sh TAG FILES...
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
tag=$1
shift

notes=$(mktemp)
trap 'rm -f "$notes"' EXIT
python3 scripts/release_notes.py "$tag" > "$notes"
if [[ $tag =~ ^v[0-9]+\.[0-9]+\.[0-9]+$ ]]; then
  gh release create "$tag" --verify-tag --notes-file "$notes" "$@"
  git push --force origin "$tag^{commit}:refs/tags/${tag%%.*}"
else
  gh release create "$tag" --verify-tag --notes-file "$notes" --prerelease "$@"
fi
