"""`lectern ledger`: the account at the command line, and its correction from an invoice."""

import json
from typing import Any

from typer.testing import CliRunner

from cluster.cli import app
from cluster.report.data import _cost
from cluster.report.timeline import Timeline
from cluster.rundir import RunDir
from cluster.stages.ledger import budget_of, ledger_store
from tests.cluster.conftest import World
from workers.ledger.amounts import PICO, Amount
from workers.ledger.ledger import Batch, Ledger


def lectern(*arguments: str) -> Any:
    """The command line, in this process."""
    return CliRunner().invoke(app, arguments)


def last_json(ended: Any) -> Any:
    return json.loads(ended.stdout.splitlines()[-1])


def spend(world: World) -> None:
    ledger = Ledger(ledger_store(world.config), budget_of(world.config, RunDir(world.run_dir)))
    worst = Amount(2 * PICO, 1000, 1)
    ledger.transact(Batch(reserve=[(name, worst) for name in "abcd"]))
    ledger.transact(Batch(settled=[("a", Amount(PICO, 400, 1))], kept=["b", "c"]))


def test_shows_and_corrects_what_is_unknown(world: World) -> None:
    world.values["budget"] = {"cap": 10, "dataset": {"cap_tokens": 5000}}
    config, run_dir = world.config_path, ["--run-dir", str(world.run_dir)]
    nothing = lectern("ledger", config, *run_dir)
    assert nothing.exit_code == 2
    assert "nothing was spent" in nothing.stderr
    spend(world)
    shown = last_json(lectern("ledger", config, *run_dir, "--json"))
    assert shown["total"] == {
        "attempts": 4, "settled": 1.0, "unknown": 4.0, "reserved": 2.0, "used": 7.0, "tokens": 3400,
    }  # fmt: skip
    assert shown["caps"]["run"]["money"] == {"cap": 10.0, "left": 3.0}
    assert shown["caps"]["dataset"]["tokens"] == {"cap": 5000, "left": 1600}
    low = lectern("ledger", "settle", config, *run_dir, "--invoice", "0.5")
    assert low.exit_code == 2
    assert "less than the 1" in low.stderr
    settled = lectern("ledger", "settle", config, *run_dir, "--invoice", "2.5", "--tokens", "900")
    assert settled.exit_code == 0, settled.stderr
    assert "7.5 left" in settled.stdout
    after = last_json(lectern("ledger", config, *run_dir, "--json"))["total"]
    assert (after["used"], after["unknown"], after["reserved"], after["tokens"]) == (2.5, 0.0, 0.0, 900)
    again = lectern("ledger", "settle", config, *run_dir, "--invoice", "2.5")
    assert "nothing unknown" in again.stderr


def test_the_report_takes_the_cost_from_the_ledger(world: World) -> None:
    world.values["teacher"] |= {"kind": "api"}
    world.values["budget"] = {"cap": 10}
    run = RunDir(world.run_dir)
    nothing = {"currency": "USD", "spent": 0.0, "reserved": 0.0, "cap": 10.0, "machines": 0.0, "api": 0.0}
    assert _cost(world.config, run, Timeline()) == nothing
    spend(world)
    assert _cost(world.config, run, Timeline()) == {**nothing, "spent": 5.0, "reserved": 2.0, "api": 5.0}


def test_bad_words_are_told(world: World) -> None:
    world.values["budget"] = {"cap": 0}
    for arguments, part in [
        (["settle", world.config_path], "go together"),
        ([world.config_path, "--invoice", "3"], "go together"),
        ([world.config_path], "budget.cap = 0: must be greater than 0"),
    ]:
        ended = lectern("ledger", *arguments)
        assert ended.exit_code == 2
        assert part in ended.stderr, (arguments, ended.stderr)
