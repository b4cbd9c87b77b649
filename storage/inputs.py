"""Which files a source reads: URLs and globs expanded, sorted and stamped, without reading them."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from lzma import LZMAError
from pathlib import PurePosixPath
from typing import Any, Literal
from zipfile import BadZipFile
from zlib import error as ZlibError  # noqa: N812 - the standard library's only name for it

import fsspec
from fsspec.implementations.local import LocalFileSystem

from storage.config import SourceConfig
from storage.embedded_text import EMBEDDED_PREFIX, embedded_version
from storage.errors import InputError
from storage.store_errors import explain, is_store_failure, redact

Format = Literal["embedded", "text", "jsonl", "parquet"]

_COMPRESSED = {".gz", ".bz2", ".xz", ".lzma", ".zst", ".lz4", ".zip"}
_FORMATS: dict[str, Format] = {".jsonl": "jsonl", ".json": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}
_STAMPS = ("ETag", "etag", "md5Hash", "generation", "mtime", "LastModified", "last_modified", "updated", "modified")


@dataclass(frozen=True)
class InputFile:
    """One file of a source.

    `size` (bytes) and `stamp` (etag or modification time) change when the content does, as far as the store tells.
    """

    url: str
    format: Format
    size: int | None
    stamp: str

    @property
    def shown(self) -> str:
        """The URL for messages, without user, password or query."""
        return redact(self.url)


def resolve_inputs(source: SourceConfig) -> list[InputFile]:
    """Return the files of a source, sorted by URL, each once.

    Raises:
        InputError: a file is missing or may not be read, a glob matches nothing, or a protocol is unknown.
    """
    paths = [source.path] if isinstance(source.path, str) else source.path
    if not paths:
        raise InputError(f"data.sources[{source.name}].path is empty; give at least one file")
    found = {file.url: file for path in paths for file in _expand(path, source)}
    return [found[url] for url in sorted(found)]


@contextmanager
def reading(shown: str) -> Iterator[None]:
    """Turn what goes wrong while reading an input into an InputError that names it."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise InputError(f"{shown} is not UTF-8 text (byte {error.start}: {error.reason}); convert it first") from error
    except (EOFError, BadZipFile, LZMAError, ZlibError) as error:
        raise InputError(f"{shown} is truncated or damaged: {error}") from error
    except (ImportError, ValueError) as error:
        raise InputError(f"cannot read {shown}: {error}") from error
    except Exception as error:
        if not is_store_failure(error):
            raise
        raise InputError(f"{explain(error, 'read', shown)}") from error


def _expand(path: str, source: SourceConfig) -> Iterator[InputFile]:
    if path.startswith(EMBEDDED_PREFIX):
        yield InputFile(path, "embedded", None, embedded_version())
        return
    with reading(redact(path)):
        filesystem, root = fsspec.core.url_to_fs(path, **_options(path))
        if _is_glob(path) and not filesystem.exists(root):
            matches = sorted(match for match in filesystem.glob(root) if filesystem.isfile(match))
            if not matches:
                raise InputError(f"{redact(path)} matches no file; check data.sources[{source.name}].path")
        else:
            matches = [root]
        for match in matches:
            info = filesystem.info(match)
            if info.get("type") == "directory":
                raise InputError(f"{redact(path)} is a folder; name its files, e.g. {redact(path).rstrip('/')}/*.jsonl")
            yield InputFile(_url(filesystem, match), _format(match, source), info.get("size"), _stamp(info))


def open_input(file: InputFile, compression: str | None = "infer") -> Any:
    """Return a context manager over the file's bytes, decompressed by its suffix unless told otherwise."""
    return fsspec.open(file.url, "rb", compression=compression, **_options(file.url))


def _options(url: str) -> dict[str, Any]:
    return {"use_listings_cache": False} if url.startswith(("s3://", "s3a://")) else {}


def _is_glob(path: str) -> bool:
    return any(mark in path for mark in ("*" if path.startswith(("http://", "https://")) else "*?["))


def _url(filesystem: Any, match: str) -> str:
    return match if isinstance(filesystem, LocalFileSystem) else str(filesystem.unstrip_protocol(match))


def _format(path: str, source: SourceConfig) -> Format:
    if source.format != "auto":
        return source.format
    suffixes = [suffix.lower() for suffix in PurePosixPath(path.split("?", 1)[0]).suffixes]
    if suffixes and suffixes[-1] in _COMPRESSED:
        suffixes.pop()
    return _FORMATS.get(suffixes[-1] if suffixes else "", "text")


def _stamp(info: dict[str, Any]) -> str:
    return next((f"{name}={info[name]}" for name in _STAMPS if info.get(name) is not None), "")
