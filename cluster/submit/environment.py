"""Which environment variables a job takes along: chosen by name, their values shown nowhere."""

import re
from collections.abc import Iterable, Mapping, Sequence

from cluster.config import RunConfig
from storage.errors import InputError

SECRET_NAME = re.compile(r"TOKEN|SECRET|PASSWORD|PASSWD|API_?KEY|ACCESS_?KEY|CREDENTIAL", re.IGNORECASE)
"""Names of variables whose values are looked for in the files that would ship."""

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_OURS = {"PYTHONUNBUFFERED": "1"}
_NODES_OWN = {"PATH", "PYTHONPATH", "HOME", "LD_LIBRARY_PATH", "RAY_ADDRESS", "CUDA_VISIBLE_DEVICES"}


def job_environment(config: RunConfig, given: Sequence[str], environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that a job gets, by name.

    They are those of `cluster.env` and of `given`, each `NAME` (its value is taken from `environment`) or `NAME=VALUE`,
    and the key of a teacher behind an API where it is set here.

    Raises InputError for a name that is not set, is no name, or belongs to the nodes themselves.
    """
    taken = dict(_OURS)
    for entry in [*config.cluster.env, *given]:
        name, equals, value = entry.partition("=")
        if not _NAME.fullmatch(name):
            raise InputError(f"--env {name!r}: write NAME, or NAME=VALUE; a name is made of letters, digits and _")
        if name in _NODES_OWN or name.startswith("RAY_AUTH_"):
            raise InputError(f"--env {name}: a node has its own, which the job must not replace; leave it out")
        if not equals and name not in environment:
            raise InputError(f"--env {name}: the variable is not set here; set it, or write {name}=VALUE")
        taken[name] = value if equals else environment[name]
    key = api_key_name(config)
    if key is not None and key in environment:
        taken.setdefault(key, environment[key])
    return taken


def api_key_name(config: RunConfig) -> str | None:
    """Return the variable with the key of a teacher behind an API, where the config has one."""
    return config.teacher.api.key_env if config.teacher.kind != "local" else None


def secret_values(taken: Mapping[str, str], environment: Mapping[str, str], names: Iterable[str]) -> dict[str, str]:
    """Return the variables whose values must be in no file that ships: by their name, or named in `names`."""
    known = {**environment, **taken}
    wanted = set(names)
    return {name: value for name, value in known.items() if value and (name in wanted or SECRET_NAME.search(name))}
