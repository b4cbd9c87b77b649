"""Commits units: data under a key of its own, then the manifest record that makes it exist."""

from dataclasses import dataclass
from hashlib import sha256
from typing import Self

from storage.codecs.table import encode
from storage.config import Codec
from storage.errors import LecternError, StorageError
from storage.identity import DatasetIdentity, require_same
from storage.info import INFO_KEY, DatasetInfo, read_info
from storage.lease import Lease
from storage.manifest import MANIFEST_PREFIX, ManifestRecord, ids_digest, parse_manifest, read_manifest
from storage.object_store import Store
from storage.samples import SampleBatch
from storage.schema import to_parquet
from storage.targets import TargetBatch


@dataclass(frozen=True)
class Receipt:
    """What became of a unit: `committed` is false when another attempt had committed it before."""

    unit: str
    rows: int
    tokens: int
    bytes: int
    committed: bool


class DatasetWriter:
    """Writes units into one dataset; any number of writers in any number of processes may work side by side.

    Where the store ignores conditional creates one run may write at a time: the writer that `create` returns holds a
    lease until it is closed or its process ends.
    """

    def __init__(self, store: Store, info: DatasetInfo, lease: Lease | None = None) -> None:
        self.store = store
        self.info = info
        self.lease = lease
        """None where conditional creates are honoured, and in the ranks of a run whose driver holds the lease."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the lease up, where there is one."""
        if self.lease is not None:
            self.lease.release()
            self.lease = None

    @classmethod
    def create(
        cls, url: str, identity: DatasetIdentity, padded_vocab_size: int | None = None, codec: Codec = "plain"
    ) -> Self:
        """Probe the store, then make the dataset, with this codec, or join one of the same identity, with its own.

        Raises InputError when the store cannot be written, or is being written by another process though it ignores
        conditional creates; IdentityError when a dataset of another identity is there.
        """
        store = Store(url)
        conditional = store.probe()
        if not store.exists(INFO_KEY):
            info = DatasetInfo.of(identity, padded_vocab_size or identity.tokenizer.vocab_size, codec)
            store.create(INFO_KEY, info.to_json())
        info = read_info(store)
        require_same(identity, info.identity, store.shown())
        return cls(store, info, None if conditional else Lease.acquire(store))

    @classmethod
    def open(cls, url: str, identity: DatasetIdentity) -> Self:
        """Join an existing dataset without probing, as ranks do after the driver has called `create`."""
        store = Store(url)
        info = read_info(store)
        require_same(identity, info.identity, store.shown())
        return cls(store, info)

    def committed(self, unit_id: str) -> Receipt | None:
        """Return what is committed under a unit's name, or None."""
        key = f"{MANIFEST_PREFIX}{unit_id}.json"
        # Reading costs one request; asking an object store whether a key exists costs two, a slow listing among them.
        raw = self.store.read_if_exists(key)
        if raw is None:
            return None
        return _receipt(parse_manifest(raw, key, self.info.fingerprint, self.store), committed=False)

    def commit(self, unit_id: str, samples: SampleBatch, targets: TargetBatch, attempt: str | int) -> Receipt:
        """Store a unit unless it is stored already.

        Raises IntegrityError before anything is written when rows are out of contract, StorageError when the store
        fails; whatever was committed before stays intact, and without its record this unit does not exist.
        """
        fingerprint = self.info.fingerprint
        if self.lease is not None:
            self.lease.check()
        before = self.committed(unit_id)
        if before is not None:
            return before
        data = to_parquet(encode(samples, targets, self.info.identity, self.info.codec))
        record = ManifestRecord.seal(
            unit=unit_id,
            attempt=str(attempt),
            size_bytes=len(data),
            sha256=sha256(data).hexdigest(),
            rows=len(samples),
            tokens=samples.num_tokens,
            digest=ids_digest(samples.sample_id),
            fingerprint=fingerprint,
        )
        self.store.write(record.data_key, data)
        winner = self._claim(record)
        if winner.attempt != record.attempt:
            self.store.delete(record.data_key)
        return _receipt(winner, committed=winner.attempt == record.attempt)

    def _claim(self, record: ManifestRecord) -> ManifestRecord:
        """Create the record and return it, or the one that was there first."""
        try:
            if self.store.create(record.key, record.to_json()):
                return record
        except StorageError:
            # Locally a failed create is final, and a full disk needs its room back. A remote request without an
            # answer may still arrive: its data must stay, and is swept up with other orphans if it never does.
            if self.store.is_local:
                self._discard(record)
            raise
        # A retried request may have met its own first success, so the record itself tells whose it is.
        return read_manifest(self.store, record.key, record.fingerprint)

    def _discard(self, record: ManifestRecord) -> None:
        try:
            if not self.store.exists(record.key):
                self.store.delete(record.data_key)
        except LecternError as error:
            raise StorageError(
                f"{error}; {self.store.shown(record.data_key)} is left behind without a record"
            ) from error


def _receipt(record: ManifestRecord, committed: bool) -> Receipt:
    return Receipt(record.unit, record.rows, record.tokens, record.bytes, committed)
