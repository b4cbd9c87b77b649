"""The key: read from the environment where it is used, never passed on, never written."""

import os

from storage.errors import InputError
from workers.api.config import ApiConfig

NO_KEY = "none"
"""What a server that wants no key is sent; the client library insists on one."""


def read_key(api: ApiConfig) -> str:
    """Return the key; InputError, naming the variable, when there is none."""
    if api.key_env is None:
        return NO_KEY
    key = os.environ.get(api.key_env, "").strip()
    if not key:
        raise InputError(
            f"the environment variable {api.key_env} is not set: it must hold the key of {api.base_url}; name another "
            "one in teacher.api.key_env, or set that to null for a server that wants no key"
        )
    return key
