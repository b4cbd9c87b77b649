"""The loop of a fleet of local replicas, whatever their ranks do with units."""

from collections.abc import Callable, Sequence
from typing import Any

from workers.config import TeacherConfig
from workers.fleet import Job, LocalReplicas, fleet_policy, local_kind, rank_bundle
from workers.local.base_rank import BaseRank
from workers.loop import FleetLoop, OnEvent
from workers.replica import UnitT
from workers.resources import Machines, autoscaler_refuses, free_resources, placement_strategy


def local_loop(
    units: Sequence[UnitT],
    num_tokens: int,
    teacher: TeacherConfig,
    job: Job,
    rank_class: type[BaseRank],
    machines: Machines,
    notify: OnEvent,
    on_done: Callable[[UnitT, Any], dict[str, Any]],
) -> FleetLoop[UnitT]:
    """Return the loop over units of `num_tokens` tokens in all; arguments as of `FleetLoop` and `coordinator.capture`.

    Raises:
        InputError: no node can hold a rank.
    """
    return FleetLoop(
        units,
        num_tokens,
        [local_kind(teacher, machines)],
        local_replicas(job, teacher, machines, rank_class).make,
        fleet_policy(teacher),
        notify,
        on_done,
        why_waiting=free_resources,
        hopeless=lambda kind: never_comes(machines),
    )


def local_replicas(job: Job, teacher: TeacherConfig, machines: Machines, rank_class: type[BaseRank]) -> LocalReplicas:
    """Return what makes replicas on these machines; InputError when no node can hold a rank."""
    device = machines.torch_device
    strategy = placement_strategy(rank_bundle(device), teacher.ranks, may_grow=machines.may_grow)
    return LocalReplicas(job, device, strategy, rank_class, machines.labels)


def never_comes(machines: Machines) -> bool:
    """Tell whether the cluster has found that it can add no node for a rank."""
    return machines.may_grow and autoscaler_refuses(rank_bundle(machines.torch_device))
