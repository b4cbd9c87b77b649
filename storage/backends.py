"""Where bytes lie: a local folder, or any object store that fsspec speaks to. Raises the system's own errors.

`object_store.Store` is the face of these; it adds key checks, retries and clear messages.
"""

import contextlib
import errno
import os
import uuid
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

TEMPORARY_PREFIX = ".tmp-"
"""Names of half-written local files; never listed, safe to delete when no writer runs."""

_NO_HARD_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV}


@dataclass(frozen=True)
class Stored:
    """One object, or an upload that was begun: what a clean-up needs to know of it."""

    key: str
    bytes: int
    modified: float | None
    """When it was written, or begun, by the store's clock in seconds since 1970; None where the store does not tell."""
    upload: str | None = None
    """Id of an unfinished upload in parts; its bytes are unknown and count as 0."""


class Backend(Protocol):
    """Objects under one root, named by relative keys with forward slashes."""

    def read(self, key: str, start: int | None, end: int | None) -> bytes:
        """Return bytes `start:end` of an object, all of it when both are None."""

    def write(self, key: str, data: bytes) -> None:
        """Create or replace an object; readers see the old or the new one, never a part."""

    def create(self, key: str, data: bytes) -> bool:
        """Create an object if there is none; False when there is one."""

    def list(self, prefix: str) -> list[str]:
        """Return all keys that start with `prefix`, in any order."""

    def stat(self, key: str) -> Stored:
        """Look an object up."""

    def scan(self) -> Iterable[Stored]:
        """Return everything below the root, unfinished local files and uploads included."""

    def delete(self, key: str) -> None:
        """Remove an object; a missing one is no error."""

    def abort(self, key: str, upload: str) -> None:
        """Give up an unfinished upload and free its parts."""


class LocalBackend:
    """A folder. Objects appear whole: written to a temporary file beside, synced, then renamed or linked."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def read(self, key: str, start: int | None, end: int | None) -> bytes:
        """Return bytes `start:end` of a file."""
        with (self.root / key).open("rb") as file:
            if start is not None:
                file.seek(start)
            return file.read() if end is None else file.read(end - (start or 0))

    def write(self, key: str, data: bytes) -> None:
        """Replace the file in one step."""
        target = self.root / key
        temporary = _write_beside(target, data)
        try:
            temporary.replace(target)
        except OSError:
            _unlink(temporary)
            raise
        _sync_folder(target.parent)

    def create(self, key: str, data: bytes) -> bool:
        """Link the finished temporary file to its name, which exactly one of many writers can."""
        target = self.root / key
        temporary = _write_beside(target, data)
        try:
            os.link(temporary, target)
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno in _NO_HARD_LINKS:
                message = "its filesystem has no hard links, which an atomic commit needs; use another folder"
                raise OSError(errno.EOPNOTSUPP, message, str(target)) from error
            raise
        finally:
            _unlink(temporary)
        _sync_folder(target.parent)
        return True

    def list(self, prefix: str) -> list[str]:
        """Walk the deepest folder that `prefix` names."""
        top = self.root / prefix.rpartition("/")[0]
        keys = []
        for folder, _, names in os.walk(top):
            base = Path(folder).relative_to(self.root).as_posix()
            start = "" if base == "." else f"{base}/"
            keys += [start + name for name in names if not name.startswith(TEMPORARY_PREFIX)]
        return [key for key in keys if key.startswith(prefix)]

    def stat(self, key: str) -> Stored:
        """Look a file up."""
        found = (self.root / key).stat()
        return Stored(key, found.st_size, found.st_mtime)

    def scan(self) -> Iterable[Stored]:
        """Walk the whole folder."""
        found = []
        for folder, _, names in os.walk(self.root):
            for name in names:
                # A file may go while others are looked at.
                with contextlib.suppress(FileNotFoundError):
                    found.append(self.stat((Path(folder) / name).relative_to(self.root).as_posix()))
        return found

    def delete(self, key: str) -> None:
        """Unlink a file."""
        (self.root / key).unlink(missing_ok=True)

    def abort(self, key: str, upload: str) -> None:
        """Do nothing: a folder has temporary files, not uploads."""


class RemoteBackend:
    """Any fsspec filesystem; conditional creates where it has them (S3, GCS)."""

    def __init__(self, filesystem: Any, root: str) -> None:
        self.filesystem = filesystem
        self.root = root.rstrip("/")

    def read(self, key: str, start: int | None, end: int | None) -> bytes:
        """Get an object or a range of it."""
        # s3fs would ask for the size first, to get large objects in parts.
        at_once = {"max_concurrency": 1} if "s3" in self.filesystem.protocol else {}
        return bytes(self.filesystem.cat_file(self._path(key), start=start, end=end, **at_once))

    def write(self, key: str, data: bytes) -> None:
        """Put an object."""
        self.filesystem.pipe_file(self._path(key), data)

    def create(self, key: str, data: bytes) -> bool:
        """Put an object on condition that there is none (`If-None-Match: *` on S3)."""
        try:
            self.filesystem.pipe_file(self._path(key), data, mode="create")
        except FileExistsError:
            return False
        except OSError as error:
            if error_code(error) in {"PreconditionFailed", "412"}:
                return False
            raise
        return True

    def list(self, prefix: str) -> list[str]:
        """List below the deepest folder that `prefix` names."""
        top = self._path(prefix.rpartition("/")[0]).rstrip("/")
        try:
            found = self.filesystem.find(top)
        except FileNotFoundError as error:
            if error_code(error) == "NoSuchBucket":
                raise
            return []
        return [key for key in (self._key(path) for path in found) if key.startswith(prefix)]

    def stat(self, key: str) -> Stored:
        """Ask about an object."""
        info = self.filesystem.info(self._path(key))
        return Stored(key, int(info["size"]), _modified(info))

    def scan(self) -> Iterable[Stored]:
        """List everything below the root, and on S3 the uploads in parts that were begun."""
        try:
            found = self.filesystem.find(self.root, detail=True)
        except FileNotFoundError as error:
            if error_code(error) == "NoSuchBucket":
                raise
            found = {}
        objects = [Stored(self._key(path), int(info["size"] or 0), _modified(info)) for path, info in found.items()]
        return [*objects, *self._uploads()]

    def delete(self, key: str) -> None:
        """Remove an object."""
        with contextlib.suppress(FileNotFoundError):
            self.filesystem.rm_file(self._path(key))

    def abort(self, key: str, upload: str) -> None:
        """Give up an upload in parts; one that is gone is no error."""
        bucket, _, name = self._path(key).partition("/")
        with contextlib.suppress(FileNotFoundError):
            self.filesystem.call_s3("abort_multipart_upload", Bucket=bucket, Key=name, UploadId=upload)

    def _uploads(self) -> Iterator[Stored]:
        if "s3" not in self.filesystem.protocol:
            return
        bucket, _, prefix = self.root.partition("/")
        page: dict[str, Any] = {"Bucket": bucket, "Prefix": f"{prefix}/" if prefix else ""}
        while True:
            reply = self.filesystem.call_s3("list_multipart_uploads", **page)
            for upload in reply.get("Uploads") or []:
                key = self._key(f"{bucket}/{upload['Key']}")
                yield Stored(key, 0, upload["Initiated"].timestamp(), upload["UploadId"])
            if not reply.get("IsTruncated"):
                return
            page |= {"KeyMarker": reply["NextKeyMarker"], "UploadIdMarker": reply["NextUploadIdMarker"]}

    def _path(self, key: str) -> str:
        return f"{self.root}/{key}"

    def _key(self, path: Any) -> str:
        return str(path)[len(str(self.filesystem._strip_protocol(self.root))) + 1 :]


def error_code(error: BaseException | None) -> str:
    """Return the service's own error code (`NoSuchBucket`, `403`, …) behind an error, or an empty string."""
    while error is not None:
        response = getattr(error, "response", None)
        if isinstance(response, dict):
            return str(response.get("Error", {}).get("Code", ""))
        error = error.__cause__
    return ""


def _write_beside(target: Path, data: bytes) -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.parent / f"{TEMPORARY_PREFIX}{uuid.uuid4().hex}"
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        _unlink(temporary)
        raise
    return temporary


def _unlink(path: Path) -> None:
    # The folder may have become unwritable in between: the error being raised already says what went wrong.
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Make a new name survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _modified(info: Mapping[str, Any]) -> float | None:
    """Return when an object was written, from what a filesystem calls it; None rather than a guess."""
    for name in ("LastModified", "last_modified", "mtime", "updated", "created"):
        value = info.get(name)
        if isinstance(value, str):
            with contextlib.suppress(ValueError):
                value = datetime.fromisoformat(value)
        if isinstance(value, datetime):
            return (value if value.tzinfo else value.replace(tzinfo=UTC)).timestamp()
        if isinstance(value, int | float):
            return float(value)
    return None
