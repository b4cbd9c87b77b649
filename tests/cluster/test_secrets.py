"""Planted secrets must be in nothing that a command prints or writes; and no data may come from where it must not."""

from typing import Any

import pytest
from typer.testing import CliRunner

from cluster.cli import app
from cluster.loader import check_config
from storage.errors import InputError
from tests.cluster.conftest import World

PLANTED = {
    "OPENAI_API_KEY": "planted-openai-7f3a91",
    "AWS_ACCESS_KEY_ID": "planted-aws-id-51c2",
    "AWS_SECRET_ACCESS_KEY": "planted-aws-secret-88e0",
    "HF_TOKEN": "planted-hub-19bd",
    "RAY_AUTH_TOKEN": "planted-ray-token-000000000000000000000000",
    "DB_PASSWORD": "planted-password-4411",
}


def test_no_command_prints_or_writes_a_secret(world: World) -> None:
    run_dir = str(world.run_dir)
    path = world.config_path
    (world.folder / "keys.env").write_text(f"KEY={PLANTED['OPENAI_API_KEY']}\n")
    world.capture()
    wrong = ["--set", "cache.url=s3://planted-user:planted-word@nowhere.invalid/x", "--set", "train.stepz=1"]
    address = ["--address", "http://planted-user:planted-word@127.0.0.1:1"]
    shipped = ["--working-dir", str(world.folder), "--run-dir", "s3://b/r", "--set", "cache.url=s3://k:planted-s3@b/c"]
    commands = [
        ["plan", path, "--run-dir", run_dir],
        ["plan", path, "--run-dir", run_dir, *wrong],
        ["inspect", path, "--run-dir", run_dir],
        ["verify", path, "--run-dir", run_dir],
        ["report", path, "--run-dir", run_dir],
        ["submit", path, *shipped, "--env", "DB_PASSWORD", "--dry-run", "--address", "http://127.0.0.1:1"],
        ["submit", path, *shipped, "--env", "DB_PASSWORD", *address],
    ]
    for command in commands:
        ended = CliRunner().invoke(app, command, env=PLANTED)
        assert "planted" not in ended.output, (command, ended.output)
        assert ended.exit_code in {0, 2}, ended.output
    planted = [value.encode() for value in PLANTED.values()]
    for file in [*world.run_dir.rglob("*"), *(world.folder / "cache").rglob("*")]:
        if file.is_file():
            assert not [value for value in planted if value in file.read_bytes()], file


def reading(world: World, path: str, **cluster: Any) -> None:
    """Check a config with one source."""
    data = {**world.values["data"], "sources": [{"name": "general", "path": path}]}
    check_config({**world.values, "data": data, "cluster": cluster}, "world")


@pytest.mark.parametrize(
    "path",
    [
        "http://169.254.169.254/latest/meta-data/iam",
        "https://metadata.google.internal/computeMetadata/v1/",
        "simplecache::http://169.254.169.254/x",
        "http://[fe80::1]/x",
        "http://METADATA.google.internal./x",
    ],
)
def test_metadata_services_are_refused_always(world: World, path: str) -> None:
    with pytest.raises(InputError, match="metadata service"):
        reading(world, path)


@pytest.mark.parametrize(
    "path", ["s3://bucket/data/a.jsonl", "embedded:general", "/srv/text/x.txt", "s3://bucket/data"]
)
def test_what_is_below_the_list_is_allowed(world: World, path: str) -> None:
    reading(world, path, allowed_urls=["s3://bucket/data/", "/srv/text"])


@pytest.mark.parametrize(
    "path",
    ["s3://bucket/database/a.jsonl", "https://example.com/a", "/srv/text/../x", "notes.txt", "s3://bucket/data/../b"],
)
def test_all_else_is_refused(world: World, path: str) -> None:
    with pytest.raises(InputError, match=r"is not below any of cluster.allowed_urls \(s3://bucket/data, /srv/text\)"):
        reading(world, path, allowed_urls=["s3://bucket/data", "/srv/text"])
