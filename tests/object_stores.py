"""Object stores on loopback, and what tests ask them."""

from __future__ import annotations

import hashlib
import logging
import os
import socket
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

BUCKET = "bucket"


@contextmanager
def s3_server() -> Iterator[str]:
    """The URL of an empty S3 server; the environment names it while the block lasts."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.CRITICAL)
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    url = f"http://{host}:{port}"
    empty = urllib.request.Request(
        f"{url}/moto-api/reset", method="POST"
    )  # moto's state outlives it
    urllib.request.urlopen(empty).close()
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            patch.delenv(name)
        patch.setenv("AWS_ENDPOINT_URL", url)
        patch.setenv("AWS_REGION", "eu-central-1")
        patch.setenv("AWS_ACCESS_KEY_ID", "key")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        yield url
    server.stop()


@contextmanager
def gcs_server() -> Iterator[str]:
    """The URL of an empty server that speaks the API of Google Cloud Storage."""
    from gcp_storage_emulator.server import create_server

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = create_server("127.0.0.1", port, in_memory=True, default_bucket=BUCKET)
    server.start()
    url = f"http://127.0.0.1:{port}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STORAGE_EMULATOR_HOST", url)
        patch.setenv("TENSORSTORE_GCS_HTTP_URL", url)
        yield url
    server.stop()


class Objects:
    """The bucket as a test sees it; keys are without the bucket."""

    def __init__(self, store: Any) -> None:
        self.store = store

    def keys(self, below: str = "") -> list[str]:
        return [path.removeprefix(f"{BUCKET}/") for path in self.store.find(f"{BUCKET}/{below}")]

    def put(self, key: str, data: bytes) -> None:
        self.store.pipe_file(f"{BUCKET}/{key}", data)

    def get(self, key: str) -> bytes:
        data: bytes = self.store.cat_file(f"{BUCKET}/{key}")
        return data

    def put_folder(self, folder: Path, key: str) -> str:
        """Uploads a folder; its URL without the scheme."""
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                self.put(f"{key}/{path.relative_to(folder).as_posix()}", path.read_bytes())
        return f"{BUCKET}/{key}"

    def sums(self, below: str) -> dict[str, str]:
        """Relative key → sha256 of every object below."""
        return {
            key.removeprefix(f"{below}/"): hashlib.sha256(self.get(key)).hexdigest()
            for key in self.keys(below)
        }


def sums(folder: Path) -> dict[str, str]:
    """Relative path → sha256 of every file in a folder."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
