"""The run directory: resolved config, events, what each stage produced, and a lock against a second run at once."""

import contextlib
import fcntl
import json
import os
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from hashlib import blake2b
from pathlib import Path
from typing import Any

import yaml

from cluster.config import RunConfig
from storage.errors import InputError, IntegrityError
from storage.object_store import Store
from storage.store_errors import redact

RESOLVED_KEY = "config.resolved.yaml"
EVENTS_KEY = "events.jsonl"
METRICS_KEY = "metrics.jsonl"

_UPLOAD_EVERY_S = 15.0


class RunDir:
    """A run directory at any fsspec URL. Its layout is part of the program's contract; see the README.

    `stages/<name>.json` says that a stage is done: the hash of its inputs, and its result for the report.
    """

    def __init__(self, url: str | Path) -> None:
        self.store = Store(url)
        self.url = self.store.url
        self.is_local = self.store.is_local
        self._events: list[str] = []
        self._lock = threading.Lock()
        self._uploaded_at = 0.0

    def path(self, key: str) -> str:
        """Return the URL of a key below this directory."""
        return f"{self.url}/{key}"

    def probe(self) -> None:
        """Check that objects can be written here; raises InputError with the reason when they cannot."""
        self.store.probe()

    def write_config(self, config: RunConfig) -> None:
        """Keep the whole config with its defaults, without user names, passwords and queries in URLs."""
        values = _without_secrets(config.model_dump(mode="json"))
        # Absolute, so that commands on the run directory work from any folder.
        values["cache"]["url"] = redact(Store(config.cache.url).url)
        header = "# The config of this run with all defaults filled in; secrets are left out.\n"
        text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=100)
        self.store.write(RESOLVED_KEY, (header + text).encode())

    def event(self, name: str, /, **facts: Any) -> None:
        """Append one line to events.jsonl: `{"time": …, "event": name, …facts}`."""
        moment = datetime.now(UTC).isoformat(timespec="milliseconds")
        line = json.dumps({"time": moment, "event": name, **facts}, default=str)
        with self._lock:
            self._append(line)

    def _append(self, line: str) -> None:
        if self.is_local:
            path = Path(self.path(EVENTS_KEY))
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
            return
        if not self._events:
            before = self.store.read_if_exists(EVENTS_KEY) or b""
            self._events = before.decode().splitlines()
        self._events.append(line)
        if time.monotonic() - self._uploaded_at > _UPLOAD_EVERY_S:
            self._upload()

    def flush(self) -> None:
        """Upload events that an object store has not yet; a local file is always up to date."""
        with self._lock:
            self._upload()

    def _upload(self) -> None:
        if self._events:
            self.store.write(EVENTS_KEY, ("\n".join(self._events) + "\n").encode())
            self._uploaded_at = time.monotonic()

    def lines(self, key: str) -> list[dict[str, Any]]:
        """Return the objects of a JSON-lines file, in order; a half-written last line is passed over."""
        raw = self.store.read_if_exists(key)
        rows = []
        for line in (raw or b"").decode(errors="replace").splitlines():
            with contextlib.suppress(ValueError):
                row = json.loads(line)
                if isinstance(row, dict):
                    rows.append(row)
        return rows

    def finish(self, stage: str, key: str, result: dict[str, Any]) -> None:
        """Record that a stage is done for inputs with this hash."""
        record = {"key": key, "finished": datetime.now(UTC).isoformat(timespec="seconds"), "result": result}
        self.store.write(f"stages/{stage}.json", json.dumps(record, indent=1).encode() + b"\n")

    def result(self, stage: str, key: str | None = None) -> dict[str, Any] | None:
        """Return what a stage produced, or None when it is not done (for inputs with this hash, where one is given)."""
        raw = self.store.read_if_exists(f"stages/{stage}.json")
        if raw is None:
            return None
        try:
            record = json.loads(raw)
            return dict(record["result"]) if key in (None, record["key"]) else None
        except (ValueError, KeyError, TypeError) as error:
            raise IntegrityError(
                f"{self.store.shown(f'stages/{stage}.json')} is damaged ({error}); delete it and run again"
            ) from error

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the directory for this process; the system lets go of it when the process ends in whatever way.

        Object stores have no such lock; there the commit protocol alone keeps two runs from harming the dataset.
        Raises InputError when another process holds it.
        """
        if not self.is_local:
            yield
            return
        self.probe()
        path = Path(self.path(".lock"))
        with path.open("a+", encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                file.seek(0)
                raise InputError(
                    f"another process ({file.read().strip() or 'unknown'}) is working in {self.url}; wait for it, or "
                    "give this run a --run-dir of its own"
                ) from error
            file.truncate(0)
            file.write(f"pid {os.getpid()}\n")
            file.flush()
            yield


def stage_key(*inputs: Any) -> str:
    """Return a hash over JSON-like inputs, equal for equal inputs on any machine."""
    canonical = json.dumps(inputs, sort_keys=True, separators=(",", ":"), default=str)
    return blake2b(canonical.encode(), digest_size=16, person=b"lectern.stage").hexdigest()


def _without_secrets(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_secrets(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_secrets(item) for item in value]
    looks_like_url = isinstance(value, str) and "://" in value and not any(c.isspace() for c in value)
    return redact(value) if looks_like_url else value
