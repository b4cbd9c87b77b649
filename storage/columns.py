"""What the columns of a dataset's data files are and weigh, read from their footers."""

import re

import pyarrow as pa
import pyarrow.parquet as pq

from storage.range_file import RangeFile
from storage.reader import Dataset

_NOTES = {
    r"sample_id": "16 bytes of BLAKE2b over token ids, supervised mask and document boundaries",
    r"source": "which corpus",
    r"tokens": "token ids of the window",
    r"supervised": "which tokens the student must predict: the positions",
    r"document": "which packed document a token belongs to; null = one document",
    r"target_count": "entries kept at each position",
    r"target_id": "their token ids, positions joined",
    r"target_logprob": "natural logarithm of the teacher's probability of each entry",
    r"target_draws(_\d+)?": "how often each entry was drawn; 0 = kept for its rank",
    r"tail_mass": "teacher probability outside the entries, at each position",
    r"teacher_nll": "mean loss of the teacher, nats",
    r"teacher_entropy": "mean entropy of the teacher, nats",
    r"hidden_.+": "hidden states, row-major [kept positions, width]; see the schema metadata `lectern`",
    r"attention_.+": "attention averaged over the heads, float16, rows of the kept positions joined",
    r"completion_id": "which completion of the teacher this is",
    r"prompt_tokens": "tokens of its prompt",
}


def column_bytes(dataset: Dataset, most_units: int = 16) -> list[tuple[str, int]]:
    """Return the compressed bytes of each column, largest first, over the first `most_units` data files."""
    totals: dict[str, int] = {}
    for record in dataset.manifests[:most_units]:
        source = pa.PythonFile(RangeFile(dataset.store, record.data_key, record.bytes), mode="r")
        footer = pq.ParquetFile(source).metadata
        for group in range(footer.num_row_groups):
            for column in range(footer.num_columns):
                chunk = footer.row_group(group).column(column)
                # Names of layers have dots of their own.
                name = chunk.path_in_schema.removesuffix(".list.element")
                totals[name] = totals.get(name, 0) + chunk.total_compressed_size
    return sorted(totals.items(), key=lambda item: -item[1])


def column_note(name: str) -> str:
    """Return what a column holds, in a few words."""
    return next((note for pattern, note in _NOTES.items() if re.fullmatch(pattern, name)), "packed by the codec")
