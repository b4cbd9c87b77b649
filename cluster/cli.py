"""The command line: `lectern COMMAND CONFIG [--set a.b=value] [--run-dir URL] [--json]`.

Imports stay light: `lectern --help` and `lectern plan` load no torch, deepspeed, transformers or ray.
"""

from collections.abc import Callable
from typing import Annotated, Any, Literal

import typer

from cluster.terminal import Terminal

app = typer.Typer(
    name="lectern",
    help="Run a large teacher once, keep what it knows in a compact, verified dataset, and train any number of "
    "students from it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

Config = Annotated[str, typer.Argument(metavar="CONFIG", help="YAML file with the whole run.")]
Target = Annotated[str, typer.Argument(metavar="TARGET", help="Config, run directory, or URL of a dataset.")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override one key, e.g. train.steps=100; may be repeated."),
]
RunDirectory = Annotated[
    str | None,
    typer.Option("--run-dir", metavar="URL", help="Where the run lives (default: runs/ and the name of the config)."),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object as the last line; progress goes to stderr.")]
Address = Annotated[
    str,
    typer.Option("--address", metavar="URL", help="The cluster's dashboard.", envvar="RAY_API_SERVER_ADDRESS"),
]
AnyVersion = Annotated[
    bool, typer.Option("--any-version", help="Take a cluster whose Ray or Python is another version.")
]
JobAction = Literal["list", "status", "logs", "stop"]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an unexpected error.")]


@app.command()
def plan(
    config: Annotated[str | None, typer.Argument(metavar="CONFIG", help="YAML file with the whole run.")] = None,
    set_: Set = None,
    run_dir: RunDirectory = None,
    as_json: Json = False,
    debug: Debug = False,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON schema of the config and end.")] = False,
    rate: Annotated[
        float | None,
        typer.Option("--tokens-per-s", metavar="N", min=0.001, help="Rate of the whole teacher, for its hours."),
    ] = None,
    train_rate: Annotated[
        float | None,
        typer.Option("--train-tokens-per-s", metavar="N", min=0.001, help="Rate of a training, for its hours."),
    ] = None,
    like: Annotated[
        str | None,
        typer.Option("--like", metavar="RUN", help="Run directory whose rates and start-up times are taken."),
    ] = None,
) -> None:
    """What a run would do and cost: samples, tokens, units, bytes, hours and prices of machines. Runs no model."""
    from cluster import commands

    if schema:
        commands.print_schema()
        return
    if config is None:
        raise typer.BadParameter("name a config, or ask for --schema", param_hint="CONFIG")
    path = config
    _run(lambda out: commands.plan(out, path, set_ or [], run_dir, rate, train_rate, like), as_json, debug)


@app.command()
def generate(
    config: Config, set_: Set = None, run_dir: RunDirectory = None, as_json: Json = False, debug: Debug = False
) -> None:
    """The teacher writes completions for prompts, kept as Parquet; nothing is paid for twice."""
    from cluster import commands

    _run(lambda out: commands.generate(out, config, set_ or [], run_dir), as_json, debug)


@app.command()
def capture(
    config: Config, set_: Set = None, run_dir: RunDirectory = None, as_json: Json = False, debug: Debug = False
) -> None:
    """The teacher scores samples into the dataset; only what is missing."""
    _run_stage("capture", config, set_, run_dir, as_json, debug)


@app.command()
def train(
    config: Config, set_: Set = None, run_dir: RunDirectory = None, as_json: Json = False, debug: Debug = False
) -> None:
    """Distils the student (and trains its baseline) from the captured dataset."""
    _run_stage("train", config, set_, run_dir, as_json, debug)


@app.command()
def evaluate(
    config: Config, set_: Set = None, run_dir: RunDirectory = None, as_json: Json = False, debug: Debug = False
) -> None:
    """Student, baseline and teacher on held-out text."""
    _run_stage("evaluate", config, set_, run_dir, as_json, debug)


@app.command()
def run(
    config: Config, set_: Set = None, run_dir: RunDirectory = None, as_json: Json = False, debug: Debug = False
) -> None:
    """All stages of one config, each skipped when already done."""
    _run_stage("run", config, set_, run_dir, as_json, debug)


@app.command()
def inspect(
    target: Target,
    set_: Set = None,
    run_dir: RunDirectory = None,
    as_json: Json = False,
    debug: Debug = False,
    sample: Annotated[
        str | None, typer.Option("--sample", metavar="N|ID", help="Show this sample with the teacher's choices.")
    ] = None,
    card: Annotated[bool, typer.Option("--card", help="Write the dataset's card, README.md, and print it.")] = False,
) -> None:
    """What a dataset holds; a sample's tokens with the teacher's top choices, tail and entropy."""
    from cluster import commands

    _run(lambda out: commands.inspect(out, target, set_ or [], run_dir, sample, card), as_json, debug)


@app.command()
def verify(
    target: Target,
    set_: Set = None,
    run_dir: RunDirectory = None,
    as_json: Json = False,
    debug: Debug = False,
    repair: Annotated[
        bool, typer.Option("--repair", help="Drop damaged units, so that the next capture scores them again.")
    ] = False,
    number: Annotated[
        int | None,
        typer.Option("--against-teacher", metavar="N", min=1, help="Score N samples again with the config's teacher."),
    ] = None,
    bound: Annotated[
        float | None,
        typer.Option("--bound", metavar="NATS", min=0.0, help="Largest 99th percentile of the differences (0.05)."),
    ] = None,
) -> None:
    """Re-hashes every shard, checks manifests, counts and ids; on request against the teacher itself."""
    from cluster import commands

    _run(lambda out: commands.verify(out, target, set_ or [], run_dir, repair, number, bound), as_json, debug)


@app.command()
def compact(
    target: Target, set_: Set = None, run_dir: RunDirectory = None, as_json: Json = False, debug: Debug = False
) -> None:
    """Folds the records of all units into one index, so that a large dataset opens in a few requests."""
    from cluster import maintenance

    _run(lambda out: maintenance.compact(out, target, set_ or [], run_dir), as_json, debug)


@app.command()
def export(
    target: Target,
    to: Annotated[str, typer.Option("--to", metavar="URL", help="Where the copy is made.")],
    set_: Set = None,
    run_dir: RunDirectory = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Copies a dataset into plain Parquet that any other tool reads, whatever codec packs it."""
    from cluster import exchange

    _run(lambda out: exchange.export(out, target, set_ or [], run_dir, to), as_json, debug)


@app.command(name="import")
def import_(
    target: Annotated[str, typer.Argument(metavar="TARGET", help="Config, or URL of the dataset to make.")],
    from_: Annotated[str, typer.Option("--from", metavar="URL", help="Folder of the other tool's cache.")],
    file_format: Annotated[str, typer.Option("--format", metavar="NAME", help="distillkit")],
    teacher: Annotated[str, typer.Option("--teacher", metavar="NAME", help="The model that the cache came from.")],
    tokenizer: Annotated[
        str | None,
        typer.Option("--tokenizer", metavar="FOLDER", help="Its tokenizer (default: of the config's teacher)."),
    ] = None,
    source: Annotated[
        str, typer.Option("--source", metavar="NAME", help="Name of the corpus, for curriculum and reports.")
    ] = "imported",
    format_config: Annotated[
        str | None,
        typer.Option("--format-config", metavar="URL", help="Compression config (default: beside the rows)."),
    ] = None,
    precision: Annotated[
        str, typer.Option("--precision", metavar="NAME", help="Precision of the teacher's forward pass.")
    ] = "unknown",
    skip_bad_rows: Annotated[
        bool, typer.Option("--skip-bad-rows", help="Leave rows out of contract out instead of refusing them all.")
    ] = False,
    set_: Set = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Reads another tool's cache of teacher logits into a dataset; checks every row before it stores the first."""
    from cluster import exchange
    from storage.importers.dataset import ImportSettings

    settings = ImportSettings(from_, teacher, source, format_config, precision, skip_bad_rows)
    _run(lambda out: exchange.import_cache(out, target, set_ or [], settings, file_format, tokenizer), as_json, debug)


@app.command()
def ledger(
    words: Annotated[list[str], typer.Argument(metavar="[settle] TARGET", help="Config or run directory.")],
    set_: Set = None,
    run_dir: RunDirectory = None,
    as_json: Json = False,
    debug: Debug = False,
    invoice: Annotated[
        float | None,
        typer.Option("--invoice", metavar="MONEY", min=0.0, help="With settle: billed for all attempts so far."),
    ] = None,
    tokens: Annotated[
        int | None, typer.Option("--tokens", metavar="N", min=0, help="With settle: tokens billed, all together.")
    ] = None,
) -> None:
    """What was spent on a teacher behind an API; `settle` corrects unknown outcomes from an invoice."""
    from cluster import commands

    settling = words[0] == "settle"
    if len(words) != 1 + settling:
        raise typer.BadParameter("write `lectern ledger TARGET` or `lectern ledger settle TARGET --invoice MONEY`")
    if settling == (invoice is None):
        raise typer.BadParameter("`settle` and `--invoice MONEY` go together", param_hint="--invoice")
    _run(lambda out: commands.ledger(out, words[-1], set_ or [], run_dir, invoice, tokens), as_json, debug)


@app.command()
def gc(
    target: Target,
    set_: Set = None,
    run_dir: RunDirectory = None,
    as_json: Json = False,
    debug: Debug = False,
    older_than: Annotated[
        str, typer.Option("--older-than", metavar="AGE", help="Leave alone what is younger, e.g. 90m, 24h, 7d.")
    ] = "24h",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go, and remove nothing.")] = False,
) -> None:
    """Removes what interrupted attempts and compaction left behind; nothing that belongs to the dataset."""
    from cluster import maintenance

    _run(lambda out: maintenance.gc(out, target, set_ or [], run_dir, older_than, dry_run), as_json, debug)


@app.command()
def report(
    target: Target, set_: Set = None, run_dir: RunDirectory = None, as_json: Json = False, debug: Debug = False
) -> None:
    """Writes report.html and report.json from what lies in the run directory."""
    from cluster import commands

    _run(lambda out: commands.report(out, target, set_ or [], run_dir), as_json, debug)


@app.command()
def submit(
    config: Config,
    address: Address,
    run_dir: Annotated[
        str | None,
        typer.Option("--run-dir", metavar="URL", help="Where the run lives: a store or folder that all nodes reach."),
    ] = None,
    set_: Set = None,
    env: Annotated[
        list[str] | None,
        typer.Option("--env", metavar="NAME[=VALUE]", help="A variable that the job takes along; may be repeated."),
    ] = None,
    working_dir: Annotated[
        str, typer.Option("--working-dir", metavar="FOLDER", help="What ships, less what is ignored and secret.")
    ] = ".",
    follow: Annotated[bool, typer.Option("--follow/--no-follow", help="Show the job's log until it ends.")] = True,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would ship, and send nothing.")] = False,
    any_version: AnyVersion = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Runs a config as a job on a cluster and follows its log; the same command again goes on where it ended."""
    from cluster.submit.commands import SubmitOptions
    from cluster.submit.commands import submit as submit_job

    options = SubmitOptions(address, run_dir, set_ or [], env or [], working_dir, follow, dry_run, any_version)
    _run(lambda out: submit_job(out, config, options), as_json, debug)


@app.command()
def job(
    action: Annotated[JobAction, typer.Argument(metavar="list|status|logs|stop", help="What to do.")],
    name: Annotated[str | None, typer.Argument(metavar="[JOB]", help="The job's id; not for list.")] = None,
    address: Address = "http://127.0.0.1:8265",
    any_version: AnyVersion = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Lists the jobs of a cluster, shows one's state, follows its log, or stops it."""
    from cluster.submit.commands import job_command

    _run(lambda out: job_command(out, action, name, address, any_version), as_json, debug)


def main() -> None:
    """Entry point of the `lectern` command."""
    app(prog_name="lectern")


def _run_stage(
    until: str, config: str, overrides: list[str] | None, run_dir: str | None, as_json: bool, debug: bool
) -> None:
    from cluster import commands

    _run(lambda out: commands.stages(out, config, overrides or [], run_dir, until), as_json, debug)


def _run(command: Callable[[Terminal], dict[str, Any]], as_json: bool, debug: bool) -> None:
    code = Terminal(as_json, debug).run(command)
    if code:
        raise typer.Exit(code)


if __name__ == "__main__":
    main()
