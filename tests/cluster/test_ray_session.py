"""What a local session leaves in the environment, and what the reaper ends."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cluster import reaper
from cluster.config import ClusterConfig
from cluster.ray_session import _environment, _reaper, _settle_authentication, ray_session
from storage.errors import InputError


def sleeper(**environment: str) -> "subprocess.Popen[bytes]":
    """Start a process that ignores SIGTERM and would sleep for a minute."""
    code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, **environment}, stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"1\n"
    return process


def test_marked_processes_end_and_others_live() -> None:
    marked, other = sleeper(LECTERN_TEST="mine"), sleeper(LECTERN_TEST="others")
    try:
        assert reaper.session_processes("LECTERN_TEST=mine", 0) == [marked.pid]
        reaper.end_all("LECTERN_TEST=mine", 0, grace_s=0.2)
        assert marked.wait(timeout=5) == -9
        assert other.poll() is None
    finally:
        for process in (marked, other):
            process.kill()
            process.wait()


def test_a_process_that_holds_a_file_of_the_session_belongs_to_it(tmp_path: Path) -> None:
    folder = tmp_path / "session_2026-01-02_03-04-05_678901_4242" / "logs"
    folder.mkdir(parents=True)
    with (folder / "worker.out").open("w") as file:
        process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], stdout=file)
    try:
        assert reaper.session_processes("LECTERN_TEST=none", 4242) == [process.pid]
        assert reaper.session_processes("LECTERN_TEST=none", 42) == []
    finally:
        process.kill()
        process.wait()


def test_the_reaper_acts_when_its_parent_is_killed() -> None:
    code = (
        "import time\nfrom cluster.ray_session import _reaper\n"
        "with _reaper({'LECTERN_TEST': 'killed'}):\n    print('up', flush=True)\n    time.sleep(60)"
    )
    left = sleeper(LECTERN_TEST="killed")
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    try:
        assert parent.stdout is not None and parent.stdout.readline() == b"up\n"
        assert left.poll() is None
        parent.kill()
        parent.wait()
        assert left.wait(timeout=10) == -9
    finally:
        for process in (parent, left):
            process.kill()
            process.wait()


def test_a_session_that_ends_well_is_not_waited_for() -> None:
    began = time.monotonic()
    with _reaper({"LECTERN_TEST": "nobody"}):
        pass
    assert time.monotonic() - began < 2


def test_the_users_own_variables_win_and_all_are_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TEST_SET", "user")
    monkeypatch.delenv("RAY_TEST_UNSET", raising=False)
    with _environment({"RAY_TEST_SET": "ours", "RAY_TEST_UNSET": "ours"}, {"RAY_TEST_FORCED": "ours"}):
        assert os.environ["RAY_TEST_SET"] == "user"
        assert os.environ["RAY_TEST_UNSET"] == os.environ["RAY_TEST_FORCED"] == "ours"
    assert os.environ["RAY_TEST_SET"] == "user"
    assert "RAY_TEST_UNSET" not in os.environ and "RAY_TEST_FORCED" not in os.environ


def test_local_sessions_have_a_token_of_this_process_or_what_the_user_chose(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
    for name in names:
        monkeypatch.setenv(name, "")  # so that what the test changes is put back
        monkeypatch.delenv(name)
    _settle_authentication()
    token = os.environ["RAY_AUTH_TOKEN"]
    assert os.environ["RAY_AUTH_MODE"] == "token" and len(token) == 64
    _settle_authentication()
    assert os.environ["RAY_AUTH_TOKEN"] == token
    for name in names:
        os.environ.pop(name, None)
    os.environ["RAY_AUTH_MODE"] = "disabled"
    _settle_authentication()
    assert "RAY_AUTH_TOKEN" not in os.environ


def test_a_cluster_that_is_not_there_is_one_clear_message() -> None:
    began = time.monotonic()
    with (
        pytest.raises(InputError, match=r"cluster\.address 127\.0\.0\.1:1: nothing can be reached"),
        ray_session(ClusterConfig(address="127.0.0.1:1"), 1),
    ):
        pass
    assert time.monotonic() - began < 5
