"""The embedded teacher: a BPE tokenizer and a small DeepSeek-V3 model made from the run's own corpora, once.

Both are kept in the cache folder under a name that is a hash of what they depend on, and are reused by every run with
the same text. They are built in a draft folder under a lock and then renamed: two runs at once build one, and a run
that is killed leaves nothing that looks finished. This module imports no torch; the training does.
"""

import fcntl
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import Any

import tokenizers

from storage.cleaning import clean_document, cleaner_of, document_digest, is_heldout
from storage.config import DataConfig
from storage.corpus import Document, read_documents
from storage.errors import StorageError
from storage.identity import cache_folder
from storage.inputs import resolve_inputs
from storage.sample_set import prepare_samples, samples_key
from storage.tokenizer import Tokenizer
from workers.config import EmbeddedTeacherConfig

Progress = Callable[[dict[str, Any]], None]

TOKENIZER_FORMAT = 1
"""Raised when the tokenizer's recipe changes, so that cached ones are not taken for it."""
TEACHER_FORMAT = 1
"""The same for the model's architecture and training."""
TOKENIZER_DOCUMENTS = 20_000
"""Documents of each source that the tokenizer is trained on, at most; the first ones."""
POSITIONS = 2048
"""Longest window that the model takes, in tokens, unless it is trained on longer ones."""
SPIN_COUNT = "2000"
"""Loops that an idle OpenMP thread spins before it sleeps. Read when torch is loaded; its default is 150 times longer,
which costs nothing on an idle machine and four fifths of the speed beside another busy process."""

END_OF_TEXT = "<|endoftext|>"
ROLES = ("system", "user", "assistant")
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|endoftext|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def ensure_tokenizer(teacher: EmbeddedTeacherConfig, data: DataConfig) -> Path:
    """Return the folder of the embedded teacher's tokenizer, trained on the training documents where it is not cached.

    Takes a few seconds the first time.

    Raises:
        InputError: the corpora cannot be read.
        StorageError: the cache folder cannot be written.
    """
    depends = {
        "format": TOKENIZER_FORMAT,
        "vocab_size": teacher.vocab_size,
        "sources": [source.model_dump(mode="json") for source in data.sources],
        "heldout_fraction": data.heldout_fraction,
        "inputs": [[file.url, file.size, file.stamp] for source in data.sources for file in resolve_inputs(source)],
    }
    target = cache_folder() / f"embedded-tokenizer-{_key(depends)}"
    return _build_once(target, lambda draft: _write_tokenizer(draft, teacher, data), None)


def ensure_teacher(teacher: EmbeddedTeacherConfig, data: DataConfig, on_progress: Progress | None = None) -> Path:
    """Return the embedded teacher's folder (weights, config, tokenizer), trained where it is not cached.

    It is trained on the training split of `data` alone, in windows of its own length, for about two minutes on two
    cores. `lectern-teacher.json` in the folder tells its recipe and its held-out loss for each source.

    Args:
        teacher: shape and length of training.
        data: the run's text; its held-out documents are not trained on.
        on_progress: gets `{stage: "teacher", step, steps, loss, tokens_per_s}`, loss in nats per token.

    Raises:
        InputError: the corpora cannot be read.
        StorageError: the cache folder cannot be written.
    """
    tokenizer_folder, tokenizer, windows, target = _plan_teacher(teacher, data)

    def build(draft: Path) -> None:
        os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)
        from workers.embedded_training import train_teacher

        scratch = draft / "samples"
        samples = prepare_samples(windows, tokenizer, str(scratch), on_progress)
        facts = train_teacher(teacher, samples, tokenizer, draft, on_progress)
        shutil.rmtree(scratch)
        for file in sorted(tokenizer_folder.iterdir()):
            shutil.copyfile(file, draft / file.name)
        (draft / "lectern-teacher.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")

    return _build_once(target, build, on_progress)


def find_teacher(teacher: EmbeddedTeacherConfig, data: DataConfig) -> Path | None:
    """Return the embedded teacher's folder where it is trained already, else None; trains at most the tokenizer."""
    target = _plan_teacher(teacher, data)[-1]
    return target if target.is_dir() else None


def max_positions(teacher: EmbeddedTeacherConfig) -> int:
    """Return the longest window that the embedded teacher takes, in tokens."""
    return max(POSITIONS, teacher.window_tokens)


def _plan_teacher(teacher: EmbeddedTeacherConfig, data: DataConfig) -> tuple[Path, Tokenizer, DataConfig, Path]:
    """Return the tokenizer's folder, the tokenizer, the data in the teacher's own windows, and the teacher's folder."""
    tokenizer_folder = ensure_tokenizer(teacher, data)
    tokenizer = Tokenizer.load(tokenizer_folder, data.chat_template)
    windows = data.model_copy(update={"window_tokens": teacher.window_tokens})
    depends = {
        "format": TEACHER_FORMAT,
        "teacher": teacher.model_dump(mode="json"),
        "samples": samples_key(windows, tokenizer),
    }
    return tokenizer_folder, tokenizer, windows, cache_folder() / f"embedded-{_key(depends)}"


def _write_tokenizer(folder: Path, teacher: EmbeddedTeacherConfig, data: DataConfig) -> None:
    """Train a byte-level BPE on the training documents and write it as transformers would."""
    specials = [END_OF_TEXT, *(f"<|{role}|>" for role in ROLES)]
    engine = tokenizers.Tokenizer(tokenizers.models.BPE())
    engine.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=teacher.vocab_size,
        special_tokens=specials,
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    engine.train_from_iterator(_training_texts(data), trainer)
    engine.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END_OF_TEXT,
        "pad_token": END_OF_TEXT,
        "additional_special_tokens": specials[1:],
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def _training_texts(data: DataConfig) -> Iterator[str]:
    """Yield the cleaned strings of each source's training documents."""
    for source in data.sources:
        clean = cleaner_of(source.clean)
        documents = read_documents(source, data.on_bad_row, Counter())
        for raw in islice(documents, TOKENIZER_DOCUMENTS):
            document = clean_document(raw, clean)
            if not is_heldout(document_digest(document), data.heldout_fraction):
                yield from _strings(document)


def _strings(document: Document) -> Iterator[str]:
    yield from (text for text in (document.text, document.prompt, document.completion) if text)
    for message in document.messages or ():
        if message.get("content"):
            yield str(message["content"])


def _key(depends: dict[str, Any]) -> str:
    canonical = json.dumps(depends, sort_keys=True).encode()
    return blake2b(canonical, digest_size=12, person=b"lectern.embedded").hexdigest()


def _build_once(target: Path, build: Callable[[Path], None], on_progress: Progress | None) -> Path:
    """Return `target`, after `build` has filled it where it does not exist; one process builds, others wait for it."""
    if target.is_dir():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(target.with_name(f"{target.name}.lock"), on_progress):
            if not target.is_dir():
                draft = target.with_name(f"{target.name}.draft")
                shutil.rmtree(draft, ignore_errors=True)
                draft.mkdir()
                build(draft)
                _flush(draft)
                draft.rename(target)
    except OSError as error:
        raise StorageError(
            f"the embedded teacher cannot be kept in {target.parent}: {error}; free some space there, or set "
            "LECTERN_CACHE to a folder that can be written"
        ) from error
    return target


@contextmanager
def _locked(path: Path, on_progress: Progress | None) -> Iterator[None]:
    """Hold an exclusive lock, which the system drops when its process ends in whatever way."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if on_progress is not None:
                on_progress({"stage": "teacher", "waiting_for": str(path)})
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _flush(folder: Path) -> None:
    """Bring a folder's files to the disk, so that a power cut cannot leave the renamed folder with empty files."""
    for path in [*folder.iterdir(), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
