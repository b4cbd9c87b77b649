"""`dataset.json`: what a dataset is, written once by whoever creates it and checked by everyone who opens it."""

import json
from hashlib import blake2b
from typing import Any, Self

from pydantic import Field, ValidationError

from storage.config import Codec
from storage.errors import InputError, IntegrityError
from storage.identity import DatasetIdentity, canonical_json
from storage.object_store import Store
from storage.settings import Settings, added, first_problem

RELEASE = "0.2.0"
"""This release, as written into datasets; equal to the version in pyproject.toml."""
INFO_KEY = "dataset.json"
SCHEMA_VERSION = 2
"""Layout of new datasets. 1: plain codec and one manifest per unit; read and continued as it is. 2: adds the index."""


class TokenizerFacts(Settings):
    """Sizes that a student needs to know."""

    vocab_size: int = Field(ge=1)
    """Largest token id + 1; every stored id is below it."""
    padded_vocab_size: int = Field(ge=1)
    """Rows of the teacher's output head, padding included."""


class DatasetInfo(Settings):
    """The contents of dataset.json."""

    schema_version: int = Field(default=SCHEMA_VERSION, ge=1)
    codec: Codec = "plain"
    fingerprint: str
    identity: DatasetIdentity
    tokenizer: TokenizerFacts
    created_by: str = f"lectern {RELEASE}"
    """Release that gave it its schema version."""
    upgraded_from: int | None = added(None)
    """Schema version that it was made with, where a later release raised it."""
    least_generation: int = added(0)
    """The index has at least this generation: manifests that it covers were swept. 0: no manifest was."""
    checksum: str = ""
    """Hex BLAKE2b over the other fields."""

    @classmethod
    def of(cls, identity: DatasetIdentity, padded_vocab_size: int, codec: Codec = "plain") -> Self:
        """Describe a new dataset."""
        facts = TokenizerFacts(vocab_size=identity.tokenizer.vocab_size, padded_vocab_size=padded_vocab_size)
        return cls(codec=codec, fingerprint=identity.fingerprint, identity=identity, tokenizer=facts).changed()

    def changed(self, **fields: Any) -> Self:
        """Return this with other values of some fields, as this release writes it."""
        info = self.model_copy(update=fields)
        return info.model_copy(update={"checksum": info.computed_checksum()})

    def computed_checksum(self) -> str:
        """Return what `checksum` must be."""
        fields = self.model_dump(mode="json", exclude={"checksum"})
        return blake2b(canonical_json(fields), digest_size=16).hexdigest()

    def to_json(self) -> bytes:
        """Return the file's bytes."""
        return json.dumps(self.model_dump(mode="json"), indent=1, ensure_ascii=False).encode() + b"\n"


def upgrade_info(store: Store, info: DatasetInfo, least_generation: int = 0) -> DatasetInfo:
    """Raise a dataset to the schema version and index generation that it needs from now on; return its description.

    The file is replaced in one step. Rows, records and the fingerprint stay as they are.
    """
    needed = info.schema_version < SCHEMA_VERSION or info.least_generation < least_generation
    if needed:
        info = info.changed(
            schema_version=SCHEMA_VERSION,
            upgraded_from=info.upgraded_from or (info.schema_version if info.schema_version < SCHEMA_VERSION else None),
            created_by=f"lectern {RELEASE}",
            least_generation=max(info.least_generation, least_generation),
        )
        store.write(INFO_KEY, info.to_json())
    return info


def read_info(store: Store) -> DatasetInfo:
    """Open dataset.json; InputError when there is none or a newer release wrote it, IntegrityError when altered."""
    raw = store.read_if_exists(INFO_KEY)
    if raw is None:
        raise InputError(f"no dataset at {store.shown()}: {INFO_KEY} is missing; capture it first, or mend the URL")
    where = store.shown(INFO_KEY)
    fields = _parse(raw, where)
    version = fields.get("schema_version")
    if isinstance(version, int) and version > SCHEMA_VERSION:
        raise InputError(
            f"{where} has schema version {version}, written by {fields.get('created_by')}; this release, lectern "
            f"{RELEASE}, reads versions up to {SCHEMA_VERSION}: install {fields.get('created_by')} or newer"
        )
    try:
        info = DatasetInfo.model_validate(fields)
    except ValidationError as error:
        raise _altered(where, first_problem(error)) from error
    if info.checksum != info.computed_checksum() or info.fingerprint != info.identity.fingerprint:
        raise _altered(where, "its checksum does not match")
    if info.to_json() != raw:
        raise _altered(where, "it is not in the form it was written in")
    return info


def _parse(raw: bytes, where: str) -> dict[str, Any]:
    try:
        fields = json.loads(raw)
    except ValueError as error:
        raise _altered(where, str(error)) from error
    if not isinstance(fields, dict):
        raise _altered(where, "it holds no JSON object")
    return fields


def _altered(where: str, why: str) -> IntegrityError:
    return IntegrityError(
        f"{where} is damaged or was edited: {why}; restore it from a copy, or capture into another URL"
    )
