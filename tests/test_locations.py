"""Where checkpoints are kept: what a text means, and what libraries are told of it."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import pytest

from gemma_convert.errors import SourceError, TargetError, UsageError
from gemma_convert.output import named, shown
from gemma_convert.stores.remote.locations import local, local_target
from gemma_convert.stores.remote.mirror import find_mirror, kvstore, mirroring, remote_file
from gemma_convert.stores.remote.object_store import ObjectURL, kvstore_spec, parse_url, reached

VARIABLES = (
    "AWS_ENDPOINT_URL_S3",
    "AWS_ENDPOINT_URL",
    "AWS_REGION",
    "AWS_DEFAULT_REGION",
    "AWS_ACCESS_KEY_ID",
    "TENSORSTORE_GCS_HTTP_URL",
    "STORAGE_EMULATOR_HOST",
)


@pytest.fixture
def environment(monkeypatch):
    """environment(**values): what is set, and nothing else that decides."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)

    def put(**values: str) -> None:
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return put


@pytest.mark.parametrize(
    ("text", "scheme", "bucket", "key"),
    [
        ("s3://bucket", "s3", "bucket", ""),
        ("s3://bucket/", "s3", "bucket", ""),
        ("s3://bucket/a/b c/", "s3", "bucket", "a/b c"),
        ("gs://my.bucket_1/x", "gs", "my.bucket_1", "x"),
    ],
)
def test_urls_of_object_stores(text, scheme, bucket, key):
    found = parse_url(text)
    assert found == ObjectURL(scheme, bucket, key)
    assert str(found) == text.rstrip("/")


@pytest.mark.parametrize(
    "text",
    [
        "http://bucket/x",
        "s3://",
        "s3:///x",
        "s3://bucket@evil/x",
        "s3://bucket:80/x",
        "s3://-bucket/x",
        "s3://bucket/../other",
        "s3://bucket/a//b",
        "s3://bucket/./a",
        "s3://bucket/a\nb",
        "s3://bucket\\x/y",
        "s3://bu%2fcket/x",
        "file:///etc",
    ],
)
def test_what_is_no_url_of_an_object_store(text):
    with ExitStack() as stack:
        with pytest.raises(UsageError, match="not one of an object store"):
            local(text, stack)
        with pytest.raises(UsageError, match="not one of an object store"):
            local_target(text, stack)


def test_places_above_and_below():
    place = ObjectURL("s3", "b", "x/y/z")
    assert str(place.up(2)) == "s3://b/x"
    assert str(place.up(3)) == "s3://b"
    assert str(place.up(3).joined("k")) == "s3://b/k"
    assert place.joined("") == place


def test_a_path_may_be_a_url(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with ExitStack() as stack, pytest.raises(SourceError, match="local files") as caught:
        local(Path("s3://bucket/x"), stack, whole=True)
    assert caught.value.where == "s3://bucket/x"
    with ExitStack() as stack, pytest.raises(TargetError, match="inside a bucket"):
        local_target(Path("gs://bucket"), stack)


def test_local_paths_stay_what_they_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner/name").mkdir(parents=True)
    with ExitStack() as stack:
        assert local("owner/name", stack) == Path("owner/name")
        assert local(tmp_path / "none", stack) == tmp_path / "none"
        assert local("./owner/none", stack) == Path("./owner/none")
        assert local("none", stack) == Path("none")
        assert local_target("owner/other", stack) == Path("owner/other")


def test_s3_is_asked_at_the_endpoint_and_with_the_credentials_of_the_environment(environment):
    place = ObjectURL("s3", "bucket", "a/b")
    bare = {"driver": "s3", "bucket": "bucket", "path": "a/b/"}
    assert kvstore_spec(place) == bare
    assert kvstore_spec(place.up(2))["path"] == ""
    environment(AWS_DEFAULT_REGION="eu-central-1")
    assert kvstore_spec(place) == {**bare, "aws_region": "eu-central-1"}
    environment(AWS_REGION="eu-west-1", AWS_ENDPOINT_URL="http://store:9000/")
    at = {"endpoint": "http://store:9000", "aws_region": "eu-west-1"}
    assert kvstore_spec(place) == {**bare, **at}
    environment(AWS_ENDPOINT_URL_S3="http://s3:1", AWS_ACCESS_KEY_ID="key")
    assert kvstore_spec(place) == {
        **bare,
        **at,
        "endpoint": "http://s3:1",
        "aws_credentials": {"type": "environment"},
    }


def test_an_endpoint_without_a_region_has_one(environment):
    environment(AWS_ENDPOINT_URL="http://store:9000")
    assert kvstore_spec(ObjectURL("s3", "b", "k"))["aws_region"] == "us-east-1"


def test_gcs_is_asked_at_the_emulator(environment, monkeypatch):
    import os

    spec = {"driver": "gcs", "bucket": "bucket", "path": "a/"}
    assert kvstore_spec(ObjectURL("gs", "bucket", "a")) == spec
    assert "TENSORSTORE_GCS_HTTP_URL" not in os.environ
    environment(STORAGE_EMULATOR_HOST="http://emulator:1")
    monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", "")
    assert kvstore_spec(ObjectURL("gs", "bucket", "a")) == spec
    assert os.environ["TENSORSTORE_GCS_HTTP_URL"] == "http://emulator:1"


def test_a_mirror_stands_for_its_place_while_it_lasts(environment, tmp_path):
    assert kvstore(tmp_path, "a/") == {"driver": "file", "path": f"{tmp_path}/a/"}
    with mirroring(ObjectURL("s3", "bucket", "out")) as mirror:
        folder = mirror.folder
        assert shown(folder / "0/items") == "s3://bucket/out/0/items"
        assert kvstore(folder / "0/items", "a/") == {
            "driver": "s3",
            "bucket": "bucket",
            "path": "out/0/items/a/",
        }
        assert find_mirror(folder.parent) is None
        assert find_mirror(tmp_path) is None
        assert remote_file(folder / "x") is None
        error = SourceError(f"{folder} is bad.", where=folder / "x", found=folder)
        assert error.message == (
            "s3://bucket/out is bad.\n  where: s3://bucket/out/x\n  found: s3://bucket/out"
        )
    assert not folder.exists()
    assert find_mirror(folder) is None
    assert shown(folder) == str(folder)


def test_names_nest(tmp_path):
    with named(tmp_path, "outer"), named(tmp_path / "in", "inner"):
        with named(tmp_path, "again"):
            assert shown(tmp_path / "x") == "again/x"
        assert shown(f"{tmp_path}/in/x and {tmp_path}/y") == "inner/x and outer/y"
    assert shown(tmp_path) == str(tmp_path)


def test_a_fault_of_our_own_is_not_the_store_s():
    with pytest.raises(TypeError), reached("s3://b/x", SourceError):
        raise TypeError("ours")
    with pytest.raises(UsageError), reached("s3://b/x", SourceError):
        raise UsageError("ours")
    with pytest.raises(TargetError, match="cannot be reached"), reached("s3://b/x", TargetError):
        raise OSError("down")
    with pytest.raises(SourceError, match="no such bucket"), reached("s3://b/x", SourceError):
        raise FileNotFoundError("x")
    with pytest.raises(SourceError, match="let us in"), reached("gs://b/x", SourceError):
        raise PermissionError("x")
