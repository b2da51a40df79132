"""Files of the hub against the digests that the hub announced when they were downloaded.

The hub's cache names each blob by its ETag: the sha256 of a large file, the id of git's blob of a
small one (https://huggingface.co/docs/huggingface_hub/guides/manage-cache).
"""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

from gemma_convert.errors import SourceError
from gemma_convert.stores.remote.source import SMALL_BYTES

_SHA256, _GIT = re.compile(r"[0-9a-f]{64}"), re.compile(r"[0-9a-f]{40}")


def check_announced(snapshot: Path) -> None:
    """Nothing where every file of a snapshot has the digest that the hub announced for it.

    Raises SourceError where one has not. Files that are no links into the cache have none.
    """
    for root, _, files in os.walk(snapshot):
        for file in sorted(files):
            blob = Path(os.path.realpath(Path(root, file)))
            if blob.parent.name == "blobs" and blob.is_file():
                _check(Path(root, file), blob)


def _check(file: Path, blob: Path) -> None:
    if _SHA256.fullmatch(blob.name):
        digest = hashlib.sha256()
    elif _GIT.fullmatch(blob.name):
        digest = hashlib.sha1(b"blob %d\0" % blob.stat().st_size, usedforsecurity=False)
    else:
        return
    with blob.open("rb") as reader:
        while piece := reader.read(SMALL_BYTES):
            digest.update(piece)
    if digest.hexdigest() != blob.name:
        raise SourceError(
            "A downloaded file is not what the hub announced.",
            where=file,
            expected=f"{digest.name} {blob.name}",
            found=digest.hexdigest(),
            do=f"remove {blob} and run again, so that it is downloaded anew",
        )
