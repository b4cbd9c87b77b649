"""Whether a config can run away from this machine: every place that it names must be there for all nodes."""

from collections.abc import Iterator
from pathlib import Path, PurePath

from cluster.config import RunConfig
from cluster.submit.shipment import Shipment
from storage.embedded_text import EMBEDDED_PREFIX
from storage.errors import InputError


def check_places(config: RunConfig, run_dir: str | None, shipment: Shipment, config_path: str) -> list[str]:
    """Return the absolute folders that every node must see, for a note to the user.

    Raises InputError, listing all of them, for results that would lie on one node's own disk and for inputs that do not
    ship.
    """
    if run_dir is None:
        raise InputError(
            "a submitted run needs --run-dir: an object store (s3://bucket/run, gs://…) or the absolute path of a file "
            "system that all nodes share; a resubmission with the same --run-dir goes on from what lies there"
        )
    outputs = dict(_outputs(config, run_dir))
    problems = [
        f"{key} {path} is a path of one machine; name an object store (s3://…) or the absolute path of a shared folder"
        for key, path in outputs.items()
        if not _elsewhere(path)
    ]
    inputs = [("CONFIG", config_path), *_inputs(config, shipment.folder)]
    problems += [problem for key, path in inputs if (problem := _unshipped(key, path, shipment)) is not None]
    if len(problems) == 1:
        raise InputError(problems[0])
    if problems:
        raise InputError("this run cannot be submitted:" + "".join(f"\n  - {problem}" for problem in problems))
    named = [*outputs.values(), *(path for _, path in inputs)]
    return sorted({path for path in named if path.startswith(("/", "file://"))})


def _outputs(config: RunConfig, run_dir: str) -> Iterator[tuple[str, str]]:
    yield "--run-dir", run_dir
    yield "cache.url", config.cache.url
    if config.budget.ledger is not None:
        yield "budget.ledger", config.budget.ledger
    if config.generate.url is not None:
        yield "generate.url", config.generate.url


def _inputs(config: RunConfig, folder: Path) -> Iterator[tuple[str, str]]:
    """Inputs on a file system: URLs of stores, hub names and text that comes with Python are left out."""
    for source in config.data.sources:
        paths = [source.path] if isinstance(source.path, str) else source.path
        own = [path for path in paths if not path.startswith(EMBEDDED_PREFIX)]
        yield from ((f"data.sources.{source.name}.path", path) for path in own)
    if config.generate.prompts:
        prompts = config.generate.prompts
        yield from (("generate.prompts", path) for path in ([prompts] if isinstance(prompts, str) else prompts))
    yield from (("cache.also", url) for url in config.cache.also)
    for key, name in (("teacher.name", config.teacher.name), ("student.path", config.student.path)):
        if name is not None and (name.startswith((".", "/", "~")) or (folder / name).is_dir()):
            yield key, name


def _unshipped(key: str, path: str, shipment: Shipment) -> str | None:
    """What is wrong with an input, or None. Relative paths count from the folder that ships, as on the cluster."""
    if _elsewhere(path):
        return None
    if path.startswith("~") or ".." in PurePath(path).parts:
        return f"{key} {path} leads out of {shipment.folder}; move it in, or give it as a URL or an absolute path"
    matches = sorted(shipment.folder.glob(PurePath(path).as_posix()))
    names = [file.relative_to(shipment.folder).as_posix() for match in matches for file in _files(match)]
    if not names:
        return f"{key} {path} matches no file in {shipment.folder}"
    stays = {name: why for name in names if (why := shipment.why_not(name)) is not None}
    if not stays:
        return None
    name, why = next(iter(stays.items()))
    more = f" and {len(stays) - 1} more files" if len(stays) > 1 else ""
    return f"{key} {path}: {name}{more} does not ship ({why}); let it ship, or put it on an object store"


def _files(path: Path) -> list[Path]:
    return sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]


def _elsewhere(path: str) -> bool:
    return "://" in path or path.startswith("/")
