"""Two ranks take the step of one process on the same tokens, and a rank that fails is told."""

import os

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from rank_stages import DOCUMENTS, OneStep, batch_of, plain_sgd, tiny_gpt2, tiny_sharer
from rich.console import Console
from sharded_trainers import Sharing

from stillhouse.errors import TrainingDiverged, UserError
from stillhouse.families.sequence.module import SequenceDistiller
from stillhouse.families.sequence.sft import sft
from stillhouse.stages import ranks
from stillhouse.stages.stage import StageContext
from stillhouse.tracking.tracker import FileTracker

pytestmark = pytest.mark.filterwarnings("ignore:.*in distributed setting")


@pytest.fixture
def run(tmp_path):
    """A function that runs a stage as rank 0, and checks that nothing of its ranks is left."""

    def run(stage):
        output = tmp_path / "output"
        output.mkdir(exist_ok=True)
        before, threads = dict(os.environ), torch.get_num_threads()
        try:
            tracker, console = FileTracker(None), Console(quiet=True)
            result = stage(StageContext("distil", output, tmp_path, tracker, console))
        finally:
            assert not torch.distributed.is_initialized()
            seeds = {"PL_GLOBAL_SEED", "PL_SEED_WORKERS"}
            assert dict(os.environ).items() - before.items() <= {
                (name, os.environ.get(name)) for name in seeds
            }
            assert torch.get_num_threads() == threads
        return output, result.metrics

    return run


def losses_of(student, teacher, document):
    """Return KL(P_τ, Q_τ) and the cross-entropy at every position of a document, τ = 2."""
    ids, labels = batch_of(document)[:2]
    q, p = student(input_ids=ids).logits[0], teacher(input_ids=ids).logits[0].detach()
    log_q, log_p = (q / 2).log_softmax(-1), (p / 2).log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    return kl, F.cross_entropy(q, labels[0], reduction="none")


def test_step_of_two_ranks_with_accumulation_is_that_of_the_mean_over_all_tokens(run):
    student, teacher = tiny_gpt2(1), tiny_gpt2(2)
    kl, nll = zip(*(losses_of(student, teacher, d) for d in DOCUMENTS), strict=True)
    total = [0.75 * 2**2 * k + 0.25 * n for k, n in zip(kl, nll, strict=True)]

    def gradient(loss):
        grads = torch.autograd.grad(loss, list(student.parameters()), retain_graph=True)
        return torch.cat([g.flatten() for g in grads])

    expected = gradient(torch.cat(total).mean())
    mean_of_means = gradient(torch.stack([t.mean() for t in total]).mean())
    assert (mean_of_means - expected).norm() > 0.05 * expected.norm(), "the counts are too equal"
    means_of_ranks = [torch.cat(total[r::2]).mean() for r in (0, 1)]
    mean_over_ranks = gradient(torch.stack(means_of_ranks).mean())
    assert (mean_over_ranks - expected).norm() > 0.05 * expected.norm(), "the counts are too equal"

    folder, metrics = run(OneStep(devices=2))
    for rank in (0, 1):
        update = torch.load(folder / f"update_{rank}.pt")
        torch.testing.assert_close(update, expected, rtol=1e-9, atol=1e-12)
    tokens = sum(len(n) for n in nll)
    assert metrics["tokens_seen"] == tokens
    assert metrics["train_loss"] == pytest.approx(torch.cat(total).mean().item(), rel=1e-9)
    assert metrics["train_forward_kl"] == pytest.approx(torch.cat(kl).mean().item(), rel=1e-9)
    assert metrics["train_cross_entropy"] == pytest.approx(torch.cat(nll).mean().item(), rel=1e-9)
    draws = [torch.load(folder / f"draw_{rank}.pt") for rank in (0, 1)]
    assert not torch.equal(*draws), "dropout of the ranks would be the same"

    # One process over the same documents: the same step, validated after it by the same batches.
    folder, alone = run(OneStep(devices=1))
    update = torch.load(folder / "update_0.pt")
    torch.testing.assert_close(update, expected, rtol=1e-6, atol=1e-9)
    assert alone == pytest.approx(metrics, rel=1e-6)


def check_step_is_that_of_one_process(run, **settings):
    """Two ranks, of these settings, and one process that shares nothing."""
    folder, metrics = run(OneStep(devices=2, **settings))
    updates = [torch.load(folder / f"update_{rank}.pt") for rank in (0, 1)]
    assert torch.equal(*updates)
    folder, alone = run(OneStep(devices=1, student=settings["student"]))
    expected = torch.load(folder / "update_0.pt")
    assert expected.abs().max() > 0.01
    torch.testing.assert_close(updates[0], expected, rtol=1e-6, atol=1e-9)
    assert alone == pytest.approx(metrics, rel=1e-6)


def test_two_ranks_train_a_student_that_shares_attention_as_one_process_does(run):
    """A leader's query and key get the gradient of its followers on every rank."""
    check_step_is_that_of_one_process(run, student=tiny_sharer)


@pytest.mark.slow
@pytest.mark.parametrize("student", [tiny_gpt2, tiny_sharer])
@pytest.mark.parametrize("sharing", [Sharing.STUDENT, Sharing.TEACHER_TOO])
@pytest.mark.filterwarnings("ignore:DTensor random operators may not have complete support")
@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view tensor")
def test_two_ranks_that_share_weights_take_the_step_of_one_process(run, student, sharing):
    """The head lies outside of the body that is called; GPT-2's is its embeddings."""
    check_step_is_that_of_one_process(run, student=student, sharing=sharing)


def test_checkpoint_of_another_number_of_ranks_is_refused():
    module = SequenceDistiller(tiny_gpt2(1), None, sft, plain_sgd)
    module.trainer = pl.Trainer(accelerator="cpu", devices=1, logger=False, barebones=True)
    checkpoint = {"generators": [{}, {}], "global_step": 8, "units_seen": 3}
    with pytest.raises(
        UserError, match=r"step 8 was written by 2 processes, .* trainer\.devices=2"
    ):
        module.on_load_checkpoint(checkpoint)


@pytest.mark.parametrize(
    ("fault", "kind", "line"),
    [
        pytest.param(
            "diverged", TrainingDiverged, "the loss is nan at step 0$", marks=pytest.mark.slow
        ),
        pytest.param("at the start", TrainingDiverged, "it never began$", marks=pytest.mark.slow),
        pytest.param("killed", UserError, r"signal 9 \(SIGKILL\)", marks=pytest.mark.slow),
        pytest.param(
            "a fault of ours",
            ranks.RankError,
            r"Traceback.*rank_stages\.py.*ZeroDivisionError",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_failure_of_another_rank_is_told_on_rank_zero(run, fault, kind, line):
    with pytest.raises(kind, match=f"(?s)rank 1 of 2 in the stage distil.*{line}"):
        run(OneStep(fault=fault))
