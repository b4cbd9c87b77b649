"""Samples that a teacher cannot score, named beside the manifests with the reason, so that nobody waits for them.

`refused/<digest>.json` holds `{fingerprint, setting, reasons: {reason: [sample id, …]}}` under the hash of its content:
written once, by anybody, in any order. `setting` is how the teacher was asked, apart from the dataset's identity; asked
in another way it may answer. A sample that the dataset holds is refused no longer, whatever was recorded before.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from typing import Self

import numpy as np
from pydantic import Field, ValidationError

from storage.catalog import SampleIds, id_array
from storage.errors import IntegrityError
from storage.identity import canonical_json
from storage.manifest import each
from storage.object_store import Store
from storage.samples import ID_BYTES, BoolArray, UInt8Array
from storage.settings import Settings, first_problem

REFUSED_PREFIX = "refused/"


class RefusalRecord(Settings):
    """The contents of one file."""

    fingerprint: str
    setting: str
    """How the teacher was asked."""
    reasons: dict[str, list[str]] = Field(min_length=1)
    """Reason → hex sample ids, sorted."""

    @property
    def key(self) -> str:
        """Return where this record lies."""
        return f"{REFUSED_PREFIX}{blake2b(self.to_json(), digest_size=16).hexdigest()}.json"

    def to_json(self) -> bytes:
        """Return the file's bytes."""
        return canonical_json(self.model_dump(mode="json"))


class Refusals:
    """Which samples were refused, and why: sample id → reason; of several records of a sample the last one counts."""

    def __init__(self, records: Sequence[RefusalRecord] = ()) -> None:
        self._records = records
        self._reasons = {
            bytes.fromhex(name): reason
            for record in records
            for reason, names in record.reasons.items()
            for name in names
        }

    @classmethod
    def read(cls, store: Store, fingerprint: str) -> Self:
        """Return what is recorded in a dataset; IntegrityError when a record is damaged."""
        return cls(each(store, lambda key: _read(store, key, fingerprint), store.list(REFUSED_PREFIX)))

    def under(self, setting: str) -> Self:
        """Return what teachers that were asked in this way refused."""
        return type(self)([record for record in self._records if record.setting == setting])

    def sample_ids(self) -> UInt8Array:
        """Return the samples, uint8 [N, 16]."""
        return id_array(list(self._reasons))

    def mask(self, sample_ids: SampleIds) -> BoolArray:
        """Return which of the samples were refused, bool [N]."""
        ids = id_array(sample_ids)
        if not self._reasons:
            return np.zeros(len(ids), dtype=np.bool_)
        return np.array([bytes(row) in self._reasons for row in ids], dtype=np.bool_)

    def reasons(self, sample_ids: SampleIds) -> Counter[str]:
        """Return reason → how many of the samples were refused for it."""
        ids = id_array(sample_ids)
        return Counter(self._reasons[bytes(row)] for row in ids[self.mask(ids)])


def record_refusals(store: Store, fingerprint: str, setting: str, refused: Mapping[bytes, str]) -> None:
    """Keep sample id → reason in the dataset; nothing is written for none."""
    if not refused:
        return
    reasons: dict[str, list[str]] = {}
    for sample_id in sorted(refused):
        assert len(sample_id) == ID_BYTES
        reasons.setdefault(refused[sample_id], []).append(sample_id.hex())
    record = RefusalRecord(fingerprint=fingerprint, setting=setting, reasons=reasons)
    store.write(record.key, record.to_json())


def check_refusals(store: Store, fingerprint: str) -> list[str]:
    """Return what is wrong with the records of a dataset, one message for each."""
    problems = []
    for key in store.list(REFUSED_PREFIX):
        try:
            _read(store, key, fingerprint)
        except IntegrityError as error:
            problems.append(str(error))
    return problems


def _read(store: Store, key: str, fingerprint: str) -> RefusalRecord:
    raw = store.read(key)
    try:
        record = RefusalRecord.model_validate(json.loads(raw))
        for name in (name for names in record.reasons.values() for name in names):
            if len(bytes.fromhex(name)) != ID_BYTES:
                raise ValueError(f"{name!r} is no sample id")
    except ValidationError as error:
        raise _damaged(store, key, first_problem(error)) from error
    except ValueError as error:
        raise _damaged(store, key, str(error)) from error
    if record.key != key:
        raise _damaged(store, key, "its name is not the hash of its content")
    if record.fingerprint != fingerprint:
        raise _damaged(store, key, f"its fingerprint {record.fingerprint} is not that of the dataset, {fingerprint}")
    return record


def _damaged(store: Store, key: str, why: str) -> IntegrityError:
    return IntegrityError(
        f"{store.shown(key)} is damaged or was edited: {why}; delete it: the next capture asks for its samples again"
    )
