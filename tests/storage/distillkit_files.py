"""Writes caches in DistillKit's published layout, for tests of the importer."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

CONFIG: dict[str, Any] = {
    "d": 500,
    "k": 12,
    "exact_k": 4,
    "exact_dtype": "float32",
    "polynomial_terms": [0, 1, 2, "sqrt"],
    "term_dtype": "float32",
    "residual_bins": [{"scale_dtype": "float16", "element_bits": 6, "num_elements": 8}],
    "delta_encoding": False,
    "error_diffusion": False,
    "normalize_t": False,
}


def pack_bits(numbers: np.ndarray, bits: int) -> np.ndarray:
    """Return uint8 [T, bytes] of int [T, n], highest bit first."""
    stream = (numbers[..., None] >> np.arange(bits - 1, -1, -1)) & 1
    return np.packbits(stream.reshape(len(numbers), -1).astype(np.uint8), axis=1)


def compress(ids: np.ndarray, logprobs: np.ndarray, config: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Return `compressed_logprobs` and `bytepacked_indices` of falling log-probabilities [T, k] and their ids."""
    values = np.diff(logprobs, axis=1, prepend=0) if config["delta_encoding"] else logprobs
    exact, rest = np.split(values, [config["exact_k"]], axis=1)
    parts = [np.ascontiguousarray(exact, dtype=config["exact_dtype"]).view(np.uint8).reshape(len(ids), -1)]
    if config["polynomial_terms"]:
        size = rest.shape[1]
        t = np.linspace(0, 1, size) if config["normalize_t"] else np.arange(size)
        special = {"sqrt": np.sqrt, "exp": np.exp}
        curve = np.stack([special[p](t) if isinstance(p, str) else t**p for p in config["polynomial_terms"]], axis=1)
        fitted = np.linalg.lstsq(curve, rest.T, rcond=None)[0].T.astype(config["term_dtype"])
        parts.append(np.ascontiguousarray(fitted).view(np.uint8).reshape(len(ids), -1))
        rest = rest - fitted.astype(np.float64) @ curve.T
    first = 0
    for part in config["residual_bins"]:
        chunk = rest[:, first : first + part["num_elements"]]
        most = 1 << (part["element_bits"] - 1)
        scale = (np.abs(chunk).max(axis=1, keepdims=True) / most).astype(part["scale_dtype"])
        steps = np.clip(np.rint(chunk / np.where(scale > 0, scale, 1)), -most, most - 1).astype(np.int64) + most
        parts += [np.ascontiguousarray(scale).view(np.uint8), pack_bits(steps, part["element_bits"])]
        first += part["num_elements"]
    return np.concatenate(parts, axis=1), pack_bits(ids, int(np.ceil(np.log2(config["d"]))))


def distributions(rng: np.random.Generator, positions: int, vocab_size: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the k best ids and their log-probabilities [positions, k] of random distributions."""
    logits = rng.normal(0, 2.5, (positions, vocab_size))
    logprob = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    ids = np.argsort(-logprob, axis=1, kind="stable")[:, :k]
    return ids, np.take_along_axis(logprob, ids, axis=1)


def write_cache(folder: Path, rows: list[dict[str, Any]], config: dict[str, Any], rows_per_file: int = 4) -> None:
    """Write rows of `{input_ids, ids, logprobs, …}` as data_N.parquet beside compression_config.yaml."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "compression_config.yaml").write_text(yaml.safe_dump(config))
    for n in range(0, len(rows), rows_per_file):
        written = []
        for row in rows[n : n + rows_per_file]:
            logprobs, ids = compress(row["ids"], row["logprobs"], config)
            kept = {key: value for key, value in row.items() if key not in {"ids", "logprobs"}}
            packed = {"compressed_logprobs": logprobs.tolist(), "bytepacked_indices": ids.tolist()}
            written.append({**kept, **packed})
        lists = {name: pa.list_(pa.list_(pa.uint8())) for name in ("compressed_logprobs", "bytepacked_indices")}
        schema = pa.schema([(name, lists.get(name, pa.list_(pa.int64()))) for name in written[0]])
        pq.write_table(pa.Table.from_pylist(written, schema), folder / f"data_{n // rows_per_file}.parquet")


def rows_of(num_rows: int, seed: int = 0, vocab_size: int = 500) -> list[dict[str, Any]]:
    """Return captured rows; every third is packed of two documents and cut to the positions that have targets."""
    rng, rows = np.random.default_rng(seed), []
    for n in range(num_rows):
        length = int(rng.integers(4, 20))
        packed = n % 3 == 2
        ids, logprobs = distributions(rng, length if packed else length - 1, vocab_size, 12)
        row = {"input_ids": rng.integers(0, vocab_size, length).tolist(), "ids": ids, "logprobs": logprobs}
        if not packed:
            row["attention_mask"] = [1] * length
        else:
            row["attention_mask"] = [1] * (length // 2) + [2] * (length - length // 2)
        rows.append(row)
    return rows


def spoiled(kind: str, vocab_size: int = 500) -> dict[str, Any]:
    """Return a row that is out of contract in the named way."""
    row = rows_of(1, 5, vocab_size)[0]
    if kind == "heavy":
        row["logprobs"] = row["logprobs"] + 2.0 - row["logprobs"][:, :1].max()
        row["logprobs"][:, :] = np.minimum(row["logprobs"], -0.5)
    if kind == "logits":
        row["logprobs"] = row["logprobs"] + 9
    if kind == "nan":
        row["logprobs"][1, 2] = np.nan
    if kind == "twice":
        row["ids"][2, 1] = row["ids"][2, 0]
    if kind == "outside":
        row["ids"][2, 1] = 509
    if kind == "short":
        row["ids"], row["logprobs"] = row["ids"][:-2], row["logprobs"][:-2]
    if kind == "token":
        row["input_ids"][1] = 501
    return row
