"""Made-up datasets and a real S3 server on loopback."""

import logging
from collections.abc import Callable, Iterator
from typing import Any
from urllib.request import Request, urlopen
from uuid import uuid4

import fsspec
import numpy as np
import pytest
from storage_faults import FlakyFileSystem

from storage.draws import drawn_logprob
from storage.identity import (
    DRAWN_KINDS,
    HEAD_KINDS,
    CaptureIdentity,
    DatasetIdentity,
    TeacherIdentity,
    TokenizerIdentity,
)
from storage.object_store import Store
from storage.samples import Sample, SampleBatch, offsets_of
from storage.targets import TargetBatch

Unit = tuple[SampleBatch, TargetBatch]


def build_identity(
    kind: str = "hybrid", vocab_size: int = 500, hidden: list[str] | None = None, **fields: Any
) -> DatasetIdentity:
    """Return an identity; `fields` replace top_k, draws, seed, hidden_dtype, weights, …"""
    capture = {
        "kind": kind,
        "top_k": fields.get("top_k", 6) if kind in HEAD_KINDS else None,
        "draws": fields.get("draws", 5) if kind in DRAWN_KINDS else None,
        "draw_sets": fields.get("draw_sets", 1) if kind in DRAWN_KINDS else 1,
        "seed": fields.get("seed", 0) if kind in DRAWN_KINDS else None,
        "hidden": hidden or [],
        "hidden_dtype": fields.get("hidden_dtype", "float16") if hidden else None,
    }
    return DatasetIdentity(
        teacher=TeacherIdentity(
            name=fields.get("name", "teacher"),
            architecture="DeepseekV3ForCausalLM",
            weights=fields.get("weights", "ab" * 32),
            parameters=1000,
        ),
        tokenizer=TokenizerIdentity(digest=fields.get("tokenizer", "cd" * 32), vocab_size=vocab_size),
        chat_template=fields.get("chat_template"),
        precision=fields.get("precision", "bfloat16"),
        capture=CaptureIdentity.model_validate(capture),
    )


def build_samples(vocab_size: int, num_samples: int, rng: np.random.Generator, longest: int = 24) -> SampleBatch:
    """Return windows of one to four documents; some positions unsupervised."""
    samples = []
    for n in range(num_samples):
        length = int(rng.integers(2, longest + 1))
        starts = np.zeros(length, dtype=np.bool_)
        if n % 2:
            starts[1:] = rng.random(length - 1) < 0.1
        document = np.cumsum(starts).astype(np.int16)
        supervised = rng.random(length) < 0.8
        supervised[starts] = False
        supervised[0] = False
        tokens = rng.integers(0, vocab_size, length).astype(np.int32)
        samples.append(Sample(("general", "domain")[n % 2], tokens, supervised, document))
    return SampleBatch.of(samples)


def build_targets(
    samples: SampleBatch, identity: DatasetIdentity, rng: np.random.Generator, width: int = 8
) -> TargetBatch:
    """Return targets of random distributions that keep the contract."""
    if identity.capture.kind == "text":
        return text_targets(samples, identity, rng, width)
    vocab_size, capture = identity.tokenizer.vocab_size, identity.capture
    per_sample = samples.num_supervised()
    count, ids, logprobs, draws, tail = [], [], [], [], []
    for _ in range(int(per_sample.sum())):
        p = rng.dirichlet(np.full(vocab_size, 0.02)).astype(np.float64) + 1e-9
        p /= p.sum()
        order = np.argsort(-p, kind="stable")
        head = order[: vocab_size if capture.kind == "dense" else capture.top_k or 0]
        drawn = np.zeros((capture.draw_sets, vocab_size), dtype=np.int64)
        rest = p.copy()
        rest[head] = 0
        if capture.draws and rest.sum() > 0:
            drawn = rng.multinomial(capture.draws, rest / rest.sum(), size=capture.draw_sets)
        kept = np.concatenate([head, np.flatnonzero(drawn.any(0))])
        count.append(len(kept))
        ids.append(kept)
        if capture.kind == "hybrid_counts" and drawn.any():
            p = np.where(drawn.any(0), rest.sum() * drawn.sum(0) / drawn.sum(), p)
        logprobs.append(np.log(p[kept]))
        draws.append(drawn[:, kept])
        tail.append(max(0.0, 1 - p[kept].sum()))
    all_draws = np.concatenate([np.zeros((capture.draw_sets, 0)), *draws], axis=1).astype(np.uint8)
    if capture.kind == "sampled":
        logprobs = [drawn_logprob(all_draws, np.asarray(count, dtype=np.int32))]
        tail = [0.0] * len(count)
    return TargetBatch(
        offsets=offsets_of(per_sample),
        count=np.asarray(count, dtype=np.int32),
        id=np.concatenate([*ids, np.zeros(0)]).astype(np.int32),
        logprob=np.concatenate([*logprobs, np.zeros(0)]).astype(np.float16),
        draws=all_draws if capture.draws else None,
        tail_mass=np.asarray(tail, dtype=np.float16),
        teacher_nll=rng.random(len(samples)).astype(np.float32),
        teacher_entropy=rng.random(len(samples)).astype(np.float32),
        hidden=made_up_hidden(identity, len(count), rng, width),
    )


def text_targets(
    samples: SampleBatch, identity: DatasetIdentity, rng: np.random.Generator, width: int = 8
) -> TargetBatch:
    """Return targets of kind `text`: no entries."""
    positions = int(samples.num_supervised().sum())
    return TargetBatch(
        offsets=offsets_of(samples.num_supervised()),
        count=np.zeros(positions, dtype=np.int32),
        id=np.zeros(0, dtype=np.int32),
        logprob=np.zeros(0, dtype=np.float16),
        draws=None,
        tail_mass=np.ones(positions, dtype=np.float16),
        teacher_nll=rng.random(len(samples)).astype(np.float32),
        teacher_entropy=rng.random(len(samples)).astype(np.float32),
        hidden=made_up_hidden(identity, positions, rng, width),
    )


def made_up_hidden(
    identity: DatasetIdentity, positions: int, rng: np.random.Generator, width: int
) -> dict[str, np.ndarray]:
    """Return random hidden states of every layer that the identity names."""
    dtype = np.float16 if identity.capture.hidden_dtype == "float16" else np.uint16
    states = rng.normal(size=(positions, width)).astype(np.float16).view(dtype)
    return dict.fromkeys(identity.capture.hidden, states)


def build_unit(identity: DatasetIdentity, num_samples: int = 6, seed: int = 0) -> Unit:
    """Return samples and targets under an identity."""
    rng = np.random.default_rng(seed)
    samples = build_samples(identity.tokenizer.vocab_size, num_samples, rng)
    return samples, build_targets(samples, identity, rng)


def check_same_unit(left: Unit, right: Unit) -> None:
    """Assert that two units are equal value for value, dtypes included."""
    for a, b in zip(left, right, strict=True):
        for name, value in vars(a).items():
            other = getattr(b, name)
            if isinstance(value, np.ndarray):
                assert value.dtype == other.dtype, name
                np.testing.assert_array_equal(value, other, err_msg=name)
            elif name == "hidden":
                assert set(value) == set(other)
                for layer in value:
                    assert value[layer].dtype == other[layer].dtype
                    np.testing.assert_array_equal(value[layer], other[layer])
            else:
                assert value == other, name


@pytest.fixture(scope="session")
def make_identity() -> Callable[..., DatasetIdentity]:
    """Give the tests `build_identity`."""
    return build_identity


@pytest.fixture(scope="session")
def make_unit() -> Callable[..., Unit]:
    """Give the tests `build_unit`."""
    return build_unit


@pytest.fixture(scope="session")
def assert_same_unit() -> Callable[[Unit, Unit], None]:
    """Give the tests `check_same_unit`."""
    return check_same_unit


@pytest.fixture
def flaky() -> Callable[[dict[int, str]], Store]:
    """Return a maker of stores whose n-th request fails in the given way."""
    fsspec.register_implementation("flaky", FlakyFileSystem, clobber=True)

    def make(faults: dict[int, str]) -> Store:
        FlakyFileSystem.calls, FlakyFileSystem.faults = 0, faults
        return Store(f"flaky://{uuid4().hex}")

    return make


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    """Run moto's S3 server, which honours conditional writes, and name its address."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3_url(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return the URL of an empty bucket, with the environment set to reach it."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIATESTTESTTESTTEST")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test-secret-never-shown")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    bucket = f"bucket-{uuid4().hex[:12]}"
    urlopen(Request(f"{s3_endpoint}/{bucket}", method="PUT")).close()
    return f"s3://{bucket}/dataset"
