"""The loop with replicas that are threads: real units, real commits, no Ray."""

import threading
import time
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any

import numpy as np
import pytest

from benchmarks.light_rank import light_identity, light_targets
from storage.config import CacheConfig
from storage.errors import InputError, IntegrityError, StorageError
from storage.identity import DatasetIdentity
from storage.reader import Dataset
from storage.verify import verify_dataset
from storage.writer import DatasetWriter, Receipt
from tests.workers.conftest import TinyRun
from workers.loop import FleetLoop
from workers.policy import FailureKind, FleetPolicy, ReplicaKind
from workers.replica import Done, Failed, Lost, Placed, Post, Ready, Seen
from workers.units import UnitPlan, WorkUnit, plan_units


@dataclass
class World:
    """What the threads share, and how they misbehave."""

    run: TinyRun
    url: str
    identity: DatasetIdentity
    poisoned: set[str] = field(default_factory=set)
    hangs: set[str] = field(default_factory=set)
    lost_at: set[int] = field(default_factory=set)
    started: int = 0
    killed: int = 0
    committed: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)


class ThreadReplica:
    """A replica in a thread of this process."""

    def __init__(self, world: World, number: int, post: Post) -> None:
        self.world, self.number, self.post = world, number, post
        self.units: SimpleQueue[tuple[WorkUnit, int] | None] = SimpleQueue()
        self.progress, self.hanging = 0, False

    def start(self) -> None:
        self.world.started += 1
        self.post(Placed(self.number))
        self.post(Ready(self.number))
        threading.Thread(target=self._work, daemon=True).start()

    def give(self, unit: WorkUnit, attempt: int) -> None:
        self.units.put((unit, attempt))

    def beat(self) -> None:
        if not self.hanging:
            self.post(Seen(self.number, self.progress))

    def kill(self) -> None:
        self.world.killed += 1
        self.units.put(None)

    def _work(self) -> None:
        writer = DatasetWriter.open(self.world.url, self.world.identity)
        while (given := self.units.get()) is not None:
            unit, attempt = given
            if unit.unit_id in self.world.poisoned:
                self.post(Failed(self.number, unit.unit_id, FailureKind.UNIT, IntegrityError("NaN in the logits")))
                continue
            if unit.unit_id in self.world.hangs:
                self.world.hangs.discard(unit.unit_id)
                self.hanging = True
                return
            with self.world.lock:
                self.world.committed += 1
                lost = self.world.committed in self.world.lost_at
            if lost:
                self.post(Lost(self.number, FailureKind.LOST, RuntimeError("node gone")))
                return
            self.post(Done(self.number, unit.unit_id, self._commit(writer, unit, attempt)))
            self.progress += 1

    def _commit(self, writer: DatasetWriter, unit: WorkUnit, attempt: int) -> Receipt:
        samples = self.world.run.samples.open(self.world.run.samples.url).read(unit.rows)
        targets = light_targets(samples, self.world.identity.tokenizer.vocab_size)
        return writer.commit(unit.unit_id, samples, targets, f"a{attempt}r{self.number}")


def world(run: TinyRun, name: str, **behaviour: Any) -> World:
    identity = light_identity(run.tokenizer.vocab_size)
    cache = CacheConfig(url=str(run.folder / "caches" / name), kind="topk", top_k=4)
    DatasetWriter.create(cache.url, identity)
    return World(run, cache.url, identity, **behaviour)


def plan(work: World) -> UnitPlan:
    """Plan what the dataset lacks now."""
    samples, rows = work.run.samples, work.run.samples.rows()
    missing = rows[Dataset.open(work.url).missing(samples.ids(rows))]
    return plan_units(missing, samples.num_tokens, samples.sample_ids, work.identity.fingerprint, 600, rows)


def loop(work: World, units: UnitPlan, start: int = 0, **policy: Any) -> tuple[FleetLoop[WorkUnit], list[Any]]:
    events: list[Any] = []
    fleet = FleetLoop(
        units.rotated(start),
        units.tokens,
        [ReplicaKind("thread", max=3)],
        lambda number, kind, post: ThreadReplica(work, number, post),
        FleetPolicy(**policy),
        events.append,
        lambda unit, receipt: {"committed": receipt.committed},
    )
    return fleet, events


def assert_complete(work: World) -> None:
    """Every row once, with its own targets."""
    samples = work.run.samples
    dataset = Dataset.open(work.url)
    assert len(dataset.catalog) == samples.num_samples and dataset.catalog.num_duplicates == 0
    assert sum(record.rows for record in dataset.manifests) == samples.num_samples
    read, targets = dataset.read(samples.ids(samples.rows()))
    np.testing.assert_array_equal(targets.id, light_targets(read, work.identity.tokenizer.vocab_size).id)
    assert verify_dataset(work.url).ok


def test_replicas_that_die_cost_no_row_and_none_is_left(tiny_run: TinyRun) -> None:
    work = world(tiny_run, "loop-deaths", lost_at={2, 3, 7})
    fleet, events = loop(work, plan(work))
    fleet.run()
    assert_complete(work)
    assert fleet.replicas_lost == 3 and not fleet.failed_units
    assert work.started == work.killed >= 4
    assert sum(event["event"] == "unit_retried" for event in events) == 3
    assert events[-1]["event"] == "fleet" and events[-1]["ended"] and events[-1]["units_queued"] == 0


def test_two_coordinators_at_once_commit_each_unit_once(tiny_run: TinyRun) -> None:
    work = world(tiny_run, "loop-two")
    units = plan(work)
    (one, events), (two, others) = loop(work, units), loop(work, units, start=len(units) // 2)
    threads = [threading.Thread(target=fleet.run) for fleet in (one, two)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert_complete(work)
    done = [event for event in events + others if event["event"] == "unit_done"]
    assert len(done) == 2 * len(units)
    assert sum(event["committed"] for event in done) <= len(units)


def test_a_poisoned_unit_is_listed_and_tried_again_by_the_next_capture(tiny_run: TinyRun) -> None:
    work = world(tiny_run, "loop-poison")
    units = plan(work)
    work.poisoned.add(units[3].unit_id)
    fleet, events = loop(work, units)
    fleet.run()
    (failed,) = fleet.failed_units
    assert failed == {
        "unit": units[3].unit_id,
        "samples": len(units[3].rows),
        "attempts": 1,
        "error": "NaN in the logits",
    }
    assert {"event": "unit_failed", **failed} in events
    again = plan(work)
    assert [unit.unit_id for unit in again] == [units[3].unit_id], "all others are committed"
    work.poisoned.clear()
    loop(work, again)[0].run()
    assert_complete(work)


def test_a_hung_replica_is_replaced(tiny_run: TinyRun) -> None:
    work = world(tiny_run, "loop-hang")
    units = plan(work)
    work.hangs.add(units[1].unit_id)
    fleet, events = loop(work, units, heartbeat_timeout_s=0.6, straggler_factor=1e9)
    began = time.monotonic()
    fleet.run()
    assert_complete(work)
    assert time.monotonic() - began < 30
    lost = [event["error"] for event in events if event["event"] == "replica_lost"]
    assert len(lost) <= 1 and all("hangs" in error for error in lost)
    assert lost or [event for event in events if event["event"] == "unit_duplicated"]


def test_waiting_in_vain_ends_with_a_clear_error(tiny_run: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workers.loop.HOPE_S", 0.5)
    monkeypatch.setattr("workers.loop.STATUS_S", 0.1)
    monkeypatch.setattr("workers.loop.WAITING_NOTICE_S", 0.2)
    work = world(tiny_run, "loop-hopeless")

    class Pending(ThreadReplica):
        def start(self) -> None:
            self.world.started += 1

    fleet, events = loop(work, plan(work))
    fleet._make = lambda number, kind, post: Pending(work, number, post)
    fleet._hopeless = lambda kind: kind.name == "thread"
    with pytest.raises(InputError, match="a replica needs nothing, and no node type of the cluster can give that"):
        fleet.run()
    assert work.started == work.killed == 3
    assert sum(event["event"] == "waiting_for_resources" for event in events) == 3, "each is told once"


@pytest.mark.parametrize("error", [InputError("no layer 'x'"), StorageError("disk full")])
def test_what_cannot_help_ends_the_work_with_its_error(tiny_run: TinyRun, error: Exception) -> None:
    work = world(tiny_run, f"loop-{type(error).__name__}")
    kind = FailureKind.FATAL if isinstance(error, InputError) else FailureKind.STORE

    class Failing(ThreadReplica):
        def start(self) -> None:
            self.world.started += 1
            self.post(Lost(self.number, kind, error))

    fleet, _ = loop(work, plan(work), start_backoff_s=0.01)
    fleet._make = lambda number, kind, post: Failing(work, number, post)
    with pytest.raises(type(error), match=str(error)):
        fleet.run()
    assert work.started == work.killed
