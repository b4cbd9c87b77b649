"""`export`, `import` and `inspect` as commands: exit codes, messages, JSON and screens."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from distillkit_files import CONFIG, rows_of, spoiled, write_cache

from cluster.commands import inspect
from cluster.exchange import export, import_cache
from cluster.terminal import Terminal
from storage.importers.dataset import ImportSettings
from storage.reader import Dataset
from storage.verify import verify_dataset
from tests.cluster.conftest import Ended, World


def ended(
    capsys: pytest.CaptureFixture[str], command: Callable[[Terminal], dict[str, Any]], json_: bool = True
) -> Ended:
    code = Terminal(json_, False).run(command)
    text = capsys.readouterr()
    return Ended(code, text.out, text.err)


def test_export_of_a_config_names_what_it_wrote(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    world.capture()
    to = str(world.folder / "plain")
    found = ended(capsys, lambda out: export(out, world.config_path, [], None, to))
    assert found.code == 0, found.err
    assert found.json["units"] == found.json["new_units"] == 2
    assert len(Dataset.open(to).catalog) == found.json["samples"]
    assert verify_dataset(to).ok
    assert (Path(to) / "README.md").read_text().startswith("---\npretty_name: Soft targets of teacher\n")
    assert "2 of 2 units written now" in found.err


def test_import_takes_place_and_tokenizer_from_a_config(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    cache = world.folder / "theirs"
    write_cache(cache, rows_of(5, vocab_size=300), {**CONFIG, "d": 400})
    settings = ImportSettings(str(cache), "their-teacher")
    command = lambda out: import_cache(out, world.config_path, [], settings, "distillkit", None)  # noqa: E731
    found = ended(capsys, command)
    assert found.code == 0, found.err
    assert (found.json["samples"], found.json["bad_rows"]) == (5, [])
    dataset = Dataset.open(world.config.cache.url)
    assert dataset.identity.teacher.name == "their-teacher"
    assert (Path(world.config.cache.url) / "README.md").is_file()
    assert ended(capsys, command).json["new_units"] == 0


def test_a_refused_import_is_one_message_with_file_row_and_remedy(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    cache, to = world.folder / "theirs", str(world.folder / "ours")
    config = {**CONFIG, "d": 400, "exact_k": 12, "polynomial_terms": None, "residual_bins": []}
    write_cache(cache, [*rows_of(3, vocab_size=300), spoiled("twice", vocab_size=300)], config)

    def command(skip: bool, name: str = "distillkit", tokenizer: str | None = str(world.teacher)) -> Ended:
        settings = ImportSettings(str(cache), "them", skip_bad_rows=skip)
        return ended(capsys, lambda out: import_cache(out, to, [], settings, name, tokenizer))

    found = command(skip=False)
    assert found.code == 2
    for part in ("1 of 4 rows are out of contract", "data_0.parquet row 3", "one token id twice", "--skip-bad-rows"):
        assert part in found.err
    assert not Path(to).exists() or not list(Path(to).iterdir())
    found = command(skip=True)
    assert found.code == 0 and found.json["samples"] == 3
    assert "left out: " in found.err and "without 1 out of contract" in found.err
    assert "--format 'megatron' is not known; there is distillkit" in command(False, "megatron").err
    assert "--tokenizer is missing" in command(False, tokenizer=None).err


def test_inspect_fits_eighty_columns_and_tells_each_column(
    world: World, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    world.capture()
    monkeypatch.setenv("COLUMNS", "80")
    url = world.config.cache.url
    facts = ended(capsys, lambda out: inspect(out, url, [], None, None)).json
    assert set(facts["columns"]) == set(facts["column_bytes_per_token"])
    assert sum(facts["column_bytes_per_token"].values()) * facts["supervised"] == pytest.approx(
        sum(facts["columns"].values()), rel=0.01
    )
    found = ended(capsys, lambda out: inspect(out, url, [], None, None), json_=False)
    for part in ("topk, top_k 4", "plain, schema version", "none held twice", "bytes per token", "target_logprob"):
        assert part in found.out, found.out
    card = ended(capsys, lambda out: inspect(out, url, [], None, None, card=True))
    assert card.code == 0 and card.json["card"].endswith("README.md")
    assert json.loads(card.out)["card"] and (Path(url) / "README.md").is_file()
