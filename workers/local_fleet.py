"""The loop of a fleet of local replicas, whatever their ranks do with units."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from workers.config import TeacherConfig
from workers.fleet import Job, LocalReplicas, fleet_policy, local_kind, rank_bundle
from workers.local.base_rank import BaseRank
from workers.loop import FleetLoop, OnEvent
from workers.replica import UnitT
from workers.resources import autoscaler_refuses, free_resources, placement_strategy


def rank_device(device: str) -> str:
    """Return what torch calls the device of a run, `cpu` or `gpu`."""
    return "cuda" if device in {"gpu", "cuda"} else "cpu"


def local_loop(
    units: Sequence[UnitT],
    num_tokens: int,
    teacher: TeacherConfig,
    job: Job,
    rank_class: type[BaseRank],
    device: str,
    notify: OnEvent,
    on_done: Callable[[UnitT, Any], dict[str, Any]],
    price_per_hour: float,
    may_grow: bool,
    labels: Mapping[str, str] | None,
) -> FleetLoop[UnitT]:
    """Return the loop over units of `num_tokens` tokens in all; arguments as of `FleetLoop` and `coordinator.capture`.

    Raises:
        InputError: no node can hold a rank.
    """
    on_device = rank_device(device)
    bundle = rank_bundle(on_device)
    strategy = placement_strategy(bundle, teacher.ranks, may_grow=may_grow)
    return FleetLoop(
        units,
        num_tokens,
        [local_kind(teacher, on_device, price_per_hour)],
        LocalReplicas(job, on_device, strategy, rank_class, labels).make,
        fleet_policy(teacher),
        notify,
        on_done,
        why_waiting=free_resources,
        hopeless=lambda kind: may_grow and autoscaler_refuses(bundle),
    )
