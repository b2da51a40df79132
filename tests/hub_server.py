"""A small server on loopback that speaks as much of the hub's API as a download needs."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

REPOSITORY = "someone/tiny-gemma"
GATED = "someone/gated"
COMMITS = {"main": "a" * 40, "v2": "b" * 40}


class Hub:
    """Revision → folder of files; `asked` lists (method, path, range) of every request.

    `cut` is the number of bytes after which the next body of a large file breaks off, once;
    `refused` is the end of the names of files that are not given, `shortened` of
    those whose ranges lack their last byte, `damaged` of those that come with another last byte
    than was announced.
    """

    def __init__(self, revisions: dict[str, Path]) -> None:
        self.revisions = revisions
        self.asked: list[tuple[str, str, str | None]] = []
        self.cut: int | None = None
        self.refused: str | None = None
        self.shortened: str | None = None
        self.damaged: str | None = None
        self.url = ""

    def folder(self, revision: str) -> tuple[str, Path] | None:
        """(commit, folder) of a branch or a commit."""
        for name, commit in COMMITS.items():
            if revision in (name, commit) and name in self.revisions:
                return commit, self.revisions[name]
        return None

    def files(self, method: str) -> list[str]:
        """Names of the files that were asked for by `method`."""
        found = (
            re.fullmatch(r".*/resolve/[^/]+/(.+)", path) for m, path, _ in self.asked if m == method
        )
        return sorted(match[1] for match in found if match)

    def spans(self) -> list[tuple[str, int, int]]:
        """(file, start, end) of what was read of safetensors files; a whole one ends at -1."""
        found = []
        for method, path, span in self.asked:
            if method == "GET" and path.endswith(".safetensors"):
                first, _, last = (span or "bytes=0-").removeprefix("bytes=").partition("-")
                found.append((path.rpartition("/")[2], int(first), int(last or -2) + 1))
        return sorted(found)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.asked.append((self.command, path, self.headers.get("Range")))
        if self.hub.refused and path.endswith(self.hub.refused):
            self._fail(403, "Forbidden", "Not for you.")
            return
        if path.startswith((f"/api/models/{GATED}", f"/{GATED}/")):
            self._fail(401, "GatedRepo", "Access to model someone/gated is restricted.")
            return
        match = re.fullmatch(
            rf"/(?:api/models/)?{REPOSITORY}(?:/(revision|tree|resolve)/([^/]+)(?:/(.+))?)?", path
        )
        if match is None:
            self._fail(404, "RepoNotFound", "Repository not found")
            return
        found = self.hub.folder(match[2] or "main")
        if found is None:
            self._fail(404, "RevisionNotFound", f"Invalid rev id: {match[2]}")
        elif match[1] == "resolve":
            self._file(found[0], found[1] / match[3], body)
        elif match[1] == "tree":
            self._json([_tree_entry(found[1], file) for file in _files(found[1])])
        else:
            self._json({"id": REPOSITORY, "sha": found[0], "siblings": []})

    def _json(self, value: object) -> None:
        data = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _fail(self, status: int, code: str, message: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", message)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _file(self, commit: str, file: Path, body: bool) -> None:
        if not file.is_file():
            self._fail(404, "EntryNotFound", "Entry not found")
            return
        data = file.read_bytes()
        span = self.headers.get("Range")
        first, _, last = (span or "bytes=0-").removeprefix("bytes=").partition("-")
        start, end = int(first), min(int(last) + 1 if last else len(data), len(data))
        if last and self.hub.shortened and str(file).endswith(self.hub.shortened):
            end -= 1
        self.send_response(206 if span else 200)
        self.send_header("ETag", f'"{_announced(file, data)}"')
        if self.hub.damaged and str(file).endswith(self.hub.damaged):
            data = data[:-1] + bytes([data[-1] ^ 1])
        self.send_header("X-Repo-Commit", commit)
        self.send_header("X-Linked-Size", str(len(data)))
        self.send_header("Accept-Ranges", "bytes")
        if span:
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(data)}")
        self.send_header("Content-Length", str(end - start))
        self.end_headers()
        if body:
            self._send(data[start:end])

    def _send(self, data: bytes) -> None:
        cut, self.hub.cut = (self.hub.cut, None) if len(data) > 100_000 else (None, self.hub.cut)
        if cut is None:
            self.wfile.write(data)
            return
        self.wfile.write(data[:cut])
        self.wfile.flush()
        self.close_connection = True
        self.connection.shutdown(2)


def _announced(file: Path, data: bytes) -> str:
    """What the hub says of a file: the sha256 of a large one, git's id of a small one."""
    if file.suffix == ".safetensors":
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _tree_entry(folder: Path, file: Path) -> dict[str, object]:
    oid = hashlib.sha1(file.read_bytes()).hexdigest()
    path = file.relative_to(folder).as_posix()
    return {"type": "file", "path": path, "size": file.stat().st_size, "oid": oid}


@contextmanager
def serving(revisions: dict[str, Path]) -> Iterator[Hub]:
    """The hub that serves `revisions` until the block ends."""
    hub = Hub(revisions)
    handler = type("Handler", (_Handler,), {"hub": hub})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        hub.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield hub
        server.shutdown()
        thread.join()
