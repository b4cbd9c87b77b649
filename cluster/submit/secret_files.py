"""Files that look like they hold a credential, by their name or by what is in them."""

import re
from collections.abc import Mapping
from pathlib import PurePath

MAX_LOOKED_BYTES = 1 << 20
"""Larger files are judged by their name alone."""
_MIN_VALUE = 12
"""Shorter values of variables are not looked for: they would be found everywhere."""

_NAMES = re.compile(
    r"""^(
      \.env(\..+)? | .+\.env | \.netrc | \.pypirc | \.npmrc | \.pgpass | \.htpasswd | \.git-credentials | \.dockercfg
    | id_(rsa|dsa|ecdsa|ed25519)(\..+)? | .+\.(pem|key|p12|pfx|jks|keystore|kdbx|ppk)
    | credentials(\.(json|ya?ml|ini|csv|txt))? | (client_)?secrets?\.(json|ya?ml|toml|ini|txt)
    | service[-_]account.*\.json | application_default_credentials\.json | kubeconfig | auth_token | .+\.tfstate
    )$""",
    re.VERBOSE | re.IGNORECASE,
)
_HARMLESS = re.compile(r"\.(example|sample|template|dist)$|\.pub$", re.IGNORECASE)
_FOLDERS = {".aws", ".ssh", ".gnupg", ".kube", ".azure", ".gcloud", ".docker"}
_CONTENTS = (
    ("a private key", re.compile(rb"-----BEGIN [A-Z ]*PRIVATE KEY-----\s+[A-Za-z0-9+/=:, \-]{20}")),
    ("an AWS access key", re.compile(rb"\b(AKIA|ASIA)[A-Z0-9]{16}\b")),
    ("a Hugging Face token", re.compile(rb"\bhf_[A-Za-z0-9]{34,}\b")),
    ("an API key", re.compile(rb"\bsk-(proj-|ant-|or-)?[A-Za-z0-9_\-]{32,}")),
    ("a GitHub token", re.compile(rb"\b(gh[pousr]_[A-Za-z0-9]{36,}|github_pat_[A-Za-z0-9_]{60,})\b")),
    ("a Google key", re.compile(rb"\bAIza[A-Za-z0-9_\-]{35}\b")),
)


def secret_name(path: PurePath) -> str | None:
    """Return why the name of a file or folder (a relative path) is that of a secret, or None."""
    if folders := _FOLDERS.intersection(path.parts):
        return f"in {min(folders)}/"
    return "by its name" if _NAMES.match(path.name) and not _HARMLESS.search(path.name) else None


def secret_content(data: bytes, values: Mapping[str, str]) -> str | None:
    """Return what credential a file's bytes hold, or None.

    Args:
        data: the whole file, of at most `MAX_LOOKED_BYTES`.
        values: variables that are secret; a file with the value of one is as secret as the variable.
    """
    for name, value in values.items():
        if len(value) >= _MIN_VALUE and value.encode() in data:
            return f"the value of {name}"
    return next((what for what, pattern in _CONTENTS if pattern.search(data)), None)
