"""The served student, asked over real HTTP by OpenAI's own client."""

import os
import secrets
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from cluster.reaper import end_all
from tests.cluster.conftest import World

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

ROOT = Path(__file__).resolve().parents[2]
KEY = "a-key-of-the-test"


@pytest.fixture
def address(world: World) -> Iterator[str]:
    """A server of a tiny student that wants a key."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from storage.tokenizer import Tokenizer

    folder = world.folder / "student"
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    vocab_size = Tokenizer.load(world.teacher).vocab_size
    config = Qwen2Config(vocab_size=vocab_size, num_key_value_heads=1, max_position_embeddings=64, **shape)
    Qwen2ForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((world.teacher / name).read_bytes())
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mark = secrets.token_hex(8)
    environment = {**os.environ, "LECTERN_SERVE_KEY": KEY, "LECTERN_SERVE_TEST": mark, "RAY_USAGE_STATS_ENABLED": "0"}
    command = [sys.executable, str(ROOT / "examples" / "serve.py"), str(folder), "--port", str(port)]
    with (world.folder / "serve.log").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=log, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("serving"):
            break
    try:
        assert process.poll() is None, (world.folder / "serve.log").read_text()[-2000:]
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait(timeout=30)
        end_all(f"LECTERN_SERVE_TEST={mark}", 0, grace_s=3.0)


def test_completions_in_one_piece_and_streamed(address: str) -> None:
    client = openai.OpenAI(base_url=address, api_key=KEY, max_retries=0)
    assert [model.id for model in client.models.list()] == ["student"]
    ask = {"model": "student", "prompt": "the red lamp", "max_tokens": 12, "temperature": 0.0}
    whole = client.completions.create(**ask)
    assert whole.usage is not None and 1 <= whole.usage.completion_tokens <= 12
    assert whole.choices[0].finish_reason in {"length", "stop"}
    pieces = list(client.completions.create(**ask, stream=True))
    assert "".join(piece.choices[0].text for piece in pieces) == whole.choices[0].text
    assert len(pieces) > 2 and pieces[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    assert all(piece.choices[0].finish_reason is None for piece in pieces[:-1])

    drawn = {**ask, "temperature": 1.0, "seed": 7}
    assert client.completions.create(**drawn).choices[0].text == client.completions.create(**drawn).choices[0].text

    with pytest.raises(openai.BadRequestError, match="more than the student's 64 positions"):
        client.completions.create(**{**ask, "max_tokens": 64})
    with pytest.raises(openai.UnprocessableEntityError):
        client.completions.create(**ask, best_of=3)
    with pytest.raises(openai.AuthenticationError, match="LECTERN_SERVE_KEY"):
        openai.OpenAI(base_url=address, api_key="wrong", max_retries=0).completions.create(**ask)
