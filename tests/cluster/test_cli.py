"""The real command line: exit codes, one message for each bad input, JSON, and what it does not import."""

import json
import os
import resource
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.commands import inspect as inspect_command
from cluster.commands import plan as plan_command
from cluster.commands import verify as verify_command
from cluster.terminal import Terminal
from storage.errors import BudgetError, StorageError
from tests.cluster.conftest import Ended, World, make_teacher

Lectern = Callable[..., Ended]
HEAVY = ("torch", "deepspeed", "transformers", "ray")


def plan(world: World, *overrides: str, capsys: pytest.CaptureFixture[str]) -> Ended:
    """Run `lectern plan` in this process."""
    arguments = [item.removeprefix("--set=") for item in overrides]
    code = Terminal(False, False).run(
        lambda out: plan_command(out, world.config_path, arguments, str(world.run_dir), None)
    )
    text = capsys.readouterr()
    return Ended(code, text.out, text.err)


def check_one_message(ended: Ended, code: int, *parts: str) -> None:
    """Assert one message on stderr that holds all parts, and no traceback."""
    assert ended.code == code, ended.err
    assert ended.err.startswith("error: ") and ended.err.count("error: ") == 1
    assert "Traceback" not in ended.err
    for part in parts:
        assert part in ended.err, (part, ended.err)


def test_help_names_every_command_and_imports_nothing_heavy(lectern: Lectern) -> None:
    ended = lectern("--help")
    assert ended.code == 0
    for command in ("plan", "capture", "train", "evaluate", "run", "inspect", "verify", "compact", "gc", "report"):
        assert command in ended.out


@pytest.mark.parametrize("arguments", [["--help"], ["plan", "CONFIG", "--run-dir", "RUN"]])
def test_help_and_plan_import_no_torch_and_no_ray(world: World, arguments: list[str], lectern: Lectern) -> None:
    given = [{"CONFIG": world.config_path, "RUN": str(world.run_dir)}.get(a, a) for a in arguments]
    code = (
        "import sys\nsys.argv = ['lectern', *sys.argv[1:]]\nfrom cluster.cli import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
        f"found = [name for name in {HEAVY!r} if name in sys.modules]\nassert not found, found"
    )
    import subprocess

    done = subprocess.run([sys.executable, "-c", code, *given], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_plan_counts_and_ends_with_json(world: World, lectern: Lectern) -> None:
    world.capture(share=0.5)
    ended = lectern("plan", world.config_path, "--run-dir", str(world.run_dir), "--json", "--tokens-per-s", "1000")
    assert ended.code == 0, ended.err
    assert ended.out.count("\n") == 1
    found = ended.json
    assert found["exit_code"] == 0
    assert 0 < found["cached_samples"] < found["samples"]
    assert found["cached_samples"] + found["missing_samples"] == found["samples"]
    assert found["teacher_hours"] == pytest.approx(found["missing_tokens"] / 1000 / 3600, abs=1e-4)
    assert found["bytes_measured"] and found["units"] == 1


def test_plan_prints_the_schema_of_the_config(lectern: Lectern) -> None:
    schema = json.loads(lectern("plan", "--schema").out)
    assert set(schema["properties"]) >= {"data", "teacher", "cache", "student", "train"}
    assert schema["$defs"]["TrainConfig"]["properties"]["steps"]["description"] == "Optimizer steps."


def test_an_unknown_key_ends_with_code_2_and_the_nearest_name(world: World, lectern: Lectern) -> None:
    ended = lectern("plan", world.config_path, "--set", "train.stepz=3")
    check_one_message(ended, 2, "unknown key train.stepz; did you mean train.steps?")
    assert ended.out == ""


def test_with_json_an_error_is_the_last_line_of_stdout_too(world: World, lectern: Lectern) -> None:
    ended = lectern("run", world.config_path, "--set", "train.stepz=3", "--json")
    assert ended.code == 2
    assert ended.json["exit_code"] == 2 and "train.stepz" in ended.json["error"]


def test_a_wrong_option_or_command_is_usage_and_code_2(world: World, lectern: Lectern) -> None:
    assert lectern("plan", world.config_path, "--bogus").code == 2
    assert lectern("nosuch").code == 2


def test_a_missing_config(lectern: Lectern, tmp_path: Path) -> None:
    check_one_message(lectern("run", str(tmp_path / "none.yaml")), 2, "none.yaml does not exist")


def test_a_missing_corpus(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    (world.folder / "domain.jsonl").unlink()
    check_one_message(plan(world, capsys=capsys), 2, "domain.jsonl")


def test_an_empty_corpus(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    (world.folder / "domain.jsonl").write_text("")
    check_one_message(plan(world, capsys=capsys), 2, "domain")


def test_a_malformed_line_names_file_and_line_or_is_counted(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    path = world.folder / "domain.jsonl"
    lines = path.read_text().splitlines()
    lines[6] = '{"text": "broken'
    path.write_text("\n".join(lines) + "\n")
    check_one_message(plan(world, capsys=capsys), 2, "domain.jsonl:7")
    ended = plan(world, "data.on_bad_row=skip", capsys=capsys)
    assert ended.code == 0, ended.err
    assert world.samples is not None
    facts = json.loads((world.run_dir / "samples" / "samples.json").read_text())
    assert facts["counters"]["domain"]["bad_rows"] == 1


def test_a_text_without_supervised_tokens(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    row = json.dumps({"prompt": "only a prompt", "completion": ""})
    (world.folder / "domain.jsonl").write_text(f"{row}\n")
    check_one_message(plan(world, capsys=capsys), 2, "domain.jsonl:1")


def test_a_window_longer_than_the_teachers_positions(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    make_teacher(world, positions=32)
    check_one_message(plan(world, capsys=capsys), 2, "data.window_tokens 64", "32 positions of teacher")


def test_a_window_longer_than_the_students_positions(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    ended = plan(world, "data.window_tokens=100", capsys=capsys)
    check_one_message(ended, 2, "data.window_tokens 100", "64 positions of the student")


def test_a_window_longer_than_the_embedded_teachers_positions(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    world.values["teacher"] = {"embedded": {"vocab_size": 400}}
    ended = plan(world, "data.window_tokens=4096", capsys=capsys)
    check_one_message(ended, 2, "data.window_tokens 4096", "2048 positions of teacher embedded")


def test_a_student_with_another_tokenizer(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    other = world.folder / "other"
    other.mkdir()
    for file in world.teacher.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    text = (other / "tokenizer.json").read_text()
    content = json.loads(text)
    content["model"]["merges"] = content["model"]["merges"][:-1]
    (other / "tokenizer.json").write_text(json.dumps(content))
    ended = plan(world, f"student={{path: {other}}}", capsys=capsys)
    check_one_message(ended, 2, "the tokenizer of student", "set train.loss.divergence to alm or uld")
    ended = plan(world, f"student={{path: {other}}}", "train.loss.divergence=alm", capsys=capsys)
    assert ended.code == 0, ended.err


def test_a_student_vocabulary_that_is_too_small(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    ended = plan(world, "student.config.vocab_size=100", capsys=capsys)
    check_one_message(ended, 2, "student.config has a vocabulary of 100", "the student needs at least")


def test_a_dataset_of_other_settings(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    world.capture()
    ended = plan(world, "cache.top_k=7", capsys=capsys)
    check_one_message(ended, 2, "capture.top_k is 4 there, 7 here")


def test_a_dataset_of_another_teacher(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    world.capture()
    weights = world.teacher / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\1")
    check_one_message(plan(world, capsys=capsys), 2, "teacher.weights is")


def test_settings_of_a_dataset_are_compared_before_the_embedded_teacher_is_trained(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    world.capture()
    world.values["teacher"] = {"dtype": "float16", "embedded": {"vocab_size": 400}}
    check_one_message(plan(world, capsys=capsys), 2, "precision is '", "there, 'float16' here")


def test_a_curriculum_that_names_an_unknown_source(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    ended = plan(world, "curriculum.start={general: 1, dommain: 1}", capsys=capsys)
    check_one_message(ended, 2, "dommain", "general, domain")


def test_a_curriculum_that_repeats_a_source_too_often(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    ended = plan(world, "train.steps=400", "curriculum.max_epochs=2", capsys=capsys)
    check_one_message(ended, 2, "more than curriculum.max_epochs 2")


def test_an_adaptive_curriculum_compares_samples_that_are_scored(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    ended = plan(world, "curriculum.adaptive={samples: 5}", capsys=capsys)
    check_one_message(ended, 2, "curriculum.adaptive.samples 5 is more than evaluate.samples_per_source 4")


def test_a_task_whose_file_is_not_there_is_told_before_anything_is_spent(
    world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    ended = plan(world, "evaluate.tasks=[{name: quiz, path: quiz.jsonl}]", capsys=capsys)
    check_one_message(ended, 2, "quiz.jsonl of task quiz does not exist")


def test_a_full_disk_breaks_the_run_with_code_1(world: World, lectern: Lectern) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))

    ended = lectern("plan", world.config_path, "--run-dir", str(world.run_dir), preexec_fn=limit)
    check_one_message(ended, 1, "free some space")


def test_a_run_directory_that_cannot_be_written(world: World, lectern: Lectern) -> None:
    blocked = world.folder / "blocked"
    blocked.mkdir(mode=0o500)
    if os.access(blocked, os.W_OK):  # root may write anywhere but here
        blocked = Path("/proc/self/lectern")
    ended = lectern("plan", world.config_path, "--run-dir", str(blocked / "run"))
    check_one_message(ended, 2, str(blocked))


def verify(world: World, capsys: pytest.CaptureFixture[str]) -> Ended:
    """Run `lectern verify` in this process."""
    code = Terminal(True, False).run(lambda out: verify_command(out, world.values["cache"]["url"], [], None))
    text = capsys.readouterr()
    return Ended(code, text.out, text.err)


def test_verify_finds_a_sound_dataset_sound(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    world.capture()
    ended = verify(world, capsys)
    assert ended.code == 0 and ended.json["ok"] and ended.json["units"] == 2 and not ended.json["problems"]


@pytest.mark.parametrize("damage", ["truncated", "altered"])
def test_verify_names_a_damaged_shard(world: World, damage: str, capsys: pytest.CaptureFixture[str]) -> None:
    world.capture()
    shard = sorted((world.folder / "cache" / "data").iterdir())[0]
    raw = shard.read_bytes()
    shard.write_bytes(raw[:-40] if damage == "truncated" else raw[:60] + bytes([raw[60] ^ 1]) + raw[61:])
    ended = verify(world, capsys)
    assert ended.code == 2
    assert shard.name in ended.json["problems"][0] and ended.json["units"] == 1
    assert "Traceback" not in ended.err


def test_a_manifest_that_leads_outside_is_refused(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    world.capture()
    manifest = sorted((world.folder / "cache" / "manifest").iterdir())[0]
    record = json.loads(manifest.read_text())
    record["data_key"] = "../../etc/passwd"
    manifest.write_text(json.dumps(record))
    assert verify(world, capsys).code == 2
    ended = plan(world, capsys=capsys)
    check_one_message(ended, 2, manifest.name)


def test_inspect_takes_a_dataset_a_run_directory_or_a_config(world: World, lectern: Lectern) -> None:
    world.capture()
    url = world.values["cache"]["url"]
    by_url = lectern("inspect", url, "--json").json
    by_config = lectern("inspect", world.config_path, "--json").json
    assert by_url == by_config
    assert by_url["units"] == 2 and by_url["identity"]["capture"]["top_k"] == 4
    shown = lectern("inspect", url)
    assert shown.code == 0 and "bytes per supervised token" in shown.out


def test_inspect_shows_a_sample_by_number_or_id(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    world.capture()
    url = world.values["cache"]["url"]

    def shown(wanted: str) -> Ended:
        code = Terminal(True, False).run(lambda out: inspect_command(out, url, [], None, wanted))
        text = capsys.readouterr()
        return Ended(code, text.out, text.err)

    first = shown("0").json
    assert shown(first["sample_id"][:16]).json["sample_id"] == first["sample_id"]
    told = [token for token in first["tokens"] if token["supervised"]]
    assert told[0]["choices"][0]["probability"] == pytest.approx(0.5, abs=1e-3)
    assert told[0]["agrees"] and not told[1]["agrees"]
    check_one_message_of_two(shown("zz"), "no such sample")
    check_one_message_of_two(shown("99999"), "give a number from 0 to")


def check_one_message_of_two(ended: Ended, part: str) -> None:
    """With --json the message stands on stderr and in the JSON."""
    assert ended.code == 2 and part in ended.err and part in ended.json["error"]


def test_no_dataset_and_no_run(lectern: Lectern, tmp_path: Path) -> None:
    check_one_message(lectern("inspect", str(tmp_path)), 2, "name a config or a run directory")
    check_one_message(lectern("report", str(tmp_path)), 2, "name a config or a run directory")


def test_errors_end_with_their_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    for error, code in ((StorageError("broke"), 1), (BudgetError("spent"), 3)):

        def command(_out: Terminal, error: Exception = error) -> dict[str, object]:
            raise error

        assert Terminal(False, False).run(command) == code
    assert capsys.readouterr().err == "error: broke\nerror: spent\n"


def test_an_unexpected_error_is_one_line_and_its_traceback_is_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def command(out: Terminal) -> dict[str, object]:
        out.log_folder = str(tmp_path)
        return {"x": 1 // 0}

    assert Terminal(False, False).run(command) == 1
    text = capsys.readouterr().err
    assert text.count("\n") == 1 and "ZeroDivisionError" in text and str(tmp_path) in text
    assert "Traceback" in (tmp_path / "lectern-error.log").read_text()
    assert Terminal(False, True).run(command) == 1
    assert "Traceback" in capsys.readouterr().err


def test_stopping_by_hand_says_how_to_go_on(capsys: pytest.CaptureFixture[str]) -> None:
    def command(_out: Terminal) -> dict[str, object]:
        raise KeyboardInterrupt

    assert Terminal(False, False).run(command) == 1
    assert "goes on from here" in capsys.readouterr().err
