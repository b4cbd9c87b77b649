"""What ships to a cluster: the same as Ray would send, less secrets."""

import random
import zipfile
from pathlib import Path

import pytest

from cluster.submit import shipment as module
from cluster.submit.commands import describe
from cluster.submit.secret_files import secret_name
from cluster.submit.shipment import pack, survey
from storage.errors import InputError


def lay(folder: Path, *names: str, text: str = "x\n") -> Path:
    """Write small files."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A project with rules in two folders, build products and links."""
    root = lay(
        tmp_path / "project",
        "run.yaml",
        "a/code.py",
        "a/b/deep.py",
        "a/notes.txt",
        "a/kept.txt",
        "runs/1/report.html",
        "a/runs/2/x",
        "data/small.jsonl",
        "big/model.bin",
        ".git/config",
        ".venv/bin/python",
        "a/__pycache__/code.pyc",
        "odd name é.txt",
    )
    (root / ".gitignore").write_text("runs/\n*.txt\n!kept.txt\n!odd*\n")
    (root / ".rayignore").write_text("/big\n")
    (root / "a" / ".gitignore").write_text("b/\n# nothing else\n")
    return root


def test_it_is_what_ray_would_send(tree: Path, tmp_path: Path) -> None:
    from ray._private.ray_constants import get_runtime_env_default_excludes
    from ray._private.runtime_env.packaging import create_package

    archive = tmp_path / "ray.zip"
    create_package(str(tree), archive, include_gitignore=True, excludes=get_runtime_env_default_excludes())
    with zipfile.ZipFile(archive) as package:
        rays = sorted(name for name in package.namelist() if not name.endswith("/"))
    assert list(survey(tree).files) == rays
    assert rays == [
        ".gitignore",
        ".rayignore",
        "a/.gitignore",
        "a/code.py",
        "a/kept.txt",
        "data/small.jsonl",
        "odd name é.txt",
        "run.yaml",
    ]


def test_what_stays_is_said_with_its_reason(tree: Path) -> None:
    found = survey(tree)
    assert found.left_out["runs/"] == ".gitignore" and found.left_out["a/b/"] == "a/.gitignore"
    assert found.left_out["big/"] == ".rayignore" and found.left_out[".git/"] == "never ships"
    assert found.why_not("runs/1/report.html") == ".gitignore"
    assert found.why_not("a/code.py") is None
    assert found.why_not("none.py") == "there is no such file"
    lines = "\n".join(describe(found, {"KEY": "hidden"}, [], "python -m cluster.cli run s3://user:pw@b/c"))
    assert "runs/" in lines and "takes      KEY" in lines
    assert "hidden" not in lines and "pw" not in lines


@pytest.mark.parametrize(
    "name",
    [".env", ".env.local", "prod.env", "deploy.pem", "id_rsa", ".netrc", "credentials.json", "service-account-1.json"],
)
def test_a_secret_by_its_name_stays_and_is_said(tmp_path: Path, name: str) -> None:
    found = survey(lay(tmp_path, "run.yaml", f"sub/{name}"))
    assert list(found.files) == ["run.yaml"]
    assert f"SECRET     sub/{name} stays here (by its name)" in describe(found, {}, [], "")
    assert "secret" in (found.why_not(f"sub/{name}") or "")


@pytest.mark.parametrize("name", [".env.example", "id_ed25519.pub", "environment.py", "monkey.py", "tokens.py", "env"])
def test_names_that_only_resemble_a_secrets_ship(name: str) -> None:
    assert secret_name(Path(name)) is None


def test_folders_with_credentials_stay_whole(tmp_path: Path) -> None:
    found = survey(lay(tmp_path, "run.yaml", ".aws/config", "x/.ssh/known_hosts"))
    assert list(found.files) == ["run.yaml"] and set(found.secrets) == {".aws/", "x/.ssh/"}


def test_a_secret_in_a_files_text_stays(tmp_path: Path) -> None:
    lay(tmp_path, "a.py", text="key = 'AKIA" + "Q" * 16 + "'")
    lay(tmp_path, "b.py", text="k = '-----BEGIN RSA " + "PRIVATE KEY-----\nMIIEpAIBAAKCAQEAwJ0" + "a" * 20)
    lay(tmp_path, "c.yaml", text="password: correct-horse-battery")
    lay(tmp_path, "d.py", text="PATTERN = '-----BEGIN (RSA )?PRIVATE KEY-----'")
    found = survey(tmp_path, {"DB_PASSWORD": "correct-horse-battery", "SHORT_TOKEN": "key"})
    assert found.secrets == {
        "a.py": "holds an AWS access key",
        "b.py": "holds a private key",
        "c.yaml": "holds the value of DB_PASSWORD",
    }
    assert list(found.files) == ["d.py"]


def test_this_repository_ships_whole() -> None:
    found = survey(Path(__file__).resolve().parents[2])
    assert not found.secrets
    assert {"cluster/cli.py", "examples/quickstart.yaml", "constraints.txt"} <= set(found.files)


def test_links_that_lead_out_stay(tmp_path: Path) -> None:
    outside = lay(tmp_path / "outside", "secret.txt")
    root = lay(tmp_path / "project", "run.yaml")
    (root / "file").symlink_to(outside / "secret.txt")
    (root / "folder").symlink_to(outside)
    (root / "gone").symlink_to(root / "nothing")
    (root / "own").symlink_to(root / "run.yaml")
    found = survey(root)
    assert list(found.files) == ["own", "run.yaml"]
    assert found.left_out == {
        "file": "a link to another place",
        "folder/": "a link to another place",
        "gone": "a link to nothing",
    }


def test_the_same_files_make_the_same_package(tree: Path, tmp_path: Path) -> None:
    found = survey(tree)
    sizes = [pack(found, tmp_path / name) for name in ("1.zip", "2.zip")]
    (tree / "a" / "code.py").touch()
    pack(survey(tree), tmp_path / "3.zip")
    assert sizes[0] == sizes[1] == (tmp_path / "1.zip").stat().st_size
    assert len({(tmp_path / f"{n}.zip").read_bytes() for n in (1, 2, 3)}) == 1
    with zipfile.ZipFile(tmp_path / "1.zip") as package:
        assert package.namelist() == list(found.files) and package.read("a/code.py") == b"x\n"


def test_more_than_a_cluster_takes_lists_the_largest_files(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tree / "data" / "small.jsonl").write_bytes(random.Random(0).randbytes(10_240))
    monkeypatch.setattr(module, "CAP_BYTES", 1500)
    with pytest.raises(InputError, match=r"compressed, a cluster takes at most 1.5 kB") as caught:
        pack(survey(tree), tree.parent / "out.zip")
    listed = str(caught.value).splitlines()[1:]
    assert listed[0].split() == ["10.2", "kB", "data/small.jsonl"] and len(listed) == 8
    monkeypatch.setattr(module, "CAP_BYTES", 100)
    with pytest.raises(InputError, match="before compression"):
        pack(survey(tree), tree.parent / "out.zip")


def test_no_folder_is_one_message(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is no folder"):
        survey(tmp_path / "none")
