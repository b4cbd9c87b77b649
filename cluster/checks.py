"""What can be known to be wrong before anything is spent; imports no torch."""

import json
from pathlib import Path

from cluster.config import RunConfig
from cluster.rundir import RunDir
from storage.config import DataConfig
from storage.errors import InputError
from storage.identity import DatasetIdentity, TokenizerIdentity, require_same
from storage.info import INFO_KEY, DatasetInfo, read_info
from storage.inputs import resolve_inputs
from storage.object_store import Store
from storage.projection import with_projection
from storage.sample_set import SampleSet
from storage.token_bytes import token_bytes
from storage.tokenizer import Tokenizer
from trainer.curriculum import planned_shares
from trainer.harness import require_harness
from trainer.sampler import planned_counts
from trainer.served import require_same_tokens
from trainer.stages import consumed
from trainer.task_file import read_task
from workers.embedded import max_positions
from workers.model_folder import ModelFacts, capture_identity, check_teacher, model_facts

_POSITION_KEYS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len")


def check_places(config: RunConfig, run: RunDir) -> None:
    """Create and delete an object in the run directory and in the cache; InputError when one cannot be written."""
    run.probe()
    Store(config.cache.url).probe()


def check_student(config: RunConfig, tokenizer: Tokenizer) -> Tokenizer:
    """Check the student's tokenizer, vocabulary and positions against the teacher's tokenizer and the windows.

    A student named by hub name is checked by the trainer when it is there. Returns the student's tokenizer.
    """
    student = config.student
    if student.path is not None:
        folder = Path(student.path).expanduser()
        if not folder.is_dir():
            if student.path.startswith((".", "/", "~")) or student.path.count("/") != 1:
                raise InputError(
                    f"student.path {student.path} is no folder; name a model folder or a hub model `owner/name`"
                )
            return tokenizer
        own = _own_tokenizer(config, tokenizer)
        fields = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        _check_vocabulary(model_facts(folder).vocab_size, own, f"student.path {student.path}")
    else:
        own = _own_tokenizer(config, tokenizer)
        fields = student.config or {}
        if isinstance(fields.get("vocab_size"), int):
            _check_vocabulary(fields["vocab_size"], own, "student.config")
    positions = next((fields[key] for key in _POSITION_KEYS if isinstance(fields.get(key), int)), None)
    if positions is not None and config.data.window_tokens > positions:
        raise InputError(
            f"data.window_tokens {config.data.window_tokens} is longer than the {positions} positions of the student; "
            f"lower it to {positions} or less, or give the student more positions"
        )
    return own


def _own_tokenizer(config: RunConfig, tokenizer: Tokenizer) -> Tokenizer:
    """Return the student's tokenizer; InputError where it is not the teacher's and a loss needs it to be.

    One that is named by hub name is checked by the trainer when it is there.
    """
    name = config.student.tokenizer or config.student.path
    if name is None or not Path(name).expanduser().is_dir():
        return tokenizer
    own = Tokenizer.load(Path(name).expanduser())
    mine, theirs = TokenizerIdentity.of(own), TokenizerIdentity.of(tokenizer)
    if mine == theirs:
        return tokenizer
    for stage in config.chain():
        require_same_tokens(stage.train.loss, f"student {name}", mine, theirs)
    for one in (own, tokenizer):
        token_bytes(one)
    return own


def check_teacher_fits(config: RunConfig, folder: Path, tokenizer: Tokenizer) -> ModelFacts:
    """Check a teacher folder's positions, vocabulary and sharding; returns what its config says."""
    facts = model_facts(folder)
    check_teacher(facts, config.teacher, tokenizer, config.data.window_tokens)
    return facts


def check_future_teacher(config: RunConfig, tokenizer: Tokenizer) -> int:
    """Check the embedded teacher, which need not be trained yet, against the windows; returns its positions."""
    embedded = config.teacher.embedded
    facts = ModelFacts(
        folder=Path(),
        architecture="embedded",
        vocab_size=embedded.vocab_size,
        max_positions=max_positions(embedded),
        num_attention_heads=None,
        num_key_value_heads=None,
    )
    check_teacher(facts, config.teacher, tokenizer, config.data.window_tokens)
    return max_positions(embedded)


def check_curriculum(config: RunConfig, samples: SampleSet) -> None:
    """Check that the curricula name sources that exist, have training samples and suffice for their passes."""
    scored = config.evaluate.samples_per_source
    for stage, passes in zip(config.chain(), _passes(config, samples), strict=True):
        adaptive, most = stage.curriculum.adaptive, stage.curriculum.max_epochs
        if adaptive is not None and adaptive.samples > scored:
            raise InputError(
                f"curriculum.adaptive.samples {adaptive.samples} is more than evaluate.samples_per_source {scored}, "
                "the held-out windows that the teacher scores; raise that one"
            )
        for name, times in passes.items():
            if most is not None and times > most:
                raise InputError(
                    f"the plan of {stage.run} passes {times:.2f} times over {name!r} "
                    f"({len(samples.rows('train', name))} training samples), more than curriculum.max_epochs {most:g}; "
                    "lower its share or train.steps, or add text"
                )


def check_tasks(config: RunConfig) -> None:
    """Check the files of the tasks that the trained models are to be scored on, and what scores them."""
    require_harness(config.evaluate.lm_eval)
    for task in config.evaluate.tasks:
        read_task(task)


def source_passes(config: RunConfig, samples: SampleSet) -> dict[str, float]:
    """Return how often training passes over each source, all stages together; InputError where one cannot be met."""
    passes = _passes(config, samples)
    return {name: sum(row[name] for row in passes) for name in samples.source_names}


def _passes(config: RunConfig, samples: SampleSet) -> list[dict[str, float]]:
    """Return for each stage how often it passes over each source."""
    counts = {name: len(samples.rows("train", name)) for name in samples.source_names}
    found: list[dict[str, float]] = []
    earlier: dict[str, float] = {}
    for stage in config.chain():
        shares = planned_shares(stage.curriculum, counts, stage.train.steps, earlier)
        drawn = planned_counts(shares, stage.train.global_batch_size).sum(axis=0)
        hard = stage.curriculum.difficulty
        kept = 1.0 if hard is None else hard.keep[1] - hard.keep[0]
        sizes = [max(size * kept, 1) for size in counts.values()]
        found.append({name: float(drawn[n]) / sizes[n] for n, name in enumerate(counts)})
        earlier = consumed(stage, counts, earlier)
    return found


def check_dataset(config: RunConfig, tokenizer: Tokenizer, identity: DatasetIdentity | None) -> DatasetInfo | None:
    """Return what lies at cache.url, or None when nothing does yet; IdentityError when it is another dataset.

    Without `identity`, because the teacher is not there yet, all else that is known of it is compared.
    """
    store = Store(config.cache.url)
    if not store.exists(INFO_KEY):
        return None
    info = read_info(store)
    known = identity or DatasetIdentity(
        teacher=info.identity.teacher,
        tokenizer=TokenizerIdentity.of(tokenizer),
        chat_template=info.identity.chat_template,
        precision=config.teacher.precision,
        capture=with_projection(
            capture_identity(config.cache, config.teacher, info.identity.capture.classes), config.cache.url
        ),
    )
    require_same(known, info.identity, f"cache.url {store.shown()}")
    return info


def uses_chat_template(data: DataConfig) -> bool:
    """Tell whether any input may hold chat messages, so that the chat template decides what its tokens are."""
    return any(file.format in {"jsonl", "parquet"} for source in data.sources for file in resolve_inputs(source))


def _check_vocabulary(vocab_size: int, tokenizer: Tokenizer, what: str) -> None:
    if vocab_size < tokenizer.vocab_size:
        raise InputError(
            f"{what} has a vocabulary of {vocab_size}, its tokenizer ids up to {tokenizer.vocab_size - 1}; "
            f"the student needs at least {tokenizer.vocab_size} (leave student.config.vocab_size out to have it set)"
        )
