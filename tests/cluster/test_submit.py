"""The pure parts of a submission, and the way to a job server, against servers of our own on loopback."""

import json
import shlex
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.loader import check_config
from cluster.submit import job as jobs
from cluster.submit.connect import check_versions, connect, normal_address
from cluster.submit.environment import job_environment, secret_values
from cluster.submit.places import check_places
from cluster.submit.shipment import survey
from storage.errors import InputError, StorageError, WorkerError
from tests.cluster.conftest import Ended, World

Serve = Callable[[Callable[[str, str], tuple[int, Any]]], str]


# --- places ---------------------------------------------------------------------------------------------------------


def placed(world: World, **values: Any) -> Any:
    """A config whose places are all on stores, with some values changed."""
    whole = {**world.values, "cache": {**world.values["cache"], "url": "s3://bucket/cache"}}
    whole["data"] = {**whole["data"], "sources": [{"name": "general", "path": "general.jsonl"}]}
    return check_config({**whole, **values}, "world")


def test_relative_inputs_ship_and_absolute_ones_are_named(world: World) -> None:
    world.config_path  # noqa: B018 - writes the file
    folders = check_places(placed(world), "s3://bucket/run", survey(world.folder), "run.yaml")
    assert folders == [str(world.teacher)]
    again = check_places(placed(world), "/mnt/shared/run", survey(world.folder), "run.yaml")
    assert "/mnt/shared/run" in again


def test_places_of_one_machine_are_refused(world: World) -> None:
    world.config_path  # noqa: B018
    shipment = survey(world.folder)
    with pytest.raises(InputError, match="needs --run-dir"):
        check_places(placed(world), None, shipment, "run.yaml")
    with pytest.raises(InputError, match="--run-dir runs/x is a path of one machine"):
        check_places(placed(world), "runs/x", shipment, "run.yaml")
    with pytest.raises(InputError, match=r"2 problems|cannot be submitted") as caught:
        check_places(placed(world, cache={"url": "cache", "kind": "topk"}), "runs/x", shipment, "run.yaml")
    assert "cache.url cache is a path" in str(caught.value)


def test_inputs_that_stay_are_refused_with_the_reason(world: World) -> None:
    world.config_path  # noqa: B018
    (world.folder / ".gitignore").write_text("*.jsonl\n")
    with pytest.raises(InputError, match=r"data.sources.general.path general.jsonl: .* does not ship \(.gitignore\)"):
        check_places(placed(world), "s3://b/run", survey(world.folder), "run.yaml")
    (world.folder / ".gitignore").unlink()
    sources = {"data": {"sources": [{"name": "general", "path": path} for path in ("none/*.txt",)]}}
    with pytest.raises(InputError, match=r"none/\*.txt matches no file"):
        check_places(placed(world, **sources), "s3://b/run", survey(world.folder), "run.yaml")
    out = {"data": {"sources": [{"name": "general", "path": "../x.jsonl"}]}}
    with pytest.raises(InputError, match="leads out of"):
        check_places(placed(world, **out), "s3://b/run", survey(world.folder), "run.yaml")


# --- environment ----------------------------------------------------------------------------------------------------


def test_variables_go_by_name(world: World) -> None:
    config = placed(world, cluster={"env": ["HF_TOKEN"]})
    found = job_environment(config, ["MODE=fast=1", "PLAIN"], {"HF_TOKEN": "t", "PLAIN": "p", "OTHER": "o"})
    assert found == {"PYTHONUNBUFFERED": "1", "HF_TOKEN": "t", "MODE": "fast=1", "PLAIN": "p"}
    assert set(secret_values(found, {"MY_API_KEY": "k", "OTHER": "o"}, ["MODE"])) == {"HF_TOKEN", "MY_API_KEY", "MODE"}


def test_the_key_of_an_endpoint_goes_along_where_it_is_set(world: World) -> None:
    api = {"base_url": "http://127.0.0.1:1/v1", "model": "m", "key_env": "MY_KEY"}
    config = placed(world, teacher={**world.values["teacher"], "kind": "api", "api": api})
    assert job_environment(config, [], {"MY_KEY": "k"})["MY_KEY"] == "k"
    assert "MY_KEY" not in job_environment(config, [], {})


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("NOT_SET", "is not set here"),
        ("a b=1", "letters, digits"),
        ("RAY_AUTH_TOKEN=x", "a node has its own"),
        ("PATH", "a node has its own"),
    ],
)
def test_wrong_variables(world: World, entry: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        job_environment(placed(world), [entry], {"PATH": "/bin"})


# --- jobs -----------------------------------------------------------------------------------------------------------


def test_ids_tell_runs_apart_and_find_the_one_at_work() -> None:
    prefix = jobs.job_prefix("configs/My Run.yaml", "s3://b/run/")
    assert prefix == jobs.job_prefix("configs/My Run.yaml", "s3://b/run") and prefix.startswith("lectern-my-run-")
    assert prefix != jobs.job_prefix("configs/My Run.yaml", "s3://b/run2")
    assert jobs.next_id(prefix, {}) == (f"{prefix}1", False)
    ended = {f"{prefix}{n}": True for n in range(1, 11)}
    assert jobs.next_id(prefix, {**ended, "other-11": False}) == (f"{prefix}11", False)
    assert jobs.next_id(prefix, {**ended, f"{prefix}11": False}) == (f"{prefix}11", True)


def test_the_command_survives_a_shell() -> None:
    command = jobs.entrypoint("a b.yaml", "s3://b/run", ["data.sources.general.path=x y.txt", "train.steps=3"])
    words = shlex.split(command)
    assert words[:5] == ["python", "-m", "cluster.cli", "run", "a b.yaml"]
    assert words[-3:] == ["data.sources.general.path=x y.txt", "--set", "train.steps=3"]


class Log:
    """A job whose log breaks off after each of the given numbers of characters, and then is whole."""

    def __init__(self, text: str, breaks: list[int], status: str = "SUCCEEDED") -> None:
        self.text, self.breaks, self.status = text, breaks, status

    async def tail_job_logs(self, job_id: str) -> AsyncIterator[str]:
        """Yield the log from its start, seven characters at a time."""
        end = self.breaks.pop(0) if self.breaks else len(self.text)
        for start in range(0, end, 7):
            yield self.text[start : min(start + 7, end)]
        if end < len(self.text):
            raise RuntimeError("WebSocket connection closed unexpectedly with close code 1006")

    def get_job_info(self, job_id: str) -> Any:
        """Return the job, ended."""
        status = SimpleNamespace(is_terminal=lambda: True)
        return SimpleNamespace(status=status, submission_id=job_id)


def test_a_log_that_breaks_off_goes_on_where_it_broke_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs.time, "sleep", lambda _: None)
    text = "".join(f"line {n}\n" for n in range(40))
    shown: list[str] = []
    jobs.follow(Log(text, [10, 10, 0, 151]), "job", shown.append)
    assert "".join(shown) == text


def test_a_cluster_that_is_gone_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs.time, "sleep", lambda _: None)
    with pytest.raises(StorageError, match=r"cannot be followed any more \(WebSocket.*the job itself goes on"):
        jobs.follow(Log("text", [0] * 99), "job", lambda _: None)


@pytest.mark.parametrize(("status", "exit_code", "expected"), [("SUCCEEDED", 0, 0), ("FAILED", 3, 3), ("FAILED", 2, 2)])
def test_a_jobs_exit_code_is_its_commands(status: str, exit_code: int, expected: int) -> None:
    job = SimpleNamespace(status=status, driver_exit_code=exit_code, submission_id="j", message="")
    assert jobs.outcome(job, "again") == expected


@pytest.mark.parametrize(("status", "exit_code"), [("STOPPED", 0), ("FAILED", None), ("FAILED", -9), ("FAILED", 137)])
def test_a_job_ended_from_outside_says_how_to_go_on(status: str, exit_code: int | None) -> None:
    job = SimpleNamespace(status=status, driver_exit_code=exit_code, submission_id="j", message="driver died")
    with pytest.raises(
        WorkerError, match=r"was (stopped|ended from outside \(driver died\)); what it committed is kept"
    ):
        jobs.outcome(job, "Submit again.")


# --- the way to a cluster -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("127.0.0.1", "http://127.0.0.1:8265"),
        ("host:80", "http://host:80"),
        ("https://ray.example.com/", "https://ray.example.com"),
        ("http://h/proxy/", "http://h:8265/proxy"),
    ],
)
def test_addresses(address: str, expected: str) -> None:
    assert normal_address(address) == expected


@pytest.mark.parametrize("address", ["auto://x", "ray://head:10001", "http://", "http://h:x", "http://u:p@h"])
def test_wrong_addresses(address: str) -> None:
    with pytest.raises(InputError, match=r"is no job server's") as caught:
        normal_address(address)
    assert "u:p" not in str(caught.value)


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Serve answers of a function of path and token; gives the address."""
    servers: list[HTTPServer] = []

    def start(answer: Callable[[str, str], tuple[int, Any]]) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                status, body = answer(self.path, self.headers.get("authorization", ""))
                data = (body if isinstance(body, str) else json.dumps(body)).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: Any) -> None:
                pass

        server = HTTPServer(("127.0.0.1", 0), Handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def rays_answers(ray_version: str, python_version: str, locked: bool = True) -> Callable[[str, str], tuple[int, Any]]:
    """What Ray's dashboard says to a client with any token, and to one without."""

    def answer(path: str, token: str) -> tuple[int, Any]:
        if locked and not token:
            return 401, "Unauthorized: Missing authentication token"
        if path == "/api/version":
            return 200, {"version": "4", "ray_version": ray_version, "ray_commit": "", "session_name": ""}
        if path == "/api/v0/cluster_metadata":
            return 200, {"result": True, "msg": "", "data": {"pythonVersion": python_version}}
        return 200, []

    return answer


def own_versions() -> tuple[str, str]:
    """Ray's and Python's version here."""
    import platform

    import ray

    return ray.__version__, platform.python_version()


def test_a_cluster_like_this_machine_is_let_through(serve: Serve) -> None:
    ray_version, python_version = own_versions()
    found = connect(serve(rays_answers(ray_version, python_version)))
    assert (found.ray_version, found.python_version, found.notes) == (ray_version, python_version, ())


def test_the_address_asked_for_wins_over_rays_variables(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:1")
    address = serve(rays_answers(*own_versions()))
    assert connect(address).client.get_address() == address


@pytest.mark.parametrize(
    ("ray_version", "python_version", "message"),
    [
        ("2.40.0", "3.11.9", r"the cluster has Ray 2\.40\.0, this machine Ray"),
        ("", "3.9.2", r"the cluster has Python 3\.9\.2, this machine Python"),
    ],
)
def test_other_versions_are_refused(serve: Serve, ray_version: str, python_version: str, message: str) -> None:
    address = serve(rays_answers(ray_version or own_versions()[0], python_version))
    with pytest.raises(InputError, match=message):
        connect(address)
    assert connect(address, any_version=True).python_version == python_version


def test_patch_releases_of_python_do_not_count() -> None:
    ray_version, python_version = own_versions()
    check_versions(ray_version, ".".join(python_version.split(".")[:2]) + ".99")
    check_versions(ray_version, None)


def test_nothing_there_and_something_else_there(serve: Serve) -> None:
    with pytest.raises(InputError, match=r"no cluster answers there .*ray up"):
        connect("http://127.0.0.1:1")
    with pytest.raises(InputError, match=r"is no Ray dashboard \(HTTP 404\)"):
        connect(serve(lambda path, token: (404, "")))
    with pytest.raises(InputError, match="is no Ray dashboard"):
        connect(serve(lambda path, token: (200, "<html>")))


def test_a_cluster_without_a_lock_is_refused_unless_that_is_wanted(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = serve(rays_answers(*own_versions(), locked=False))
    with pytest.raises(InputError, match="takes jobs from anyone who reaches it"):
        connect(address)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert "wants no token" in connect(address).notes[0]


def test_a_token_that_is_missing_or_wrong(serve: Serve, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuses(path: str, token: str) -> tuple[int, Any]:
        return (403, "Forbidden") if token else (401, "Unauthorized")

    address = serve(refuses)
    with pytest.raises(InputError, match="refuses the token"):
        connect(address)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    monkeypatch.delenv("RAY_AUTH_MODE")
    with pytest.raises(InputError, match=r"wants a token and none was found.*RAY_AUTH_TOKEN_PATH"):
        connect(address)


# --- the command ----------------------------------------------------------------------------------------------------


def test_a_dry_run_says_what_would_ship_and_sends_nothing(world: World, lectern: Callable[..., Ended]) -> None:
    world.values["cache"]["url"] = "s3://bucket/cache"
    (world.folder / ".env").write_text("TOKEN=very-secret-value-1\n")
    (world.folder / "notes.txt").write_text("very-secret-value-2")
    ended = lectern(
        *("submit", world.config_path, "--run-dir", "s3://bucket/run", "--working-dir", str(world.folder), "--dry-run"),
        *("--address", "http://127.0.0.1:1", "--env", "DB_PASSWORD=very-secret-value-2", "--json"),
    )
    assert ended.code == 0, ended.err
    assert ended.json["secrets"] == {".env": "by its name", "notes.txt": "holds the value of DB_PASSWORD"}
    assert "takes      PYTHONUNBUFFERED, DB_PASSWORD (values are not shown)" in ended.err
    assert "very-secret" not in ended.out + ended.err


def test_a_config_outside_of_what_ships(world: World, lectern: Callable[..., Ended], tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    folder = str(tmp_path / "elsewhere")
    arguments = ("--run-dir", "s3://b/r", "--working-dir", folder, "--address", "http://127.0.0.1:1")
    ended = lectern("submit", world.config_path, *arguments)
    assert ended.code == 2 and "lies outside of" in ended.err and ended.err.count("error: ") == 1
