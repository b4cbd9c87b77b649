"""Where a run may read text from: an allow-list, and addresses that no data ever comes from."""

import ipaddress
import posixpath
from collections.abc import Iterator
from urllib.parse import urlsplit

from cluster.config import RunConfig
from storage.embedded_text import EMBEDDED_PREFIX
from storage.errors import InputError
from storage.store_errors import redact

_METADATA_HOSTS = {"metadata.google.internal", "metadata", "instance-data", "100.100.100.200", "fd00:ec2::254"}
"""Cloud metadata services beside those of link-local addresses: they hand out the machine's credentials."""


def check_urls(config: RunConfig) -> None:
    """Raise InputError for a source or prompt file that the config may not read.

    Names are compared, nothing is resolved: a host name that leads to a forbidden address is not found out here.
    """
    for key, path in _paths(config):
        if path.startswith(EMBEDDED_PREFIX):
            continue
        # fsspec chains URLs: `simplecache::https://host/file`; so does an IPv6 address look.
        for part in (path, *path.split("::")):
            if _is_metadata(part):
                raise InputError(
                    f"{key} {redact(path)} is the address of a cloud's metadata service, which holds no text"
                )
        allowed = config.cluster.allowed_urls
        if allowed and not any(_is_below(path, prefix) for prefix in allowed):
            raise InputError(f"{key} {redact(path)} is not below any of cluster.allowed_urls ({', '.join(allowed)})")


def _paths(config: RunConfig) -> Iterator[tuple[str, str]]:
    for source in config.data.sources:
        for path in [source.path] if isinstance(source.path, str) else source.path:
            yield f"data.sources.{source.name}.path", path
    prompts = config.generate.prompts or []
    for path in [prompts] if isinstance(prompts, str) else prompts:
        yield "generate.prompts", path


def _is_metadata(url: str) -> bool:
    try:
        host = (urlsplit(url).hostname or "").rstrip(".").lower() if "://" in url else ""
        return host in _METADATA_HOSTS or ipaddress.ip_address(host).is_link_local
    except ValueError:
        return False


def _is_below(path: str, prefix: str) -> bool:
    scheme, separator, rest = path.rpartition("://")
    plain = f"{scheme}{separator}{posixpath.normpath(rest)}"
    root = prefix.rstrip("/")
    return plain == root or plain.startswith(f"{root}/")
