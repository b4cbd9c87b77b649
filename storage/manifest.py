"""The commit records: one small JSON file per unit. What has no manifest does not exist."""

import json
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from hashlib import blake2b
from typing import Self, TypeVar

from pydantic import Field, ValidationError

from storage.errors import IntegrityError
from storage.identity import canonical_json
from storage.object_store import Store
from storage.samples import UInt8Array
from storage.settings import Settings, first_problem

MANIFEST_PREFIX = "manifest/"
DATA_PREFIX = "data/"
REMOTE_THREADS = 16
"""Small requests to an object store that run side by side."""

Bytes = bytes
"""The type, where a field of the same name hides it."""
Item = TypeVar("Item")
Result = TypeVar("Result")

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,199}")


class ManifestRecord(Settings):
    """What `manifest/<unit>.json` says about one committed data file.

    `attempt` ends in a checksum over all other fields, so that a changed record is found out, and no two attempts
    share a data key unless their files are the same byte for byte.
    """

    unit: str
    data_key: str
    bytes: int = Field(ge=1)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    rows: int = Field(ge=1)
    tokens: int = Field(ge=1)
    sample_ids_digest: str = Field(pattern=r"^[0-9a-f]{32}$")
    fingerprint: str
    attempt: str
    created_at: str
    """UTC, ISO 8601 with microseconds: sorts as text."""

    @classmethod
    def seal(
        cls,
        *,
        unit: str,
        attempt: str,
        size_bytes: int,
        sha256: str,
        rows: int,
        tokens: int,
        digest: str,
        fingerprint: str,
    ) -> Self:
        """Make the record of a finished data file; the attempt's name gets its checksum here."""
        for what, name in (("unit id", unit), ("attempt", attempt)):
            if not _NAME.fullmatch(name):
                raise IntegrityError(f"{what} {name!r} cannot be part of a key; use letters, digits and `._-`")
        draft = cls(
            unit=unit,
            data_key="",
            bytes=size_bytes,
            sha256=sha256,
            rows=rows,
            tokens=tokens,
            sample_ids_digest=digest,
            fingerprint=fingerprint,
            attempt=attempt,
            created_at=datetime.now(UTC).isoformat(timespec="microseconds"),
        )
        sealed = f"{attempt}-{draft._checksum(attempt)}"
        return draft.model_copy(update={"attempt": sealed, "data_key": f"{DATA_PREFIX}{unit}-{sealed}.parquet"})

    @property
    def key(self) -> str:
        """Return where this record lies."""
        return f"{MANIFEST_PREFIX}{self.unit}.json"

    def to_json(self) -> Bytes:
        """Return the file's bytes."""
        return canonical_json(self.model_dump(mode="json")) + b"\n"

    def defect(self) -> str | None:
        """Return what is wrong with the record by itself, or None."""
        if self.data_key != f"{DATA_PREFIX}{self.unit}-{self.attempt}.parquet" or not _NAME.fullmatch(self.unit):
            return f"its data_key {self.data_key!r} is not the key of its unit and attempt inside the dataset"
        label, _, checksum = self.attempt.rpartition("-")
        return None if checksum == self._checksum(label) else "its fields do not match the checksum in its attempt"

    def _checksum(self, label: str) -> str:
        fields = self.model_dump(mode="json", exclude={"attempt", "data_key"}) | {"label": label}
        return blake2b(canonical_json(fields), digest_size=8).hexdigest()


def ids_digest(sample_ids: UInt8Array) -> str:
    """Return 32 hex digits over the sample ids [N, 16] in row order."""
    return blake2b(sample_ids.tobytes(), digest_size=16, person=b"lectern.rows").hexdigest()


def unit_of(key: str) -> str:
    """Return the unit whose record `manifest/<unit>.json` is."""
    return key.removeprefix(MANIFEST_PREFIX).removesuffix(".json")


def manifest_keys(store: Store) -> list[str]:
    """Return the keys of all manifests, also of units that an index covers.

    Hidden files, which desktops and consoles leave, are passed over.
    """
    return [key for key in store.list(MANIFEST_PREFIX) if not key.rpartition("/")[2].startswith(".")]


def read_manifest(store: Store, key: str, fingerprint: str) -> ManifestRecord:
    """Return one record; IntegrityError when it is altered, misnamed, foreign, or leads outside the dataset."""
    return parse_manifest(store.read(key), key, fingerprint, store)


def parse_manifest(raw: bytes, key: str, fingerprint: str, store: Store) -> ManifestRecord:
    """Check and return the record in `raw`, the contents of `key`."""
    try:
        record = ManifestRecord.model_validate(json.loads(raw))
    except ValidationError as error:
        raise _damaged(store, key, first_problem(error)) from error
    except ValueError as error:
        raise _damaged(store, key, str(error)) from error
    if record.key != key:
        raise _damaged(store, key, f"it is the record of unit {record.unit!r}, which is not its name")
    defect = record.defect()
    if defect is None and record.to_json() != raw:
        defect = "it is not in the form it was written in"
    if defect is None and record.fingerprint != fingerprint:
        defect = f"its fingerprint {record.fingerprint} is not that of the dataset, {fingerprint}"
    if defect is not None:
        raise _damaged(store, key, defect)
    return record


def each(store: Store, work: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """Apply small reads to all items in order, side by side where requests have to travel."""
    if store.is_local or len(items) < 2:
        return [work(item) for item in items]
    with ThreadPoolExecutor(max_workers=min(REMOTE_THREADS, len(items))) as pool:
        return list(pool.map(work, items))


def _damaged(store: Store, key: str, why: str) -> IntegrityError:
    return IntegrityError(
        f"{store.shown(key)} is damaged or was edited: {why}; delete it and run the capture again: only the samples of "
        "this unit are scored again"
    )
