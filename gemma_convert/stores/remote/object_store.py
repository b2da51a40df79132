"""Object stores, s3:// and gs://: one place that says how they are reached and what went wrong.

Two libraries reach them, fsspec's file systems (listings, files) and tensorstore (arrays); both are
given the same endpoint, from the environment: AWS_ENDPOINT_URL_S3 or AWS_ENDPOINT_URL, AWS_REGION
or AWS_DEFAULT_REGION; TENSORSTORE_GCS_HTTP_URL, which tensorstore itself reads, or
STORAGE_EMULATOR_HOST.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from gemma_convert.errors import GemmaConvertError, SourceError, TargetError, UsageError, short

_URL = re.compile(r"(s3|gs)://([A-Za-z0-9][A-Za-z0-9._-]{1,221})(?:/(.*))?", re.ASCII | re.DOTALL)
_LIBRARIES = ("aiobotocore", "aiohttp", "botocore", "gcsfs", "google", "requests", "urllib3")
_S3_ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
_S3_REGIONS = ("AWS_REGION", "AWS_DEFAULT_REGION")
_S3_IDENTITY = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE")
_GCS_ENDPOINTS = ("TENSORSTORE_GCS_HTTP_URL", "STORAGE_EMULATOR_HOST")
_EXTRAS = {"s3": ("s3", "s3fs"), "gs": ("gcs", "gcsfs")}
_CREDENTIALS = {
    "s3": "check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_PROFILE and AWS_REGION",
    "gs": "run gcloud auth application-default login, or set GOOGLE_APPLICATION_CREDENTIALS",
}


@dataclass(frozen=True)
class ObjectURL:
    """A place in a bucket; `key` has no slash at its ends, and is empty for the bucket itself.

    `scheme` is empty for a repository of the hub: its bucket is the owner, its key name@commit.
    """

    scheme: str
    bucket: str
    key: str

    def __str__(self) -> str:
        return f"{self.scheme}://{self.path}" if self.scheme else self.path

    @property
    def path(self) -> str:
        """bucket/key, as fsspec has it."""
        return f"{self.bucket}/{self.key}" if self.key else self.bucket

    def joined(self, below: str) -> ObjectURL:
        """The place `below` this one."""
        key = "/".join(part for part in (self.key, below) if part)
        return ObjectURL(self.scheme, self.bucket, key)

    def up(self, levels: int) -> ObjectURL:
        """The place `levels` above this one."""
        parts = self.key.split("/")
        return ObjectURL(self.scheme, self.bucket, "/".join(parts[: len(parts) - levels]))


def is_url(text: str) -> bool:
    """Whether a text is meant as a URL."""
    return "://" in text


def parse_url(text: str) -> ObjectURL:
    """The place that a URL names; UsageError where it is not one of an object store."""
    match = _URL.fullmatch(text)
    key = (match[3] or "").rstrip("/") if match else ""
    if match is None or (key and not plain_key(key)):
        raise UsageError(
            "This URL is not one of an object store.",
            expected="s3://bucket/prefix or gs://bucket/prefix",
            found=short(text),
        )
    return ObjectURL(match[1], match[2], key)


def plain_key(key: str) -> bool:
    """Whether a key is also a path below a folder: no empty part, no `.` or `..`."""
    return key.isprintable() and "\\" not in key and not {"", ".", ".."} & {*key.split("/")}


def file_system(scheme: str) -> Any:
    """A fsspec file system that remembers no listings; UsageError where its package is missing."""
    try:
        if scheme == "s3":
            identity = tuple(os.environ.get(name) for name in _S3_IDENTITY)
            return _s3(_first(_S3_ENDPOINTS), _first(_S3_REGIONS), identity)
        return _gcs(_first(_GCS_ENDPOINTS))
    except ImportError as error:
        extra, package = _EXTRAS[scheme]
        raise UsageError(
            f"{scheme}:// needs the package {package}.",
            found=error,
            do=f"pip install 'gemma-convert[{extra}]'",
        ) from None


@lru_cache(maxsize=4)
def _s3(endpoint: str | None, region: str | None, identity: tuple[str | None, ...]) -> Any:
    from s3fs import S3FileSystem

    del identity  # botocore finds it itself; another one is another client
    return S3FileSystem(
        endpoint_url=endpoint,
        client_kwargs={"region_name": region} if region else {},
        config_kwargs={"connect_timeout": 10, "retries": {"max_attempts": 4}},
        skip_instance_cache=True,
        use_listings_cache=False,
    )


@lru_cache(maxsize=4)
def _gcs(endpoint: str | None) -> Any:
    from gcsfs.core import GCSFileSystem

    return GCSFileSystem(
        endpoint_url=endpoint,
        token="anon" if endpoint else None,
        skip_instance_cache=True,
        use_listings_cache=False,
    )


def kvstore_spec(place: ObjectURL) -> dict[str, Any]:
    """tensorstore's spec of everything below a place, at the endpoint that fsspec uses."""
    path = f"{place.key}/" if place.key else ""
    if place.scheme == "gs":
        if endpoint := _first(_GCS_ENDPOINTS):
            os.environ["TENSORSTORE_GCS_HTTP_URL"] = endpoint
        return {"driver": "gcs", "bucket": place.bucket, "path": path}
    spec: dict[str, Any] = {"driver": "s3", "bucket": place.bucket, "path": path}
    if endpoint := _first(_S3_ENDPOINTS):
        spec["endpoint"] = endpoint.rstrip("/")
    region = _first(_S3_REGIONS)
    if region or endpoint:
        spec["aws_region"] = region or "us-east-1"
    if os.environ.get("AWS_ACCESS_KEY_ID"):
        spec["aws_credentials"] = {"type": "environment"}
    return spec


@contextmanager
def reached(place: object, error: type[SourceError | TargetError]) -> Iterator[None]:
    """Turns what the libraries raise inside into one `error` that says what to do.

    Libraries of object stores let errors of their own, and of those below them, through; they are
    known by where they come from.
    """
    try:
        yield
    except GemmaConvertError:
        raise
    except Exception as failure:
        module = type(failure).__module__.partition(".")[0]
        if not isinstance(failure, OSError) and module not in _LIBRARIES:
            raise
        what, do = _advice(failure, str(place).partition(":")[0])
        raise error(what, where=place, found=_found(failure), do=do) from None


def _advice(failure: Exception, scheme: str) -> tuple[str, str]:
    name, text = type(failure).__name__, str(failure)
    if isinstance(failure, FileNotFoundError):
        return "There is no such bucket or object.", "check the URL"
    refused = any(code in text for code in ("401", "403", "Forbidden", "InvalidAccessKeyId"))
    if isinstance(failure, PermissionError) or "Credentials" in name or refused:
        return "The object store does not let us in.", _CREDENTIALS[scheme]
    if isinstance(failure, OSError) and failure.filename is not None:
        return "A file cannot be read or written.", "check free space and permissions"
    endpoints = _S3_ENDPOINTS if scheme == "s3" else _GCS_ENDPOINTS
    return "The object store cannot be reached.", f"check the network and {' or '.join(endpoints)}"


def _found(failure: Exception) -> str:
    text = str(failure).strip()
    return short(text.splitlines()[0] if text else type(failure).__name__)


def _first(names: tuple[str, ...]) -> str | None:
    return next((value for name in names if (value := os.environ.get(name))), None)
