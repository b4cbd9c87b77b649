"""Start or join Ray for the stages that need it, quietly, and leave nothing behind."""

import contextlib
import logging
import os
import secrets
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cluster import reaper
from cluster.config import ClusterConfig
from storage.errors import InputError, StorageError

OBJECT_STORE_BYTES = 256 << 20
"""Shared memory of a local Ray: only receipts and configs pass through it, never targets."""

_MARK = "LECTERN_SESSION"
_REAPER_GRACE_S = 3.0

_LOCAL_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # Ray Train's controller looks at its workers this often; the default of 2 s delays every start and end.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    # Nobody takes this machine away with a warning; the watcher is a process whose imports delay the ranks' own.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DEDUP_LOGS": "1",
}


@dataclass(frozen=True)
class RaySession:
    """A Ray that is ready for work."""

    device: Literal["cpu", "gpu"]
    """What ranks run on."""
    logs: str
    """Where the workers' logs lie, for messages."""
    local: bool
    """Whether this process started it."""


@contextlib.contextmanager
def ray_session(cluster: ClusterConfig, num_ranks: int) -> Iterator[RaySession]:
    """Give a Ray with room for `num_ranks` ranks; a local one is shut down at the end.

    A Ray of its own is always started anew and never joins one that was left over on the machine.
    Raises InputError when a named cluster cannot be reached or lacks the device asked for.
    """
    local = cluster.joins is None
    mark = {_MARK: secrets.token_hex(16)}
    defaults = _LOCAL_ENVIRONMENT if local else {"RAY_USAGE_STATS_ENABLED": "0"}
    if local:
        _settle_authentication()
    with _environment(defaults, mark), _reaper(mark) if local else contextlib.nullcontext():
        import ray

        try:
            _start(ray, cluster, num_ranks)
            yield RaySession(_device(ray, cluster), _log_folder(ray), local)
        finally:
            ray.shutdown()


@contextlib.contextmanager
def _reaper(mark: dict[str, str]) -> Iterator[None]:
    """Keep a process that ends the session's processes when this one is killed; needs /proc, does nothing without."""
    if not Path("/proc/self/environ").exists():
        yield
        return
    ((name, value),) = mark.items()
    session = [f"{name}={value}", str(os.getpid()), str(_REAPER_GRACE_S)]
    command = [sys.executable, "-I", "-S", reaper.__file__, *session]
    environment = {key: text for key, text in os.environ.items() if key != name}
    process = subprocess.Popen(command, stdin=subprocess.PIPE, env=environment, start_new_session=True)
    try:
        yield
    finally:
        process.communicate()


def _start(ray: Any, cluster: ClusterConfig, num_ranks: int) -> None:
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": False}
    if (address := cluster.joins) is not None:
        _check_reachable(address)
        try:
            ray.init(address=address, **options)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise InputError(
                f"cluster.address {address}: no Ray cluster can be joined there ({error}); start one with "
                "`ray up ray_cluster.yaml`, or set cluster.address to local"
            ) from error
        return
    # Ranks are counted, not pinned: a machine with fewer cores than ranks runs them all, only slower.
    num_cpus = max(cluster.num_cpus or os.cpu_count() or 1, num_ranks)
    try:
        ray.init(
            address="local",
            num_cpus=num_cpus,
            include_dashboard=False,
            object_store_memory=OBJECT_STORE_BYTES,
            **options,
        )
    except (OSError, RuntimeError, ValueError, TimeoutError) as error:
        raise StorageError(
            f"Ray did not start on this machine: {error}; see {Path(tempfile.gettempdir()) / 'ray'} for its logs"
        ) from error


def _check_reachable(address: str) -> None:
    """Fail at once where nothing listens: Ray itself would keep trying for minutes."""
    host, colon, port = address.rpartition(":")
    if not colon or "://" in address or not port.isdigit():
        return
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except OSError as error:
        raise InputError(
            f"cluster.address {address}: nothing can be reached there ({error}); start a cluster with "
            "`ray up ray_cluster.yaml`, or set cluster.address to local"
        ) from error


def _device(ray: Any, cluster: ClusterConfig) -> Literal["cpu", "gpu"]:
    """What ranks run on; node types that an autoscaler may add count, so that a cluster at zero is no CPU cluster."""
    from workers.resources import cluster_shapes

    num_gpus = sum(shape.count * shape.resources.get("GPU", 0.0) for shape in cluster_shapes())
    if cluster.device == "gpu" and num_gpus < 1 and cluster.joins is None:
        raise InputError(
            "cluster.device is gpu, but Ray sees no GPU on this machine; set it to cpu or auto, or join a cluster "
            "with cluster.address"
        )
    if cluster.device == "auto":
        return "gpu" if num_gpus >= 1 else "cpu"
    return cluster.device


def _log_folder(ray: Any) -> str:
    node = ray._private.worker._global_node
    return str(node.get_logs_dir_path()) if node is not None else "the cluster's /tmp/ray/session_latest/logs"


def _settle_authentication() -> None:
    """Give local sessions a token of this process alone, unless the user chose otherwise.

    It needs no home folder and shows in no file. Ray reads mode and token once per process, so they stay set.
    """
    if not any(name in os.environ for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")):
        os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))


@contextlib.contextmanager
def _environment(defaults: dict[str, str], forced: dict[str, str]) -> Iterator[None]:
    """Set variables for Ray's processes to inherit, the user's own values first, and restore all afterwards."""
    before = dict(os.environ)
    os.environ.update({**defaults, **before, **forced})
    try:
        yield
    finally:
        for name in {**defaults, **forced}:
            os.environ.pop(name, None)
            if name in before:
                os.environ[name] = before[name]
