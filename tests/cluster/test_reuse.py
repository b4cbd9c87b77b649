"""What is captured once is found by every run that needs it: by sample id, whatever else its config says."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import numpy as np
import pytest

from cluster.plan import Plan, make_plan
from cluster.rundir import RunDir
from storage.reader import Dataset
from tests.cluster.conftest import Ended, World


def planned(world: World, name: str, change: Any = None) -> Plan:
    """Return the plan of another run, in a directory of its own, whose config `change` edits in place."""
    values = deepcopy(world.values)
    if change is not None:
        change(values)
    other = World(world.folder, world.teacher, values)
    return make_plan(other.config, RunDir(str(world.folder / name)))


def reordered(values: dict[str, Any]) -> None:
    values["data"]["sources"].reverse()


def renamed(values: dict[str, Any]) -> None:
    for source in values["data"]["sources"]:
        source["name"] = {"general": "prose", "domain": "manuals"}[source["name"]]


def trained_otherwise(values: dict[str, Any]) -> None:
    values["train"] |= {"steps": 9, "global_batch_size": 8, "seed": 7, "workers": 2}
    values["curriculum"] = {"start": {"general": 1.0}, "end": {"domain": 1.0}}
    values["cache"]["unit_tokens"] = 100
    values["teacher"]["batch_tokens"] = 64


@pytest.mark.parametrize("change", [None, reordered, renamed, trained_otherwise])
def test_another_run_scores_nothing_again(world: World, change: Any) -> None:
    world.capture()
    plan = planned(world, "other", change)
    assert plan.samples > 20
    assert (plan.cached_samples, plan.missing_samples, plan.units) == (plan.samples, 0, 0)


def test_a_run_with_one_more_source_scores_that_source_alone(world: World) -> None:
    def without_domain(values: dict[str, Any]) -> None:
        del values["data"]["sources"][1]

    small = deepcopy(world.values)
    without_domain(small)
    World(world.folder, world.teacher, small).capture()
    plan = planned(world, "more")
    domain = [facts["samples"] for facts in plan.sources["domain"].values()]
    assert 0 < plan.missing_samples <= sum(domain)
    assert plan.cached_samples == planned(world, "less", without_domain).samples > 0


def test_windows_of_two_lengths_share_a_dataset(world: World) -> None:
    def short(values: dict[str, Any]) -> None:
        values["data"]["window_tokens"] = 32

    world.capture()
    long_ids = Dataset.open(world.config.cache.url).catalog.sample_ids
    before = planned(world, "short", short)
    values = deepcopy(world.values)
    short(values)
    other = World(world.folder, world.teacher, values)
    # Windows that come out the same in both mixes, e.g. a document's end, are found; the others are new.
    other.capture(name="short")
    dataset = Dataset.open(world.config.cache.url)
    assert before.missing_samples == len(dataset.catalog) - len(long_ids) > 0
    assert not len(dataset.missing(long_ids))
    for name, change in (("long-again", None), ("short-again", short)):
        assert planned(world, name, change).missing_samples == 0
    samples, targets = dataset.read(dataset.catalog.sample_ids)
    assert set(np.unique(samples.lengths())) & {32, 64} == {32, 64}
    np.testing.assert_array_equal(samples.num_supervised(), np.diff(targets.offsets))


def test_another_teacher_or_setting_never_reuses(world: World) -> None:
    from storage.errors import IdentityError

    world.capture()

    def more_entries(values: dict[str, Any]) -> None:
        values["cache"]["top_k"] = 5

    with pytest.raises(IdentityError, match=r"capture\.top_k is 4 there, 5 here"):
        planned(world, "other", more_entries)


def test_what_another_dataset_holds_is_not_scored_again(world: World, lectern: Callable[..., Ended]) -> None:
    """The other one holds half of the samples; this run's own needs the rest, and reads both as one."""
    world.capture(share=0.5)
    values = deepcopy(world.values)
    values["cache"] |= {"url": str(world.folder / "own"), "also": [world.values["cache"]["url"]]}
    other = World(world.folder, world.teacher, values)
    held = len(Dataset.open(world.values["cache"]["url"]).catalog)

    before = planned(other, "before")
    assert (before.cached_samples, before.missing_samples) == (held, before.samples - held)

    other.capture()
    assert len(Dataset.open(other.config.cache.url).catalog) == before.missing_samples > 0
    assert planned(other, "after").missing_samples == 0
    captured = lectern("capture", other.config_path, "--run-dir", str(other.run_dir), "--json")
    assert captured.code == 0, captured.err
    done = captured.json["capture"]
    assert (done["scored_samples"], done["reused_samples"]) == (0, before.samples)
    shown = lectern("inspect", other.config_path, "--run-dir", str(other.run_dir), "--json").json
    assert shown["samples"] == before.missing_samples
    assert [(a["samples"], a["served"]) for a in shown["also"]] == [(held, held)]
