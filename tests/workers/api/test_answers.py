"""Answers on disk: found again by the content of their request, whatever the order and whatever crashed."""

import asyncio
from pathlib import Path

import pytest

from storage.errors import InputError, StorageError
from storage.object_store import Store
from workers.api.answers import PREFIX, Answer, AnswerStore, request_key
from workers.api.prices import Usage
from workers.api.reply import Reply, Request


def request(text: str, **settings: object) -> Request:
    body = {"model": "m", "messages": [{"role": "user", "content": text}], "max_tokens": 9, **settings}
    return Request("/chat/completions", body, 9, 9)


def reply(text: str) -> Reply:
    return Reply(text, "because", "stop", Usage(3, 4, 1, 2), {"content": []}, None)


def test_the_key_is_the_content_alone() -> None:
    key = request_key(request("a", temperature=1.0), "http://x")
    turned = Request("/chat/completions", dict(reversed(request("a", temperature=1.0).body.items())), 99, 9)
    assert key == request_key(turned, "http://x")
    others = [
        request_key(request("b", temperature=1.0), "http://x"),
        request_key(request("a", temperature=0.9), "http://x"),
        request_key(request("a", temperature=1.0), "http://y"),
        request_key(request("a", temperature=1.0), "http://x", 1),
    ]  # fmt: skip
    assert len({key, *others}) == 5


def test_many_at_once_share_an_object_and_are_all_found_again(tmp_path: Path) -> None:
    store = Store(tmp_path)
    keys = [request_key(request(str(n)), "e") for n in range(200)]

    async def work() -> None:
        answers = AnswerStore(store)
        await asyncio.gather(*(answers.put(key, Answer(reply(f"t\ud800{n}"))) for n, key in enumerate(keys[:-1])))
        await answers.put(keys[-1], Answer(None, "flagged"))
        # On disk already when `put` returns, in the eyes of another process:
        assert len(AnswerStore(store)) == 200

    asyncio.run(work())
    assert len(store.list(PREFIX)) <= 4
    again = AnswerStore(store)
    assert all(again.get(key) == Answer(reply(f"t\ud800{n}")) for n, key in enumerate(keys[:-1]))
    assert again.get(keys[-1]) == Answer(None, "flagged")
    assert again.get(b"0" * 16) is None


def test_a_full_disk_is_told_to_who_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = AnswerStore(Store(tmp_path))

    def fail(*_: object) -> None:
        raise StorageError("disk full")

    monkeypatch.setattr(Store, "write", fail)

    async def work() -> None:
        for _ in range(2):
            with pytest.raises(StorageError, match="disk full"):
                await answers.put(b"k" * 16, Answer(reply("x")))

    asyncio.run(work())
    assert len(answers) == 0


def test_a_damaged_segment_is_named(tmp_path: Path) -> None:
    store = Store(tmp_path)
    asyncio.run(AnswerStore(store).put(b"k" * 16, Answer(reply("x"))))
    (name,) = store.list(PREFIX)
    store.write(name, store.read(name)[:-9])
    with pytest.raises(InputError, match=r"damaged .*delete it: only its answers"):
        AnswerStore(store)
