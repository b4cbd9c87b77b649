"""One store of objects at any fsspec URL: whole reads and writes, atomic conditional creates, clear errors."""

import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import fsspec
from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_random_exponential

from storage.backends import Backend, LocalBackend, RemoteBackend, Stored
from storage.errors import InputError, IntegrityError, StorageError
from storage.store_errors import explain, is_store_failure, is_transient, redact

ATTEMPTS = 7
"""Tries of one request before its transient failure counts; the waits between them add up to about 10 s."""

PROBE_PREFIX = ".probe-"
"""Names of the small objects that a store is tried with; a killed process may leave one."""

T = TypeVar("T")


class Store:
    """Objects below one URL, named by relative keys such as `manifest/u1.json`.

    Every method raises `StorageError` when the store fails (disk full, no permission, missing bucket, wrong
    credentials, network gone), `IntegrityError` when an object to be read is missing or a key leaves the store.
    Transient failures are tried again. Safe to use from several threads; build a new one in each process.
    """

    def __init__(self, url: str | Path) -> None:
        text = str(url)
        scheme = text.partition("://")[0] if "://" in text else "file"
        self.is_local = scheme in {"file", "local"}
        self._backend: Backend
        if self.is_local:
            root = Path(text.partition("://")[2] or text).expanduser().absolute()
            self.url = str(root)
            self._backend = LocalBackend(root)
        else:
            self.url = text.rstrip("/")
            self._backend = _remote(scheme, self.url)

    def __repr__(self) -> str:
        return f"Store({redact(self.url)!r})"

    def shown(self, key: str = "") -> str:
        """Return the URL of a key for messages, without user, password or query."""
        return redact(f"{self.url}/{key}" if key else self.url)

    def child(self, prefix: str) -> "Store":
        """Return the store below `prefix`."""
        self._check(prefix)
        return Store(f"{self.url}/{prefix}")

    def read(self, key: str) -> bytes:
        """Return an object's bytes."""
        return self._call("read", key, lambda: self._backend.read(key, None, None))

    def read_range(self, key: str, start: int, end: int) -> bytes:
        """Return bytes `start:end` of an object."""
        return self._call("read", key, lambda: self._backend.read(key, start, end))

    def read_if_exists(self, key: str) -> bytes | None:
        """Return an object's bytes, or None when there is none."""
        return self._optional("read", key, lambda: self._backend.read(key, None, None))

    def write(self, key: str, data: bytes) -> None:
        """Create or replace an object in one step."""
        self._call("write", key, lambda: self._backend.write(key, data))

    def create(self, key: str, data: bytes) -> bool:
        """Create an object unless it exists; of many that race exactly one gets True.

        After a lost reply the retry may find the object that this very call made and return False: who needs to
        know reads the object back (see `writer.DatasetWriter.commit`).
        """
        return self._call("create", key, lambda: self._backend.create(key, data))

    def list(self, prefix: str = "") -> list[str]:
        """Return all keys that start with `prefix`, sorted; unfinished local files are never among them."""
        if prefix:
            self._check(prefix.rstrip("/"))
        return sorted(self._call("list", prefix, lambda: self._backend.list(prefix)))

    def size(self, key: str) -> int:
        """Return an object's bytes."""
        return self._call("look up", key, lambda: self._backend.stat(key)).bytes

    def exists(self, key: str) -> bool:
        """Tell whether there is such an object."""
        return self._optional("look up", key, lambda: self._backend.stat(key)) is not None

    def delete(self, key: str) -> None:
        """Remove an object; a missing one is no error."""
        self._call("delete", key, lambda: self._backend.delete(key))

    def scan(self) -> tuple[Stored, ...]:
        """Return everything below this store, unfinished local files and uploads included."""
        return self._call("list", "", lambda: tuple(self._backend.scan()))

    def modified(self, key: str) -> float | None:
        """Return when an object was written by the store's clock, in seconds since 1970; None where it is missing."""
        found = self._optional("look up", key, lambda: self._backend.stat(key))
        return found.modified if found is not None else None

    def now(self) -> float:
        """Return the time of the store's own clock, by writing a small object and looking when it was written."""
        key = f"{PROBE_PREFIX}{uuid.uuid4().hex}"
        self.write(key, b"clock")
        try:
            written = self.modified(key)
        finally:
            self.delete(key)
        if written is None:
            raise StorageError(f"{self.shown()} does not tell when an object was written, so no age can be known")
        return written

    def abort(self, key: str, upload: str) -> None:
        """Give up an unfinished upload to a key."""
        self._call("delete", key, lambda: self._backend.abort(key, upload))

    def probe(self) -> bool:
        """Check by doing that objects can be created, read and deleted here.

        Returns whether conditional creates are honoured: some S3 look-alikes ignore the condition, and then only
        one process may write at a time. Raises InputError when the store cannot be used: nothing was spent yet.
        """
        key = f"{PROBE_PREFIX}{uuid.uuid4().hex}"
        try:
            self.create(key, b"probe")
            created_again = self.create(key, b"probe")
            self.read(key)
            self.delete(key)
        except (StorageError, IntegrityError) as error:
            raise InputError(str(error).replace(self.shown(key), self.shown())) from error
        return not created_again

    def _check(self, key: str) -> None:
        parts = key.split("/")
        if "://" in key or "\\" in key or "\0" in key or any(part in {"", ".", ".."} for part in parts):
            raise IntegrityError(
                f"{self.shown()}: key {key!r} leads outside the store or is malformed; keys are relative paths "
                "with forward slashes"
            )

    def _call(self, action: str, key: str, operation: Callable[[], T]) -> T:
        try:
            return self._retry(action, key, operation)
        except FileNotFoundError as error:
            raise explain(error, action, self.shown(key)) from error

    def _optional(self, action: str, key: str, operation: Callable[[], T]) -> T | None:
        try:
            return self._retry(action, key, operation)
        except FileNotFoundError as error:
            ours = explain(error, action, self.shown(key))
            if isinstance(ours, StorageError):
                raise ours from error
            return None

    def _retry(self, action: str, key: str, operation: Callable[[], T]) -> T:
        """Run an operation with retries; FileNotFoundError passes through, all else becomes ours."""
        if action != "list":
            self._check(key)
        attempts = Retrying(
            stop=stop_after_attempt(ATTEMPTS),
            wait=wait_random_exponential(multiplier=0.1, max=5),
            retry=retry_if_exception(is_transient),
            reraise=True,
        )
        try:
            return attempts(operation)
        except FileNotFoundError:
            raise
        except Exception as error:
            if not is_store_failure(error):
                raise
            raise explain(error, action, self.shown(key)) from error


def _remote(scheme: str, url: str) -> RemoteBackend:
    # Instances are cached by URL otherwise, and go on with the endpoint and credentials of when they were made.
    options: dict[str, Any] = {"use_listings_cache": False, "skip_instance_cache": True}
    if scheme in {"s3", "s3a"}:
        # Retries are ours alone: three layers of them multiply, and a dead endpoint takes minutes to be noticed.
        options["config_kwargs"] = {"retries": {"max_attempts": 0}, "connect_timeout": 10, "read_timeout": 60}
    try:
        filesystem, root = fsspec.core.url_to_fs(url, **options)
    except (ImportError, ValueError) as error:
        raise InputError(f"cannot open {redact(url)}: {error}") from error
    if scheme in {"s3", "s3a"}:
        filesystem.retries = 1
    return RemoteBackend(filesystem, root)
