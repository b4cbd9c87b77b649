"""Samples and targets to the table of a data file and back, by the codec of the dataset."""

from collections.abc import Sequence

import pyarrow as pa

from storage.codecs import compact, plain
from storage.config import Codec
from storage.identity import DatasetIdentity
from storage.samples import SampleBatch
from storage.schema import file_metadata
from storage.targets import TargetBatch


def encode(samples: SampleBatch, targets: TargetBatch, identity: DatasetIdentity, codec: Codec) -> pa.Table:
    """Return the table of a data file; refuses rows out of contract with IntegrityError.

    Kind `text` has no entries to pack: its columns are the plain ones.
    """
    if codec == "compact" and identity.capture.kind != "text":
        return compact.encode(samples, targets, identity)
    return plain.encode(samples, targets, identity)


def decode(table: pa.Table, layers: Sequence[str] | None = None) -> tuple[SampleBatch, TargetBatch]:
    """Return the samples and targets of a data file of either codec; IntegrityError where it is damaged.

    With `layers`, only these layers' hidden states are looked for. Arrays may be read-only views of the table's memory.
    """
    packed = file_metadata(table.schema).codec == "compact"
    return plain.decode(table, layers, compact.read_entries if packed else None)


def to_plain(table: pa.Table, identity: DatasetIdentity) -> pa.Table:
    """Return the plain columns of a data file of either codec."""
    return plain.encode(*decode(table), identity)
