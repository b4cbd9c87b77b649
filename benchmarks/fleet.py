"""What the coordinator costs: real planning and decisions, a simulated clock, simulated replicas that die at random.

    python benchmarks/fleet.py                                  # 1,000 replicas, 1,000,000 units
    python benchmarks/fleet.py --replicas 100 --units 100000

Prints one JSON line. `us_per_unit` is the processor time of planning, dispatching and accounting over the units; the
time that the simulation itself takes (its event queue, its chance) is measured apart and left out. The goals: at most
200 µs per unit, and memory that does not grow with the units done: it is taken after each tenth of the units.
"""

import argparse
import heapq
import json
import random
import time
import tracemalloc
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from workers.commands import Beat, Give, Kill, Retry, SetAside, Start
from workers.dispatch import Dispatcher
from workers.policy import FailureKind, FleetPolicy, ReplicaKind
from workers.replica import Done, Lost, News, Placed, Ready, Seen
from workers.units import WorkUnit, plan_units

SAMPLE_TOKENS = 2048
SAMPLES_PER_UNIT = 4
TOKENS_PER_S = 400.0
"""Of a usual replica; each has its own speed around it, and one in fifty is ten times slower."""
PLACE_S, LOAD_S = 5.0, 60.0
GOAL_US = 200.0


@dataclass
class Simulated:
    """A replica that works its units off one after the other."""

    speed: float
    dies_at: float
    free_at: float = 0.0
    progress: int = 0


class Simulation:
    """The world around a dispatcher: replicas, their deaths, and time."""

    def __init__(self, dispatcher: Dispatcher[WorkUnit], life_s: float, seed: int) -> None:
        self.dispatcher, self.life_s, self.chance = dispatcher, life_s, random.Random(seed)
        self.now = 0.0
        self.world: dict[int, Simulated] = {}
        self.events: list[tuple[float, int, News]] = []
        self.num_events = self.num_deaths = self.num_duplicates = 0
        self.done: list[int] = []
        self.decision_s = 0.0

    def post(self, at: float, news: News) -> None:
        """Let something happen at a time."""
        self.num_events += 1
        heapq.heappush(self.events, (at, self.num_events, news))

    def obey(self, command: Any) -> None:
        """Do what the dispatcher says."""
        match command:
            case Start():
                speed = TOKENS_PER_S * self.chance.uniform(0.8, 1.2) * (0.1 if self.chance.random() < 0.02 else 1.0)
                life = self.chance.expovariate(1 / self.life_s)
                self.world[command.replica] = Simulated(speed, self.now + life)
                self.post(self.now + PLACE_S, Placed(command.replica))
                self.post(self.now + PLACE_S + LOAD_S, Ready(command.replica))
                self.post(self.now + life, Lost(command.replica, FailureKind.LOST, RuntimeError("node gone")))
            case Give():
                replica = self.world[command.replica]
                replica.free_at = max(self.now, replica.free_at) + command.unit.num_tokens / replica.speed
                self.num_duplicates += command.duplicate
                self.post(replica.free_at, Done(command.replica, command.unit.unit_id))
            case Beat():
                self.world[command.replica].progress += 1
                self.post(self.now, Seen(command.replica, self.world[command.replica].progress))
            case Kill():
                self.num_deaths += command.error is not None
                del self.world[command.replica]
            case Retry() | SetAside():
                pass

    def step(self) -> None:
        """Take the commands, then the next event that still matters."""
        start = time.process_time()
        commands = self.dispatcher.commands(self.now)
        self.decision_s += time.process_time() - start
        for command in commands:
            self.obey(command)
        while self.events:
            at, _, news = heapq.heappop(self.events)
            self.now = max(self.now, at)
            if news.replica in self.world:
                start = time.process_time()
                self.dispatcher.tell(news, self.now)
                self.decision_s += time.process_time() - start
                return


def main() -> None:
    """Simulate once and print the figures."""
    options = _parse()
    num_samples = options.units * SAMPLES_PER_UNIT
    ids = np.random.default_rng(0).integers(0, 256, (num_samples, 16)).astype(np.uint8)
    lengths = np.full(num_samples, SAMPLE_TOKENS, dtype=np.int64)
    tracemalloc.start(1) if options.trace else None
    start = time.process_time()
    plan = plan_units(np.arange(num_samples), lengths, ids, "f" * 64, SAMPLE_TOKENS * SAMPLES_PER_UNIT)
    plan_s = time.process_time() - start
    kind = ReplicaKind("local", min=options.replicas // 2, max=options.replicas, price_per_hour=2.0)
    dispatcher = Dispatcher(plan, plan.tokens, [kind], FleetPolicy())
    simulation = Simulation(dispatcher, options.life_hours * 3600, seed=0)
    memory = []
    wall = time.perf_counter()
    while not dispatcher.finished:
        simulation.step()
        if dispatcher.meter.units_done >= len(memory) * len(plan) // 10:
            memory.append(_memory_bytes(options.trace))
    status = dispatcher.status(simulation.now)
    us_per_unit = (plan_s + simulation.decision_s) / len(plan) * 1e6
    print(
        json.dumps(
            {
                "benchmark": "fleet",
                "replicas": options.replicas,
                "units": len(plan),
                "us_per_unit": round(us_per_unit, 1),
                "goal_us": GOAL_US,
                "plan_us_per_unit": round(plan_s / len(plan) * 1e6, 2),
                "memory_mib": [round(held / 2**20, 1) for held in memory],
                "memory_is_traced": options.trace,
                "simulated_hours": round(simulation.now / 3600, 2),
                "deaths": simulation.num_deaths,
                "duplicates": simulation.num_duplicates,
                "units_done": status.units_done,
                "units_failed": status.units_failed,
                "machine_hours": round(status.machine_s / 3600, 1),
                "idle_share": round(status.idle_s / status.machine_s, 4),
                "wall_s": round(time.perf_counter() - wall, 1),
            }
        )
    )


def _memory_bytes(traced: bool) -> int:
    """Return what Python holds, or the resident memory of the process."""
    if traced:
        return tracemalloc.get_traced_memory()[0]
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * 4096


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicas", type=int, default=1000)
    parser.add_argument("--units", type=int, default=1_000_000)
    parser.add_argument("--life-hours", type=float, default=2.0, help="mean life of a replica")
    parser.add_argument("--trace", action="store_true", help="trace Python's memory exactly; several times slower")
    return parser.parse_args()


if __name__ == "__main__":
    main()
