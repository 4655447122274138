"""A folder on shared storage, by its URL."""

from pathlib import Path

import pytest

from harness.errors import BadUsage
from harness.storage import Storage, StorageFailed


def test_a_file_is_there_whole_under_its_name_and_a_later_one_takes_its_place(tmp_path: Path) -> None:
    folder = Storage(tmp_path.as_uri()).below("a-set")
    assert folder.names() == set()
    folder.put("samples-1.parquet", b"first")
    folder.put("samples-1.parquet", b"second")
    assert folder.names() == {"samples-1.parquet"}
    assert folder.get("samples-1.parquet") == b"second"
    assert folder.url == f"{tmp_path.as_uri()}/a-set"


def test_what_is_not_there_or_cannot_be_written_is_named(tmp_path: Path) -> None:
    folder = Storage(f"{tmp_path.as_uri()}/x")
    with pytest.raises(StorageFailed, match=r"^cannot reach file://\S+/x/absent on the shared storage: "):
        folder.get("absent")
    (tmp_path / "x").write_bytes(b"a file where the folder should be")
    with pytest.raises(StorageFailed, match=r"^cannot reach file://\S+/x/new on the shared storage: "):
        folder.put("new", b"")


@pytest.mark.parametrize(
    ("url", "fault"),
    [
        ("/a/path", "the shared storage /a/path is no URL: give one such as "),
        ("nosuch://bucket", "the shared storage nosuch://bucket cannot be used: "),
        ("s3://key:hush@bucket", "the URL of a shared storage must not hold a credential"),
    ],
)
def test_a_url_that_cannot_be_used_is_refused_without_its_secret(url: str, fault: str) -> None:
    with pytest.raises(BadUsage) as refused:
        Storage(url)
    assert str(refused.value).startswith(fault)
    assert "hush" not in str(refused.value)
