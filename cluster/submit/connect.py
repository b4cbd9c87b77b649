"""The way to a cluster's job server: address, token and versions are checked before anything is sent."""

import http.client
import json
import os
import platform
import socket
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from storage.errors import InputError
from storage.store_errors import redact

_TIMEOUT_S = 20.0
_DEFAULT_PORT = 8265
_START = (
    "start one with `ray up ray_cluster.yaml` and forward its dashboard with `ray dashboard ray_cluster.yaml`, or with "
    "`kubectl port-forward service/lectern-head-svc 8265`"
)
_TOKEN_PLACES = "RAY_AUTH_TOKEN, a file named in RAY_AUTH_TOKEN_PATH, or ~/.ray/auth_token"


@dataclass(frozen=True)
class JobServer:
    """A job server that has answered, and let this client in."""

    address: str
    client: Any
    """A `ray.job_submission.JobSubmissionClient`."""
    ray_version: str
    python_version: str | None
    """None where the cluster does not tell."""
    notes: tuple[str, ...] = ()
    """What the user should know about the way there."""


def connect(address: str, any_version: bool = False) -> JobServer:
    """Return the job server at an address such as `http://127.0.0.1:8265`.

    The token comes from the environment or Ray's own file, as for Ray's commands. `any_version` lets another version of
    Ray or Python pass.

    Raises InputError when nothing answers there, it is no Ray, the token is missing or wrong, the cluster wants none,
    or versions differ.
    """
    address = normal_address(address)
    _check_reachable(address)
    has_token = _settle_mode()
    notes = _check_lock(address, has_token)
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    given = {name: os.environ.pop(name, None) for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")}
    try:
        # Ray would let these two variables win over the address that was asked for.
        client = JobSubmissionClient(address)
        client.list_jobs()
    except AuthenticationError as error:
        raise InputError(
            f"the cluster at {redact(address)} refuses the token; set the one that it was started with: "
            f"{_TOKEN_PLACES}. `ray get-auth-token` on its head node prints it"
        ) from error
    except (ConnectionError, RuntimeError) as error:
        raise InputError(f"no jobs can be submitted to {redact(address)}: {_first_line(error)}; {_START}") from error
    finally:
        os.environ.update({name: value for name, value in given.items() if value is not None})
    versions = _versions(client)
    if not any_version:
        check_versions(*versions)
    return JobServer(address, client, *versions, tuple(notes))


def normal_address(address: str) -> str:
    """Return an address with scheme and port; InputError for what is no job server's."""
    text = address if "://" in address else f"http://{address}"
    parts = urlsplit(text)
    try:
        port = parts.port
    except ValueError:
        port = -1
    if parts.scheme not in {"http", "https"} or not parts.hostname or port == -1 or parts.username is not None:
        raise InputError(
            f"--address {redact(address)} is no job server's; write http://host:{_DEFAULT_PORT}, the address of the "
            "cluster's dashboard"
        )
    if port is None and parts.scheme == "http":
        return f"http://{parts.hostname}:{_DEFAULT_PORT}{parts.path.rstrip('/')}"
    return text.rstrip("/")


def check_versions(cluster_ray: str, cluster_python: str | None) -> None:
    """Raise InputError when the cluster's Ray or Python is not this machine's; Python counts to its minor version."""
    import ray

    differing = []
    if cluster_ray != ray.__version__:
        differing.append(f"Ray {cluster_ray}, this machine Ray {ray.__version__}")
    own = platform.python_version()
    if cluster_python is not None and cluster_python.split(".")[:2] != own.split(".")[:2]:
        differing.append(f"Python {cluster_python}, this machine Python {own}")
    if differing:
        raise InputError(
            f"versions differ: the cluster has {'; it has '.join(differing)}. Objects that pass between them may not "
            "be readable: install constraints.txt on both sides, or submit with --any-version if you know better"
        )


def _check_reachable(address: str) -> None:
    parts = urlsplit(address)
    place = (str(parts.hostname), parts.port or (443 if parts.scheme == "https" else 80))
    try:
        socket.create_connection(place, timeout=_TIMEOUT_S).close()
    except OSError as error:
        raise InputError(f"--address {redact(address)}: no cluster answers there ({error}); {_START}") from error


def _settle_mode() -> bool:
    """Turn token authentication on where there is a token and the user chose nothing; returns whether there is one.

    Ray reads the mode once per process, when it is imported.
    """
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    has_token = bool(os.environ.get("RAY_AUTH_TOKEN")) or path.is_file()
    if has_token:
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    return has_token


def _check_lock(address: str, has_token: bool) -> list[str]:
    """See whether the server lets in who shows no token; returns notes."""
    open_to_all = _answer(address) == 200
    if open_to_all and os.environ.get("RAY_AUTH_MODE") != "disabled":
        raise InputError(
            f"the cluster at {redact(address)} takes jobs from anyone who reaches it: it wants no token. Start it with "
            "RAY_AUTH_MODE=token, or set RAY_AUTH_MODE=disabled here to submit nevertheless"
        )
    if open_to_all:
        return ["the cluster wants no token: whoever reaches its dashboard can run code on it"]
    if not has_token or os.environ.get("RAY_AUTH_MODE") != "token":
        raise InputError(
            f"the cluster at {redact(address)} wants a token and none was found; set RAY_AUTH_MODE=token and put the "
            f"token into {_TOKEN_PLACES}. `ray get-auth-token` on its head node prints it"
        )
    parts = urlsplit(address)
    if parts.scheme == "http" and parts.hostname not in {"127.0.0.1", "localhost", "::1"}:
        return ["the token goes to the cluster unencrypted: use https or a tunnel beyond your own network"]
    return []


def _answer(address: str) -> int:
    """Status of a request without a token; InputError when no job server answers it."""
    try:
        with urllib.request.urlopen(f"{address}/api/jobs/", timeout=_TIMEOUT_S) as reply:
            json.load(reply)
            return int(reply.status)
    except urllib.error.HTTPError as error:
        if error.code in {401, 403}:
            return error.code
        what = f"HTTP {error.code}"
    except (OSError, ValueError, http.client.HTTPException) as error:
        what = _first_line(error)
    raise InputError(f"--address {redact(address)}: what answers there is no Ray dashboard ({what}); {_START}")


def _versions(client: Any) -> tuple[str, str | None]:
    """Ray's and Python's version on the cluster."""
    ray_version = str(client._server_ray_version)
    # No method of the client's asks for this; without an answer Python's version is not compared.
    reply = client._do_request("GET", "/api/v0/cluster_metadata")
    if reply.status_code != 200:
        return ray_version, None
    body = reply.json()
    facts = (body.get("data") or body) if isinstance(body, dict) else {}
    python_version = facts.get("pythonVersion") or facts.get("python_version")
    return ray_version, None if python_version is None else str(python_version)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
