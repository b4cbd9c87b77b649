"""The store: atomic creates, keys that stay inside, clear failures, on a folder, in memory and on a real S3 server."""

import os
import resource
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen
from uuid import uuid4

import pytest
from storage_faults import as_ordinary_user, full_disk

from storage.compaction import compact
from storage.errors import InputError, IntegrityError, StorageError
from storage.gc import collect_garbage
from storage.object_store import Store
from storage.reader import Dataset
from storage.verify import verify_dataset
from storage.writer import DatasetWriter


@pytest.fixture(params=["folder", "memory", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """Return an empty store of each kind."""
    if request.param == "folder":
        return Store(tmp_path / "store")
    if request.param == "memory":
        return Store(f"memory://{uuid4().hex}/store")
    return Store(request.getfixturevalue("s3_url"))


def test_objects_are_written_listed_read_and_deleted(store: Store) -> None:
    store.write("data/b.parquet", b"old")
    store.write("data/b.parquet", b"0123456789")
    store.write("data/a.parquet", b"a")
    store.write("manifest/u1.json", b"{}")
    assert store.list() == ["data/a.parquet", "data/b.parquet", "manifest/u1.json"]
    assert store.list("data/") == ["data/a.parquet", "data/b.parquet"]
    assert store.list("data/b") == ["data/b.parquet"]
    assert store.list("nothing/") == []
    assert store.read("data/b.parquet") == b"0123456789"
    assert store.read_range("data/b.parquet", 2, 5) == b"234"
    assert store.size("data/b.parquet") == 10
    assert store.child("data").list() == ["a.parquet", "b.parquet"]
    store.delete("data/a.parquet")
    store.delete("data/a.parquet")
    assert not store.exists("data/a.parquet")
    assert store.exists("data/b.parquet")
    assert store.read_if_exists("data/a.parquet") is None
    with pytest.raises(IntegrityError, match=r"data/a\.parquet: it is missing"):
        store.read("data/a.parquet")


def test_create_lets_one_of_many_racers_win(store: Store) -> None:
    with ThreadPoolExecutor(16) as pool:
        won = list(pool.map(lambda n: store.create("manifest/u.json", f"racer {n}".encode()), range(16)))
    assert sum(won) == 1
    assert store.read("manifest/u.json") == f"racer {won.index(True)}".encode()


def test_probe_tells_conditional_creates_and_leaves_nothing(store: Store) -> None:
    assert store.probe() is True
    assert store.list() == []


@pytest.mark.parametrize(
    "key", ["../x", "a/../../x", "/etc/passwd", "a//b", "", "s3://other/x", "a\\..\\x", "a/./b", "a\0b"]
)
def test_keys_that_lead_outside_are_refused(tmp_path: Path, key: str) -> None:
    store = Store(tmp_path)
    for call in (store.read, store.size, store.exists, store.delete, lambda k: store.write(k, b""), store.child):
        with pytest.raises(IntegrityError, match="leads outside the store or is malformed"):
            call(key)


def test_unfinished_files_are_never_listed(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.write("data/a", b"whole")
    (tmp_path / "data" / ".tmp-123").write_bytes(b"ha")
    assert store.list() == store.list("data/") == ["data/a"]


def test_url_is_absolute_and_shown_without_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert Store("runs/cache").url == str(tmp_path / "runs" / "cache")
    assert Store(f"file://{tmp_path}/x").url == f"{tmp_path}/x"
    shown = Store("memory://user:secret@host/path").shown("key")
    assert shown == "memory://host/path/key"


def test_unknown_scheme_is_an_input_error() -> None:
    with pytest.raises(InputError, match="cannot open nosuch://x"):
        Store("nosuch://x")


def test_full_disk_is_told_and_keeps_what_was_there(tmp_path: Path) -> None:
    with full_disk(tmp_path):
        store = Store(tmp_path)
        store.write("data/a", b"a" * 1000)
        for attempt in (store.write, store.create):
            with pytest.raises(StorageError, match=r"data/b: (No space left|File too large).*free some space"):
                attempt("data/b", bytes(200_000))
        with pytest.raises(StorageError, match="free some space"):
            store.write("data/a", bytes(200_000))
        assert store.read("data/a") == b"a" * 1000
        assert [path.name for path in (tmp_path / "data").iterdir()] == ["a"]


def test_file_size_limit_is_told_like_a_full_disk(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(StorageError, match="File too large; free some space"):
            Store(tmp_path).create("a", bytes(20_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_folder_without_permission_is_told() -> None:
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o555)
        with as_ordinary_user():
            store = Store(Path(name) / "cache")
            with pytest.raises(InputError, match=r"cannot create .*cache: permission denied"):
                store.probe()
            with pytest.raises(StorageError, match="permission denied"):
                store.write("a", b"x")
        os.chmod(name, 0o755)


def test_path_through_a_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match=r"Not a directory|File exists"):
        Store(tmp_path / "file" / "cache").probe()


def test_transient_failures_are_retried(flaky: Callable[[dict[int, str]], Store]) -> None:
    store = flaky({1: "before", 2: "before", 4: "get", 5: "get"})
    store.write("a", b"x")
    assert store.read("a") == b"x"


def test_lasting_failure_is_told_with_its_cause(flaky: Callable[[dict[int, str]], Store], monkeypatch: Any) -> None:
    monkeypatch.setattr("storage.object_store.ATTEMPTS", 2)
    store = flaky(dict.fromkeys(range(1, 3), "before"))
    with pytest.raises(StorageError, match=r"cannot write flaky://.*/a: the request got lost"):
        store.write("a", b"x")


def test_create_after_a_lost_reply_leaves_the_object(flaky: Callable[[dict[int, str]], Store]) -> None:
    store = flaky({1: "after"})
    assert store.create("a", b"mine") is False
    assert store.read("a") == b"mine"


def test_missing_bucket_is_told(s3_url: str) -> None:
    store = Store("s3://no-such-bucket/x")
    with pytest.raises(InputError, match="the bucket does not exist; create it or mend the URL"):
        store.probe()
    for call in (store.read, store.exists, store.read_if_exists, store.list, lambda key: store.write(key, b"")):
        with pytest.raises(StorageError, match="the bucket does not exist"):
            call("key")


def test_wrong_credentials_are_told_without_showing_them(
    s3_url: str, s3_endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAWRONGWRONGWRONG1")
    _require_credentials(s3_endpoint, True)
    try:
        with pytest.raises(InputError, match=r"not accept the credentials \(InvalidAccessKeyId\)") as caught:
            Store(s3_url).probe()
    finally:
        _require_credentials(s3_endpoint, False)
    assert "AKIAWRONG" not in str(caught.value)
    assert "test-secret" not in str(caught.value)


def test_listings_are_never_stale(s3_url: str) -> None:
    ours, theirs = Store(s3_url), Store(s3_url)
    assert ours.list() == []
    theirs.write("data/new", b"x")
    assert ours.list() == ["data/new"]
    assert ours.exists("data/new")


def test_unreachable_endpoint_is_told(s3_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setattr("storage.object_store.ATTEMPTS", 2)
    with pytest.raises(InputError, match="Could not connect to the endpoint"):
        Store(f"{s3_url}/elsewhere").probe()


def test_any_endpoint_named_in_the_environment(
    s3_url: str, monkeypatch: pytest.MonkeyPatch, make_identity: Any, make_unit: Any, assert_same_unit: Any
) -> None:
    """A dataset from beginning to end, at LECTERN_TEST_S3_URL with LECTERN_TEST_S3_* where set; else on moto."""
    for name in ("ENDPOINT_URL", "ACCESS_KEY_ID", "SECRET_ACCESS_KEY"):
        if value := os.environ.get(f"LECTERN_TEST_S3_{name}"):
            monkeypatch.setenv(f"AWS_{name}", value)
    url = f"{os.environ.get('LECTERN_TEST_S3_URL', s3_url)}/{uuid4().hex}"
    store = Store(url)
    honoured = store.probe()
    assert store.list() == []
    units = [make_unit(make_identity(), 2, seed) for seed in range(3)]
    with DatasetWriter.create(url, make_identity()) as writer:
        assert (writer.lease is None) == honoured
        for n, unit in enumerate(units):
            assert writer.commit(f"u{n}", *unit, attempt=1).committed
            assert not writer.commit(f"u{n}", *unit, attempt=2).committed
        assert compact(store, writer.info).added == 3
        store.write("data/u9-1-aa.parquet", b"orphan")
        assert [item.key for item in collect_garbage(store, writer.info, -60).removed] == ["data/u9-1-aa.parquet"]
    report = verify_dataset(url)
    assert (report.ok, report.units, report.orphans) == (True, 3, [])
    dataset = Dataset.open(url)
    for unit in units:
        assert_same_unit(dataset.read(unit[0].ids()), unit)
    for key in store.list():
        store.delete(key)


def _require_credentials(endpoint: str, required: bool) -> None:
    """Make moto check every request's credentials, or none."""
    body = b"0" if required else b"inf"
    headers = {"Content-Type": "text/plain"}
    urlopen(Request(f"{endpoint}/moto-api/reset-auth", data=body, headers=headers, method="POST")).close()
