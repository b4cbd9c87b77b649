"""What of a folder ships to a cluster, and what stays: decided before anything is sent, and shown.

The rules are Ray's own, so that `ray job submit --working-dir .` ships the same: `.gitignore` and `.rayignore` of every
folder count for all below it, `.git`, `.venv`, `venv` and `__pycache__` never ship. On top of them come secrets, and
links that lead out of the folder.
"""

import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath

from pathspec import GitIgnoreSpec

from cluster.figures import size
from cluster.submit.secret_files import MAX_LOOKED_BYTES, secret_content, secret_name
from storage.errors import InputError

CAP_BYTES = 512 << 20
"""Ray takes no larger package: its limit for one message."""

NEVER = "never ships"
_NEVER_NAMES = ("__pycache__", ".git", ".venv", "venv")
_IGNORE_FILES = (".gitignore", ".rayignore")
_LISTED = 10
_EPOCH = (1980, 1, 1, 0, 0, 0)

_Rule = tuple[Path, str, GitIgnoreSpec]


@dataclass(frozen=True)
class Shipment:
    """The files of `folder` that ship, and what stays there."""

    folder: Path
    files: dict[str, int] = field(default_factory=dict)
    """Relative path with forward slashes → bytes, sorted."""
    left_out: dict[str, str] = field(default_factory=dict)
    """What stays (folders with a slash at their end) → why."""
    secrets: dict[str, str] = field(default_factory=dict)
    """What stays because it looks secret → why it does."""

    @property
    def num_bytes(self) -> int:
        """Bytes before compression."""
        return sum(self.files.values())

    def largest(self, number: int = _LISTED) -> list[tuple[str, int]]:
        """Return the largest files with their bytes."""
        return sorted(self.files.items(), key=lambda item: (-item[1], item[0]))[:number]

    def why_not(self, path: str) -> str | None:
        """Return why a relative path does not ship, or None when it does."""
        if path in self.files:
            return None
        stays = self.left_out | {name: f"a secret {why}" for name, why in self.secrets.items()}
        parents = [f"{parent.as_posix()}/" for parent in PurePath(path).parents]
        return next((stays[name] for name in (path, f"{path}/", *parents) if name in stays), "there is no such file")


def survey(folder: Path, secret_values: Mapping[str, str] | None = None) -> Shipment:
    """Return what of a folder ships.

    Args:
        folder: the working directory.
        secret_values: variables whose values make a file that holds one a secret.

    Raises:
        InputError: it is no folder, or cannot be read.
    """
    if not folder.is_dir():
        raise InputError(f"--working-dir {folder} is no folder; name the one that holds the config and its data")
    found = Shipment(folder.resolve())
    try:
        _walk(found.folder, found, [], secret_values or {})
    except OSError as error:
        raise InputError(f"{error.filename} cannot be read: {error.strerror}; name it in .rayignore") from error
    return found


def pack(shipment: Shipment, target: Path) -> int:
    """Write the files into a ZIP archive and return its bytes; the same files give the same bytes.

    Raises InputError, with the largest files, when it is more than a cluster takes.
    """
    if shipment.num_bytes > 20 * CAP_BYTES:
        raise _too_large(shipment, f"{size(shipment.num_bytes)} before compression")
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in shipment.files:
            path = shipment.folder / name
            entry = zipfile.ZipInfo(name, _EPOCH)
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.external_attr = (path.stat().st_mode & 0o777) << 16
            with path.open("rb") as source, archive.open(entry, "w", force_zip64=True) as copy:
                while block := source.read(1 << 20):
                    copy.write(block)
    packed = target.stat().st_size
    if packed > CAP_BYTES:
        raise _too_large(shipment, f"{size(packed)} compressed")
    return packed


def _too_large(shipment: Shipment, much: str) -> InputError:
    listed = "".join(f"\n  {size(num_bytes):>9}  {name}" for name, num_bytes in shipment.largest())
    return InputError(
        f"{shipment.folder} ships {much}, a cluster takes at most {size(CAP_BYTES)}. Name what the run does not need "
        f"in .rayignore, and put data and models on an object store. The largest files:{listed}"
    )


def _walk(folder: Path, found: Shipment, rules: Sequence[_Rule], values: Mapping[str, str]) -> None:
    rules = [*rules, *_rules(folder)]
    for path in sorted(folder.iterdir()):
        name = path.relative_to(found.folder).as_posix()
        shown = f"{name}/" if path.is_dir() else name
        if (why := _stays(path, found.folder, rules)) is not None:
            found.left_out[shown] = why
        elif (why := secret_name(PurePath(name))) is not None:
            found.secrets[shown] = why
        elif path.is_dir():
            _walk(path, found, rules, values)
        elif path.is_file():
            num_bytes = path.stat().st_size
            what = secret_content(path.read_bytes(), values) if num_bytes <= MAX_LOOKED_BYTES else None
            if what is None:
                found.files[name] = num_bytes
            else:
                found.secrets[name] = f"holds {what}"


def _rules(folder: Path) -> list[_Rule]:
    return [
        (folder, name, GitIgnoreSpec.from_lines((folder / name).read_text(encoding="utf-8").splitlines()))
        for name in _IGNORE_FILES
        if (folder / name).is_file()
    ]


def _stays(path: Path, root: Path, rules: Sequence[_Rule]) -> str | None:
    """Why a path does not ship by rule."""
    if path.name in _NEVER_NAMES:
        return NEVER
    if path.is_symlink():
        if not path.exists():
            return "a link to nothing"
        if path.is_dir() or not path.resolve().is_relative_to(root):
            return "a link to another place"
    for folder, name, spec in rules:
        # A pattern with a slash at its end means folders alone, which the name must tell.
        tried = path.relative_to(folder).as_posix() + ("/" if path.is_dir() else "")
        if spec.match_file(tried):
            place = "" if folder == root else f"{folder.relative_to(root).as_posix()}/"
            return f"{place}{name}"
    return None
