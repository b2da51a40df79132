"""Files of one folder that are read by ranges of bytes: with pread here, else by requests."""

from __future__ import annotations

import os
import stat
import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from gemma_convert.errors import SourceError
from gemma_convert.stores.remote.mirror import RemoteFile, remote_file

MOST_OPEN = 256
"""Descriptors that are kept; a checkpoint may have a file for every tensor."""

_Identity = tuple[int, int, int, int]


class OpenFiles:
    """The open files of a folder, by name. Several threads may read them at once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.remote: dict[str, RemoteFile] = {}
        """Those that lie in an object store."""
        self._lock = threading.Lock()
        self._descriptors: dict[str, int] = {}
        self._identities: dict[str, _Identity] = {}
        self._readers: Counter[str] = Counter()

    def open(self, file: str) -> tuple[int, int | str]:
        """Opens a file; its size in bytes, and its time in nanoseconds or the store's tag of it.

        Raises SourceError where it is no regular file, or is not there.
        """
        remote = remote_file(self.folder / file)
        if remote is not None:
            self.remote[file] = remote
            return remote.entry.size, remote.entry.tag
        return self.now(file)

    def now(self, file: str) -> tuple[int, int | str]:
        """Size and time, or tag, of a file as it is now."""
        if file in self.remote:
            entry = self.remote[file].now()
            return entry.size, entry.tag
        with self._descriptor(file) as descriptor:
            status = os.fstat(descriptor)
            return status.st_size, status.st_mtime_ns

    def read(self, file: str, start: int, count: int) -> bytes:
        """`count` bytes from `start` on, fewer at the end of the file."""
        if file in self.remote:
            return self.remote[file].read(start, count)
        try:
            with self._descriptor(file) as descriptor:
                return os.pread(descriptor, count, start)
        except OSError as error:
            raise SourceError(
                "A shard cannot be read.", where=self.folder / file, found=error.strerror
            ) from None

    def read_into(self, file: str, start: int, buffer: memoryview, what: str) -> None:
        """Fills `buffer` from `start` on; messages say that it is `what`.

        Raises SourceError where the file has become shorter or cannot be read.
        """
        if file in self.remote:
            self.remote[file].read_into(start, buffer)
            return
        with self._descriptor(file) as descriptor:
            self._fill(descriptor, start, buffer, file, what)

    def read_pieces(
        self, file: str, starts: Iterable[int], size: int, buffer: memoryview, what: str
    ) -> None:
        """Fills `buffer` with pieces of `size` bytes of a file here, which begin at `starts`.

        Raises SourceError where the file has become shorter or cannot be read.
        """
        with self._descriptor(file) as descriptor:
            for number, start in enumerate(starts):
                piece = buffer[number * size : (number + 1) * size]
                self._fill(descriptor, start, piece, file, what)

    def _fill(self, descriptor: int, start: int, buffer: memoryview, file: str, what: str) -> None:
        done = 0
        while done < len(buffer):
            try:
                count = os.preadv(descriptor, [buffer[done:]], start + done)
            except OSError as error:
                raise SourceError(
                    "The source cannot be read.",
                    where=f"{self.folder / file}, {what}",
                    found=error.strerror,
                ) from None
            if not count:
                raise SourceError(
                    "The source became shorter while it was read.",
                    where=f"{self.folder / file}, {what}",
                    do="leave the source alone until the conversion ends, then start again",
                )
            done += count

    def close(self) -> None:
        """Lets go of all files."""
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    @contextmanager
    def _descriptor(self, file: str) -> Iterator[int]:
        """A descriptor of a file, which stays open while it is used."""
        with self._lock:
            descriptor = self._descriptors.pop(file, None)
            if descriptor is None:
                descriptor = self._opened(file)
            self._descriptors[file] = descriptor
            self._readers[file] += 1
        try:
            yield descriptor
        finally:
            with self._lock:
                self._readers[file] -= 1
                self._close_oldest()

    def _opened(self, file: str) -> int:
        descriptor = _open_file(self.folder / file)
        status = os.fstat(descriptor)
        found = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
        if self._identities.setdefault(file, found) != found:
            os.close(descriptor)
            raise SourceError(
                "The source changed while it was read.",
                where=self.folder / file,
                do="leave the source alone until the conversion ends, then start again",
            )
        return descriptor

    def _close_oldest(self) -> None:
        if len(self._descriptors) > MOST_OPEN:
            unused = next((file for file in self._descriptors if not self._readers[file]), None)
            if unused is not None:
                os.close(self._descriptors.pop(unused))


def _open_file(path: Path) -> int:
    """A descriptor of a regular file; SourceError where it is none."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        raise SourceError(
            "A shard is missing.",
            where=path,
            do="download the whole checkpoint; the index names this file",
        ) from None
    except OSError as error:
        raise SourceError("A shard cannot be opened.", where=path, found=error.strerror) from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise SourceError("A shard is not a file.", where=path)
    return descriptor
