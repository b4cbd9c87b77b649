"""What a capture plans: what is missing and not refused; and when it is refused too much."""

from collections import Counter
from typing import Any

import pytest

from storage.config import CacheConfig
from storage.errors import WorkerError
from storage.identity import CaptureIdentity, DatasetIdentity, TeacherIdentity, TokenizerIdentity
from storage.refusals import Refusals
from tests.workers.conftest import TinyRun
from workers.api.config import ApiConfig
from workers.config import TeacherConfig
from workers.work import FLUSH_SAMPLES, RefusedLog, Work, plan_work, setting_of

IDENTITY = DatasetIdentity(
    teacher=TeacherIdentity(name="t", architecture="t", weights="0" * 64, parameters=0),
    tokenizer=TokenizerIdentity(digest="0" * 64, vocab_size=600),
    precision="float32",
    capture=CaptureIdentity(kind="topk", top_k=4),
)
TEACHER = TeacherConfig(name="t")


def plan(run: TinyRun, cache: CacheConfig, events: list[Any] | None = None, teacher: TeacherConfig = TEACHER) -> Work:
    notify = events.append if events is not None else (lambda event: None)
    return plan_work(teacher, cache, run.samples, run.samples.rows(), IDENTITY, notify)


def planned(work: Work) -> set[int]:
    return {row for unit in work.units for row in unit.rows}


def test_what_was_refused_is_not_planned_again_unless_asked_otherwise(tiny_run: TinyRun) -> None:
    cache = tiny_run.cache("refused", unit_tokens=300)
    ids = tiny_run.samples.ids([3, 5])
    with plan(tiny_run, cache) as work:
        work.refused.add({ids[0]: "too long", ids[1]: "not finite"})
        assert not len(Refusals.read(work.writer.store, IDENTITY.fingerprint).sample_ids()), "written one by one"
    events: list[Any] = []
    with plan(tiny_run, cache, events) as work:
        assert planned(work) == set(range(tiny_run.samples.num_samples)) - {3, 5}
        assert work.reused == 0 and work.refused.reasons == {"too long": 1, "not finite": 1}
    assert events[-1]["refused_samples"] == 2
    with plan(tiny_run, cache.model_copy(update={"retry_refused": True})) as work:
        assert len(planned(work)) == tiny_run.samples.num_samples and not work.refused.reasons
    with plan(tiny_run, cache, teacher=TEACHER.model_copy(update={"sharding": "zero3", "ranks": 2})) as work:
        assert len(planned(work)) == tiny_run.samples.num_samples


def test_too_many_refusals_end_the_capture_and_are_kept(tiny_run: TinyRun) -> None:
    cache = tiny_run.cache("too-many", most_refused=0.05)
    samples = tiny_run.samples
    most = int(samples.num_samples * 0.05)
    ids = samples.ids(range(most + 1))
    with pytest.raises(WorkerError) as caught, plan(tiny_run, cache) as work:
        work.refused.add(dict.fromkeys(ids[:most], "no"))
        work.refused.add({ids[most]: "no"})
    for part in (f"refuses {most + 1} of {samples.num_samples}", "0.05", ids[most].hex(), "cache.most_refused"):
        assert part in str(caught.value)
    assert len(Refusals.read(work.writer.store, IDENTITY.fingerprint).sample_ids()) == most + 1


def test_many_refusals_share_a_file(tiny_run: TinyRun) -> None:
    cache = tiny_run.cache("grouped")
    with plan(tiny_run, cache) as work:
        log = RefusedLog(work.writer.store, IDENTITY.fingerprint, "local", cache, num_asked=10**6, before=Counter())
        for n in range(FLUSH_SAMPLES + 2):
            log.add({n.to_bytes(16, "big"): "no"})
        log.flush()
    assert len(work.writer.store.list("refused/")) == 2


def test_the_setting_tells_endpoints_apart_and_no_secret() -> None:
    def of(url: str, **extra: str) -> str:
        api = ApiConfig(base_url=url, model="m", extra_body=extra)
        return setting_of(TeacherConfig(kind="api", name="t", api=api))

    assert of("https://a.example/v1") != of("https://b.example/v1")
    assert of("https://a.example/v1", route="secret") != of("https://a.example/v1")
    assert "secret" not in of("https://a.example/v1", route="secret")
