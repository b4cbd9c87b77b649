"""Reads the logit caches of DistillKit: Parquet rows of token ids, packed ids and compressed log-probabilities.

Layout of `compressed_logprobs` at one position, bytes one after the other, little-endian: `exact_k` values of
`exact_dtype`; the coefficients of `polynomial_terms`, of `term_dtype`, which approximate the other k − exact_k values v
over t = 0, 1, … (or 0 to 1): v(t) = Σ c·t^power, √t or e^t; then for each of `residual_bins` a scale and packed
integers q, the difference scale · (q − 2^(bits−1)) of the next values from that curve (scale · (2q − 1) for one bit).
With `delta_encoding` the values are steps from one to the next. `bytepacked_indices` holds k ids of ⌈log₂ d⌉ bits,
highest bit first. The older layout has `packed_indices`, 64-bit words of ids, lowest first, `exact_values`, and
`coeffs` of powers of t = 1, 2, …, inverted or not. Row j tells about token j + 1.
"""

from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from numpy.typing import NDArray
from pydantic import Field, ValidationError

from storage.errors import InputError
from storage.importers.bits import unpack_big_endian, unpack_words
from storage.importers.rows import SourceRow
from storage.object_store import Store
from storage.range_file import RangeFile
from storage.samples import Int64Array, UInt8Array
from storage.settings import Settings, first_problem
from storage.targets import Float32Array

CONFIG_KEY = "compression_config.yaml"
FloatName = Literal["float16", "bfloat16", "float32", "float64"]
_ITEM_BYTES: dict[str, int] = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}


class ResidualBin(Settings):
    """Quantised differences of a run of values from the curve."""

    scale_dtype: FloatName
    element_bits: int = Field(ge=1, le=32)
    num_elements: int = Field(ge=1)


class Compression(Settings):
    """DistillKit's settings of `compressed_logprobs`, under its own names."""

    d: int = Field(ge=2)
    k: int = Field(ge=1)
    exact_k: int = Field(ge=0)
    exact_dtype: FloatName = "float32"
    polynomial_terms: list[int | Literal["sqrt", "exp"]] | None = None
    term_dtype: FloatName = "float32"
    residual_bins: list[ResidualBin] = Field(default_factory=list)
    delta_encoding: bool = True
    error_diffusion: bool = False
    """Says how it was encoded; decoding is the same."""
    normalize_t: bool = False


class LegacyCompression(Settings):
    """DistillKit's settings of its older layout, under its own names."""

    vocab_size: int = Field(ge=2)
    k: int = Field(ge=1)
    exact_k: int = Field(ge=0)
    polynomial_degree: int = Field(ge=0)
    invert_polynomial: bool = True
    with_sqrt_term: bool = False
    term_dtype: FloatName = "float32"


def read_compression(raw: bytes, where: str) -> Compression | LegacyCompression:
    """Parse a compression config (YAML); InputError when it is none."""
    try:
        fields = yaml.safe_load(raw)
        legacy = isinstance(fields, dict) and "polynomial_degree" in fields
        return (LegacyCompression if legacy else Compression).model_validate(fields)
    except yaml.YAMLError as error:
        raise InputError(f"{where} is not valid YAML: {error}") from error
    except ValidationError as error:
        raise InputError(f"{where} is no compression config of DistillKit: {first_problem(error)}") from error


def index_bits(size: int) -> int:
    """Return the bits of one packed id of a vocabulary; computed in float32, as DistillKit does."""
    return int(np.ceil(np.log2(np.float32(size))))


def decode_logprobs(raw: UInt8Array, config: Compression) -> Float32Array:
    """Return float32 [T, k] from `compressed_logprobs` [T, bytes]; InputError when the rows have another length."""
    at = 0

    def take(num_bytes: int) -> UInt8Array:
        nonlocal at
        at += num_bytes
        if at > raw.shape[1]:
            raise InputError(f"compressed_logprobs has {raw.shape[1]} bytes for a position, too few for this config")
        return np.ascontiguousarray(raw[:, at - num_bytes : at])

    exact = _floats(take(config.exact_k * _ITEM_BYTES[config.exact_dtype]), config.exact_dtype)
    rest = np.zeros((len(raw), config.k - config.exact_k))
    if config.polynomial_terms:
        num_terms = len(config.polynomial_terms)
        coefficients = _floats(take(num_terms * _ITEM_BYTES[config.term_dtype]), config.term_dtype)
        rest += coefficients @ _curve(config, rest.shape[1]).T
    first = 0
    for part in config.residual_bins:
        scale = _floats(take(_ITEM_BYTES[part.scale_dtype]), part.scale_dtype)
        packed = take(-(-part.element_bits * part.num_elements // 8))
        steps = unpack_big_endian(packed, part.element_bits, part.num_elements)
        centred = 2 * steps - 1 if part.element_bits == 1 else steps - (1 << (part.element_bits - 1))
        rest[:, first : first + part.num_elements] += scale * centred
        first += part.num_elements
    if at != raw.shape[1]:
        raise InputError(f"compressed_logprobs has {raw.shape[1]} bytes for a position, this config takes {at}")
    values = np.concatenate([exact, rest], axis=1)
    return np.asarray(np.cumsum(values, axis=1) if config.delta_encoding else values, dtype=np.float32)


def decode_legacy(exact: NDArray[Any], coefficients: NDArray[Any], config: LegacyCompression) -> Float32Array:
    """Return float32 [T, k] from `exact_values` and `coeffs` of the older layout."""
    t = np.arange(1, config.k - config.exact_k + 1, dtype=np.float64)
    sign = -1 if config.invert_polynomial else 1
    terms = [t ** (sign * power) for power in range(config.polynomial_degree + 1)]
    terms += [np.sqrt(t)] if config.with_sqrt_term else []
    wanted = (config.exact_k, len(terms) if len(t) else 0)
    if (exact.shape[1], coefficients.shape[1]) != wanted:
        raise InputError(
            f"{exact.shape[1]} exact values and {coefficients.shape[1]} coefficients came where the config has {wanted}"
        )
    rest = coefficients @ np.stack(terms) if len(t) else np.zeros((len(exact), 0))
    return np.asarray(np.concatenate([exact, rest], axis=1), dtype=np.float32)


def read_rows(store: Store, keys: list[str], config: Compression | LegacyCompression) -> Iterator[SourceRow]:
    """Yield the rows of Parquet files, decoded; a row that cannot be carries its `defect` instead."""
    for key in keys:
        source = pa.PythonFile(RangeFile(store, key, store.size(key)), mode="r")
        try:
            file = pq.ParquetFile(source)
        except (pa.ArrowException, OSError) as error:
            raise InputError(f"{store.shown(key)} is not a readable Parquet file: {error}") from error
        first = 0
        for batch in file.iter_batches(batch_size=16):
            columns = {name: batch.column(name) for name in batch.schema.names}
            if "input_ids" not in columns:
                raise InputError(f"{store.shown(key)} has no column `input_ids`; it has {list(columns)}")
            for n in range(len(batch)):
                yield _row(f"{store.shown(key)} row {first + n}", columns, n, config)
            first += len(batch)


def _row(where: str, columns: dict[str, Any], n: int, config: Compression | LegacyCompression) -> SourceRow:
    tokens = _flat(columns, "input_ids", n)
    try:
        ids, logprobs = _targets(columns, n, config)
    except (InputError, ValueError) as error:
        return SourceRow.bad(where, str(error))
    document = _flat(columns, "attention_mask", n) if "attention_mask" in columns else None
    labels = _flat(columns, "labels", n) if "labels" in columns else None
    return SourceRow(where, tokens, ids, logprobs, document, labels)


def _targets(columns: dict[str, Any], n: int, config: Compression | LegacyCompression) -> tuple[Int64Array, Any]:
    if isinstance(config, Compression):
        logprobs = decode_logprobs(_matrix(columns, "compressed_logprobs", n, np.uint8), config)
        packed = _matrix(columns, "bytepacked_indices", n, np.uint8)
        return unpack_big_endian(packed, index_bits(config.d), config.k), logprobs
    exact, coefficients = (_matrix(columns, name, n, np.float64) for name in ("exact_values", "coeffs"))
    words = _matrix(columns, "packed_indices", n, None)
    return unpack_words(words, index_bits(config.vocab_size), config.k), decode_legacy(exact, coefficients, config)


def _flat(columns: dict[str, Any], name: str, n: int) -> Int64Array:
    return np.asarray(columns[name][n].values.to_numpy(zero_copy_only=False), dtype=np.int64)


def _matrix(columns: dict[str, Any], name: str, n: int, dtype: Any) -> NDArray[Any]:
    """Return a list of equally long lists as an array [T, values]; InputError where it is not that."""
    if name not in columns:
        raise InputError(f"there is no column `{name}`; there are {list(columns)}")
    rows = columns[name][n].values
    lengths = np.unique(rows.value_lengths().to_numpy(zero_copy_only=False)) if len(rows) else np.zeros(1)
    if len(lengths) != 1 or rows.null_count:
        raise InputError(f"`{name}` has lists of {sorted(lengths.tolist())} values, where all must be as long")
    flat = rows.flatten().to_numpy(zero_copy_only=False)
    return np.asarray(flat, dtype=dtype).reshape(len(rows), -1)


def _curve(config: Compression, num_points: int) -> NDArray[np.float64]:
    """Return the terms of the polynomial at each point, [num_points, terms]."""
    t = np.linspace(0, 1, num_points) if config.normalize_t else np.arange(num_points, dtype=np.float64)
    special = {"sqrt": np.sqrt, "exp": np.exp}
    return np.stack([special[p](t) if isinstance(p, str) else t**p for p in config.polynomial_terms or []], axis=1)


def _floats(raw: UInt8Array, name: str) -> NDArray[np.float64]:
    if name == "bfloat16":
        return (raw.view("<u2").astype(np.uint32) << np.uint32(16)).view(np.float32).astype(np.float64)
    return raw.view({"float16": "<f2", "float32": "<f4", "float64": "<f8"}[name]).astype(np.float64)
