"""Fingerprints: equal for exchangeable rows, different for all that changes them; refusals say what differs."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from storage.config import CacheConfig
from storage.errors import IdentityError, InputError
from storage.identity import CaptureIdentity, DatasetIdentity, parameter_count, require_same, weights_digest

MakeIdentity = Callable[..., DatasetIdentity]


@pytest.fixture
def model_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder of two weight files; digests are remembered in a cache of the test's own."""
    monkeypatch.setenv("LECTERN_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "model"
    folder.mkdir()
    weights = {"a": np.arange(12, dtype=np.float32).reshape(3, 4), "scalar": np.ones((), dtype=np.float32)}
    save_file(weights, folder / "model-00001-of-00002.safetensors", metadata={"format": "pt"})
    save_file({"b": np.ones((5, 2), dtype=np.float16)}, folder / "model-00002-of-00002.safetensors")
    return folder


def test_fingerprint_is_stable(make_identity: MakeIdentity) -> None:
    identity = make_identity()
    assert identity.fingerprint == "8b3a8dd51b8c680d751f927a810636a1"
    assert DatasetIdentity.model_validate_json(identity.model_dump_json()).fingerprint == identity.fingerprint


def test_fingerprint_leaves_out_the_name_alone(make_identity: MakeIdentity) -> None:
    base = make_identity()
    assert make_identity(name="elsewhere").fingerprint == base.fingerprint
    changes: list[dict[str, Any]] = [
        {"kind": "topk"},
        {"vocab_size": 501},
        {"top_k": 7},
        {"draws": 4},
        {"draw_sets": 2},
        {"kind": "sampled"},
        {"kind": "text"},
        {"seed": 1},
        {"hidden": ["final"]},
        {"weights": "00" * 32},
        {"tokenizer": "00" * 32},
        {"chat_template": "ef" * 16},
        {"precision": "float32"},
    ]
    assert len({make_identity(**change).fingerprint for change in changes} | {base.fingerprint}) == len(changes) + 1


@pytest.mark.parametrize(
    ("change", "field", "there", "here"),
    [
        ({"weights": "00" * 32}, "teacher.weights", "ab" * 32, "00" * 32),
        ({"tokenizer": "00" * 32}, "tokenizer.digest", "cd" * 32, "00" * 32),
        ({"chat_template": "ef"}, "chat_template", None, "ef"),
        ({"precision": "float32"}, "precision", "bfloat16", "float32"),
        ({"top_k": 7}, "capture.top_k", 6, 7),
        ({"kind": "topk"}, "capture.kind", "hybrid", "topk"),
    ],
)
def test_mismatch_names_both_sides_and_the_first_field(
    make_identity: MakeIdentity, change: dict[str, Any], field: str, there: Any, here: Any
) -> None:
    found, expected = make_identity(name="old-teacher"), make_identity(name="new-teacher", **change)
    with pytest.raises(IdentityError) as caught:
        require_same(expected, found, "runs/cache")
    message = str(caught.value)
    assert f"runs/cache was captured with another identity: {field} is {there!r} there, {here!r} here" in message
    for text in ("old-teacher", "new-teacher", found.fingerprint, expected.fingerprint, "another cache.url"):
        assert text in message
    assert caught.value.exit_code == 2


def test_equal_identities_pass(make_identity: MakeIdentity) -> None:
    require_same(make_identity(), make_identity(name="moved/folder"), "here")


def test_capture_identity_keeps_what_applies() -> None:
    config = {"url": "x", "top_k": 9, "draws": 3, "seed": 5, "hidden_dtype": "bfloat16"}
    topk = CaptureIdentity.of(CacheConfig.model_validate(config | {"kind": "topk"}))
    assert topk.model_dump() == {
        "kind": "topk",
        "top_k": 9,
        "draws": None,
        "seed": None,
        "hidden": [],
        "hidden_dtype": None,
    }
    dense = CaptureIdentity.of(CacheConfig.model_validate(config | {"kind": "dense", "hidden": ["b", "a", "b"]}))
    assert (dense.top_k, dense.hidden, dense.hidden_dtype) == (None, ["a", "b"], "bfloat16")
    hybrid = CaptureIdentity.of(CacheConfig.model_validate(config | {"kind": "hybrid"}))
    assert (hybrid.top_k, hybrid.draws, hybrid.draw_sets, hybrid.seed) == (9, 3, 1, 5)
    sampled = CaptureIdentity.of(CacheConfig.model_validate(config | {"kind": "sampled", "draw_sets": 2}))
    assert (sampled.top_k, sampled.draws, sampled.draw_sets, sampled.seed) == (None, 3, 2, 5)
    text = CaptureIdentity.of(CacheConfig.model_validate(config | {"kind": "text", "draw_sets": 2}))
    assert (text.top_k, text.draws, text.draw_sets, text.seed) == (None, None, 1, None)


def test_one_set_of_draws_is_left_out_of_the_json(make_identity: MakeIdentity) -> None:
    assert "draw_sets" not in make_identity().model_dump_json()
    assert make_identity(draw_sets=3).model_dump()["capture"]["draw_sets"] == 3


@pytest.mark.parametrize(
    "fields", [{"kind": "topk"}, {"kind": "topk", "top_k": 3, "draws": 2}, {"kind": "dense", "seed": 0}]
)
def test_capture_identity_refuses_what_does_not_apply(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"capture\.\w+ must be (set|null) for kind"):
        CaptureIdentity.model_validate(fields)


def test_weights_digest_follows_content_and_names(model_folder: Path) -> None:
    first = weights_digest(model_folder)
    assert len(first) == 64
    assert weights_digest(model_folder) == first
    file = model_folder / "model-00002-of-00002.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    changed = weights_digest(model_folder)
    assert changed != first
    file.rename(model_folder / "model-00003-of-00003.safetensors")
    assert weights_digest(model_folder) not in {first, changed}


def test_weights_digest_is_remembered(model_folder: Path, tmp_path: Path) -> None:
    weights_digest(model_folder)
    (memo,) = (tmp_path / "cache" / "digests").iterdir()
    fields = json.loads(memo.read_text())
    memo.write_text(json.dumps(fields | {"digest": "remembered"}))
    assert weights_digest(model_folder) == "remembered"


def test_weights_digest_is_the_same_wherever_the_folder_lies(model_folder: Path) -> None:
    first = weights_digest(model_folder)
    assert weights_digest(model_folder.rename(model_folder.parent / "moved")) == first


def test_parameters_are_counted_from_headers(model_folder: Path) -> None:
    assert parameter_count(model_folder) == 12 + 1 + 10


def test_folder_without_safetensors_is_refused(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    for call in (weights_digest, parameter_count):
        with pytest.raises(InputError, match=r"holds no \*\.safetensors file"):
            call(tmp_path)


@pytest.mark.parametrize("raw", [b"", b"\xff" * 40, (2).to_bytes(8, "little") + b"{"])
def test_broken_safetensors_is_refused(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(raw)
    with pytest.raises(InputError, match="is not a readable safetensors file"):
        parameter_count(tmp_path)
