"""Losses across tokenizers against float64, in the whole module, and as refusals that name what fits."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from storage.errors import InputError
from storage.heads import Head
from storage.identity import TokenizerIdentity
from storage.parts import Part
from storage.tokenizer import Tokenizer
from tests.storage.tiny_tokenizers import write_tokenizer
from tests.trainer.tiny import QWEN2, WORDS, TinyRun, make_run, teacher_logits, train_config
from trainer.alignment import Aligner
from trainer.batches import make_batch
from trainer.config import StudentConfig
from trainer.curriculum import planned_order
from trainer.curriculum_config import CurriculumConfig
from trainer.evaluation import evaluate_model, evaluate_teacher
from trainer.feed import batch_of, step_loader
from trainer.loss_config import LossConfig
from trainer.losses import FullTeacher
from trainer.losses.across import AcrossTerms, across_loss, alm, label_logprob, sorted_distance
from trainer.model import DistilModel, predictor_logits
from trainer.served import require_same_tokens, require_served
from trainer.student import aligner_of, build_student, resolve_student, with_vocabulary

OWN_CORPUS = [" ".join(WORDS[::-1])] * 20


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    return make_run(tmp_path_factory.mktemp("run"), kind="dense", documents=12)


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("own") / "t", OWN_CORPUS, merges=30)


def aligner(run: TinyRun, own: Path) -> Aligner:
    return Aligner(Tokenizer.load(run.tokenizer_folder), Tokenizer.load(own))


def part_of(run: TinyRun, count: int = 4) -> Part:
    (part,) = run.union.parts(run.dataset.catalog.sample_ids[:count])
    return part


def teacher_logprob(part: Part, vocab_size: int) -> torch.Tensor:
    """What the made-up teacher says of each supervised token over its whole vocabulary, as it was stored."""
    logits = torch.from_numpy(teacher_logits(part.samples, vocab_size))
    return logits.log_softmax(1)


def by_hand(
    run: TinyRun, part: Part, across: Any, logprob: torch.Tensor, label: torch.Tensor, kind: str
) -> torch.Tensor:
    """The divergence, chunk by chunk and pair by pair, in float64."""
    theirs = teacher_logprob(part, run.identity.tokenizer.vocab_size)
    total = torch.zeros((), dtype=torch.float64)
    if kind == "uld":
        for i, j in across.pairs.tolist():
            t, s = (one.exp().sort(descending=True).values for one in (theirs[i], logprob[j]))
            width = max(len(t), len(s))
            t, s = (torch.nn.functional.pad(one, (0, width - len(one))) for one in (t, s))
            total = total + (t - s).abs().sum()
        return total
    said = theirs.gather(1, across.teacher.label[:, None])[:, 0]
    mine = logprob.gather(1, label[:, None])[:, 0]
    for chunk in range(across.num_chunks):
        f, g = (
            (values[numbers == chunk].sum() / 100).exp()
            for values, numbers in ((said, across.teacher_chunk), (mine, across.student_chunk))
        )
        total = total + 100 * (f * (f / g).log() + (1 - f) * ((1 - f) / (1 - g)).log())
    return total


@pytest.mark.parametrize("kind", ["alm", "uld"])
@pytest.mark.parametrize("fused", [True, False])
def test_value_and_gradient_are_those_of_float64(run: TinyRun, own: Path, kind: Any, fused: bool) -> None:
    part = part_of(run)
    batch = batch_of([part], aligner=aligner(run, own))
    assert batch.across is not None and batch.across.num_chunks > 50 < len(batch.across.pairs)
    torch.manual_seed(0)
    vocabulary = Tokenizer.load(own).vocab_size
    states, weight = torch.randn(batch.num_supervised, 8), torch.randn(vocabulary, 8)
    bias = torch.randn(vocabulary)
    leaves = [one.requires_grad_() for one in (states, weight, bias)]
    terms = AcrossTerms(0.3, 0.7, kind, 100.0)
    scored, head = (states, (weight, bias)) if fused else (torch.nn.functional.linear(*leaves), None)
    total, each = across_loss(scored, head, batch.targets.label, batch.across, terms)
    total.backward()
    doubles = [one.detach().double().requires_grad_() for one in leaves]
    logprob = torch.nn.functional.linear(*doubles).log_softmax(1)
    hard = -logprob.gather(1, batch.targets.label[:, None]).sum()
    soft = by_hand(run, part, batch.across, logprob, batch.targets.label, kind)
    (0.3 * hard + 0.7 * soft).backward()
    torch.testing.assert_close(each.double(), torch.stack([hard, soft]).detach(), rtol=2e-3, atol=1e-2)
    for found, expected in zip(leaves, doubles, strict=True):
        difference = (found.grad.double() - expected.grad).norm() / expected.grad.norm()
        assert difference < 3e-3, difference  # stored in float16


def test_chunks_whose_likelihood_was_not_kept_are_left_out(run: TinyRun, own: Path) -> None:
    batch = batch_of([part_of(run)], aligner=aligner(run, own))
    across, torch_nan = batch.across, torch.full((batch.across.teacher.num_positions,), torch.nan)
    student = torch.full((batch.num_supervised,), -1.0, requires_grad=True)
    assert not alm(student, across, torch_nan, 100.0).any()
    said = label_logprob(across.teacher)
    whole = float(alm(student, across, said, 100.0))
    first = torch.where(across.teacher_chunk == 0, torch.nan, said)
    rest = alm(student, across, first, 100.0)
    rest.backward()
    assert 0 < float(rest) < whole
    assert not student.grad[across.student_chunk == 0].any() and student.grad.isfinite().all()
    same = torch.zeros(across.num_chunks).index_add(
        0, across.teacher_chunk.clamp_min(0), said * (across.teacher_chunk >= 0)
    )
    counts = torch.bincount(across.student_chunk.clamp_min(0), (across.student_chunk >= 0).float())
    matched = (same / counts)[across.student_chunk.clamp_min(0)]
    assert float(alm(matched, across, said, 100.0)) == pytest.approx(0.0, abs=1e-3)


def test_ranks_behind_the_kept_ones_are_one_bucket() -> None:
    student = torch.tensor([[0.1, 0.4, 0.2, 0.3], [0.25, 0.25, 0.25, 0.25]])
    teacher = torch.tensor([[0.1, 0.6, 0.0], [0.5, 0.3, 0.1]])
    found = sorted_distance(student, teacher, torch.tensor([2, 3]))
    # Sorted: .6 .1 | .3 against .4 .3 | .3; and .5 .3 .1 | .1 against .25 three times | .25.
    torch.testing.assert_close(found, torch.tensor([0.4, 0.25 + 0.05 + 0.15 + 0.15]))
    wide = sorted_distance(
        student[:, :2] / student[:, :2].sum(1, keepdim=True), torch.full((2, 5), 0.2), torch.tensor([5, 5])
    )
    torch.testing.assert_close(wide, torch.tensor([0.6 + 0.0 + 0.6, 0.3 + 0.3 + 0.6]))


def test_whole_distributions_from_states_serve_as_dense_ones_do(run: TinyRun, own: Path) -> None:
    part = part_of(run)
    vocabulary = run.identity.tokenizer.vocab_size
    logits = torch.from_numpy(teacher_logits(part.samples, vocabulary)).float()
    left, scale, right = torch.linalg.svd(logits, full_matrices=False)
    full = FullTeacher(states=left * scale, head=Head(right.T.contiguous(), None, vocabulary))
    batch = batch_of([part], aligner=aligner(run, own))
    torch.testing.assert_close(
        label_logprob(batch.across.teacher, full), label_logprob(batch.across.teacher), atol=0.02, rtol=2e-3
    )
    scored = torch.randn(batch.num_supervised, Tokenizer.load(own).vocab_size)
    for kind in ("alm", "uld"):
        terms = AcrossTerms(0.0, 1.0, kind, 100.0)
        exact, stored = (
            across_loss(scored, None, batch.targets.label, batch.across, terms, one)[0] for one in (full, None)
        )
        assert float(exact) == pytest.approx(float(stored), rel=2e-3)


@pytest.mark.parametrize("path", ["fused", "module", "model"])
@pytest.mark.parametrize("kind", ["alm", "uld"])
def test_a_student_with_its_own_tokenizer_learns_and_any_split_gives_the_same(
    run: TinyRun, own: Path, path: str, kind: str
) -> None:
    loss, lay = LossConfig(divergence=kind, kl=0.9, ce=0.1), aligner(run, own)
    config = StudentConfig(config={**QWEN2, "initializer_range": 0.2})
    found = []
    for size in (4, 2):
        module = DistilModel(build_student(with_vocabulary(config, lay), None, run.identity), loss, path, None).train()
        assert module.model.config.vocab_size == Tokenizer.load(own).vocab_size
        sums = torch.zeros(3)
        for first in range(0, 4, size):
            total, terms = module(batch_of([part_of(run).between(first, first + size)], aligner=lay))
            total.backward()
            sums += terms
        found.append((sums, torch.cat([p.grad.flatten() for p in module.parameters()])))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-4, atol=1e-4)
    assert float((found[0][1] - found[1][1]).norm() / found[0][1].norm()) < 1e-4
    optimizer = torch.optim.Adam(module.parameters(), lr=3e-3)
    batch, curve = batch_of([part_of(run)], aligner=lay), []
    for _ in range(6 if path == "fused" else 2):
        optimizer.zero_grad()
        total, terms = module(batch)
        total.backward()
        optimizer.step()
        curve.append(float(terms[1]))
    assert curve[-1] < curve[0]


def test_a_step_counts_the_tokens_that_the_student_reads(run: TinyRun, own: Path) -> None:
    lay, train = aligner(run, own), train_config()
    order = planned_order(run.samples, CurriculumConfig(), train)
    plain, across = (step_loader(run.union, order, train, 0, 1, one)(0) for one in (None, lay))
    assert plain.num_own_tokens == plain.num_tokens == across.num_tokens
    # Padding repeats token 0; the text repeats none.
    read = sum(int((batch.input_ids.diff(dim=1) != 0).sum()) + len(batch.ids) for batch in across.batches)
    assert across.num_own_tokens == pytest.approx(read, rel=0.05) and read != pytest.approx(plain.num_tokens, rel=0.1)


def test_losses_are_told_per_byte(run: TinyRun, own: Path, tmp_path: Path) -> None:
    lay, samples = aligner(run, own), run.samples
    config = with_vocabulary(StudentConfig(config={**QWEN2, "initializer_range": 0.3}), lay)
    build_student(config, None, run.identity).save_pretrained(tmp_path)
    ids = {name: samples.ids(samples.rows("heldout", name)) for name in samples.source_names}
    scores, teacher = evaluate_model(tmp_path, run.union, ids, aligner=lay), evaluate_teacher(run.union, ids, lay)
    model = build_student(config, None, run.identity).eval()
    for source, wanted in ids.items():
        (part,) = run.union.parts(wanted)
        tokenizer = Tokenizer.load(run.tokenizer_folder)
        kept = part.samples.tokens[part.samples.supervised]
        text = sum(len(tokenizer.decode([i]).encode()) for i in kept.tolist() if i != tokenizer.eos_id)
        nats = float((part.targets.teacher_nll * part.samples.num_supervised()).sum())
        assert teacher["loss"][source] == pytest.approx(nats / text)
        batch = batch_of([part], aligner=lay)
        with torch.no_grad():
            logprob = predictor_logits(model, batch).double().log_softmax(1)
        spelt = Tokenizer.load(own)
        size = sum(len(spelt.decode([i]).encode()) for i in batch.targets.label.tolist() if i != spelt.eos_id)
        expected = -float(logprob.gather(1, batch.targets.label[:, None]).sum()) / size
        assert scores["loss"][source] == pytest.approx(expected, rel=1e-4)
        assert size == pytest.approx(text, rel=0.05)
    assert scores["unit"] == teacher["unit"] == "byte"
    assert scores["kl_to_teacher"] is None and scores["top1_agreement"] is None
    gaps = []
    for part in (run.union.parts(wanted)[0] for wanted in ids.values()):
        batch = batch_of([part], aligner=lay)
        theirs = teacher_logprob(part, run.identity.tokenizer.vocab_size)
        said = theirs.gather(1, batch.across.teacher.label[:, None])[:, 0]
        with torch.no_grad():
            logprob = predictor_logits(model, batch).double().log_softmax(1)
        mine = logprob.gather(1, batch.targets.label[:, None])[:, 0]
        for n in range(batch.across.num_chunks):
            there, here = batch.across.teacher_chunk == n, batch.across.student_chunk == n
            gaps.append(abs(float(said[there].sum() - mine[here].sum())))
    assert (scores["chunks_known"], teacher["chunk_gap"]) == (1.0, 0.0)
    assert scores["chunk_gap"] == pytest.approx(np.mean(gaps), rel=1e-3)


def test_the_same_tokens_on_both_sides_give_one_chunk_for_each(run: TinyRun) -> None:
    part = part_of(run)
    lay = Aligner(*[Tokenizer.load(run.tokenizer_folder)] * 2)
    batch, plain = batch_of([part], aligner=lay), make_batch(part.samples, part.targets, "dense")
    assert torch.equal(batch.input_ids, plain.input_ids) and torch.equal(batch.predictor, plain.predictor)
    assert torch.equal(batch.targets.label, plain.targets.label)
    assert (
        batch.across.teacher_chunk.tolist() == batch.across.student_chunk.tolist() == list(range(len(plain.predictor)))
    )


def test_what_does_not_fit_is_refused_and_what_does_is_named(run: TinyRun, own: Path) -> None:
    theirs = run.identity.tokenizer
    mine = TokenizerIdentity(digest=Tokenizer.load(own).digest, vocab_size=10)
    with pytest.raises(
        InputError, match=r"forward_kl needs a student of the same one; set train\.loss\.divergence to alm or uld"
    ):
        require_same_tokens(LossConfig(), "student x", mine, theirs)
    student = StudentConfig(config=QWEN2, tokenizer=str(own))
    with pytest.raises(InputError, match="to alm or uld"):
        resolve_student(student, run.identity, LossConfig())
    resolved = resolve_student(student, run.identity, LossConfig(divergence="alm"))
    assert resolved[0] is None and resolved[1] is not None and resolved[1].digest == mine.digest
    assert aligner_of(student, resolved, run.identity, run.tokenizer_folder, LossConfig(kl=0, ce=1)) is not None
    plain = StudentConfig(config=QWEN2)
    assert aligner_of(plain, (None, None), run.identity, run.tokenizer_folder, LossConfig()) is None
    with pytest.raises(InputError, match="hidden, attention and relation compare position by position"):
        require_same_tokens(LossConfig(kl=0, ce=1, hidden=1, hidden_map={"final": "final"}), "x", mine, theirs)
    with pytest.raises(ValidationError, match=r"train\.loss\.relation compares position by position"):
        LossConfig(divergence="uld", relation=1.0, relation_map={"final": "final"})
    with pytest.raises(ValidationError, match=r"temperature has no meaning for alm"):
        LossConfig(divergence="alm", temperature=2.0)
    capture = run.identity.capture
    require_served(LossConfig(divergence="uld"), capture)
    with pytest.raises(
        InputError, match=r"uld needs targets of kind topk, dense, not hybrid; set train\.loss\.divergence"
    ):
        require_served(LossConfig(divergence="uld"), capture.model_copy(update={"kind": "hybrid"}))
    with pytest.raises(InputError, match="alm needs targets of kind topk, hybrid, dense, not sampled"):
        require_served(LossConfig(divergence="alm"), capture.model_copy(update={"kind": "sampled"}))


def test_tokens_whose_entry_was_not_kept_have_no_likelihood(run: TinyRun, own: Path) -> None:
    targets = batch_of([part_of(run)], aligner=aligner(run, own)).across.teacher
    kept = np.flatnonzero(targets.id.numpy() % 3 != 0)
    row = targets.rows()[torch.from_numpy(kept)]
    offsets = torch.cat(
        [torch.zeros(1, dtype=torch.int64), torch.bincount(row, minlength=targets.num_positions).cumsum(0)]
    )
    some = replace(
        targets,
        id=targets.id[kept],
        logprob=targets.logprob[kept],
        estimate=targets.estimate[kept],
        entry_offsets=offsets,
    )
    whole, part = label_logprob(targets), label_logprob(some)
    gone = targets.label % 3 == 0
    assert part[gone].isnan().all() and torch.equal(part[~gone], whole[~gone]) and whole.isfinite().all()
