"""A frozen teacher in training: what it hears, over micro-batches and ranks, on resuming."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from flap_fast.checks import ConfigError
from flap_fast.config import Config
from flap_fast.model.model_folder import load_model, load_weights, model_folder, save_model
from flap_fast.model.two_towers import TwoTowers
from flap_fast.ranks import Ranks
from flap_fast.tools.profile.measure import profile
from flap_fast.tools.profile.plan import Machine, plan
from flap_fast.training import loop
from flap_fast.training.engine import DeepSpeedEngine, PlainEngine
from flap_fast.training.loop import train
from flap_fast.training.step import Gradients
from flap_fast.training.teacher import Teacher, check_teacher
from flap_kernels.soft_infonce import soft_infonce_reference
from tests.ranks import on_ranks
from tests.tiny import HTSAT, tiny
from tests.training.stopping import train_stopped_after
from tests.training.test_negatives import ONLY
from tests.training.test_pairs import rows, small
from tests.training.test_step import assert_same, batches, gradient_of, settings


def write_teacher(folder: Path, *overrides: str) -> Path:
    """A wider model than the student, with dropout and a decoder of its own."""
    own = ("audio.depth=1", "audio.width=48", "audio.heads=3", "joint.width=24", "text.pool=mean")
    own += ("text.dropout=0.3", "audio.drop_path=0.3", "loss.recon.weight=1", "decoder.width=16")
    torch.manual_seed(5)
    config = tiny(*own, *overrides)
    model = TwoTowers(config)
    save_model(folder, config, model, model.state_dict())
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_teacher(tmp_path_factory.mktemp("teacher") / "model")


def distilled(folder: Path, *overrides: str) -> Config:
    asked = ("loss.distill.weight=0.7", f"loss.distill.teacher={folder}", "loss.distill.scale=20")
    return settings(*asked, *overrides, clips=32)


def run(config: Config, ranks: Ranks, engine: type = PlainEngine) -> Any:
    """Totals of two steps, the gradients of the first, and what the models gave there."""
    torch.manual_seed(0)
    running = engine(config, TwoTowers(config), ranks)
    gradients = Gradients(config, ranks, running, 2, 1, None, Teacher(config, ranks))
    stream = batches(config, ranks, 2, gradients.reads)
    totals, first, given = [], None, None
    for step in (1, 2):
        outputs, terms = gradients(step, stream)
        totals.append(ranks.mean(terms["total"]).item())
        named = running.module.named_parameters()
        first = first or {name: gradient_of(p) for name, p in named if p.requires_grad}
        given = given or outputs
        running.step(1e-3)
    return totals, first, given


@pytest.fixture(scope="module")
def whole(folder: Path) -> Any:
    return run(distilled(folder), Ranks())


def test_the_loss_is_that_of_the_teachers_embeddings_of_the_whole_unmasked_clips(folder: Path):
    config = distilled(folder, *ONLY, "loss.contrastive.weight=0")
    (total, *_), _, outputs = run(config, Ranks())
    model, _ = load_model(folder)
    batch = next(batches(config, Ranks(), 1))
    assert isinstance(batch.media, torch.Tensor)
    with torch.no_grad():
        heard = model.embed_media(batch.media)
        read = model.embed_text(batch.ids[:32], batch.attention_mask[:32])
    assert outputs["teacher_media"].equal(heard)
    torch.testing.assert_close(outputs["teacher_text"], read)
    media, text, scale = (outputs[name].double() for name in ("media", "text", "scale"))
    teacher = heard.double(), read.double(), torch.tensor(20.0)
    expected = soft_infonce_reference(media, text, scale, *teacher)
    assert total == pytest.approx(0.7 * expected.item(), rel=1e-5)


def test_without_a_scale_the_teachers_own_is_taken(folder: Path):
    own = Teacher(distilled(folder, "loss.distill.scale=null"), Ranks())
    given = own(next(batches(distilled(folder), Ranks(), 1)))
    assert given["teacher_scale"].item() == pytest.approx(1 / 0.07)
    assert not own.model.training
    assert not any(p.requires_grad for p in own.model.parameters())


@pytest.mark.parametrize("replay", ["keep", "decode"])
def test_micro_batches_give_the_gradients_of_one_pass_and_the_teacher_runs_once(
    replay: str, folder: Path, whole: Any, monkeypatch: pytest.MonkeyPatch
):
    calls: list[int] = []
    real = Teacher.__call__

    def counted(self: Teacher, batch: Any):
        calls.append(len(batch.clips))
        return real(self, batch)

    monkeypatch.setattr(Teacher, "__call__", counted)
    found = run(distilled(folder, "train.micro_batch=8", f"train.replay={replay}"), Ranks())
    assert_same(found, whole)
    assert calls == [8] * 4 * 2
    torch.testing.assert_close(found[2]["teacher_media"], whole[2]["teacher_media"])


def of_each_stage(folder: Path) -> list[Any]:
    ranks = Ranks(rank=dist.get_rank(), world=dist.get_world_size(), launched=True)
    stages = ("train.zero_stage=0", "train.zero_stage=2", "train.zero_stage=3")
    configs = [distilled(folder, stage, "train.micro_batch=8") for stage in stages]
    return [run(config, ranks, DeepSpeedEngine)[:2] for config in configs]


def test_ranks_have_the_teachers_probabilities_of_the_whole_batch(folder: Path, whole: Any):
    pytest.importorskip("deepspeed")
    for found in on_ranks(2, of_each_stage, folder, timeout_s=280):
        assert len(found) == 3
        for stage in found:
            assert_same(stage, whole)


OTHER_TEACHER = "loss.distill.teacher must be the one that the run started with, got 'other"


def test_a_distilled_run_resumes_bit_for_bit_and_saves_the_student_alone(
    folder: Path, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    own = ("loss.distill.weight=1", f"loss.distill.teacher={folder}", "train.micro_batch=4")
    own += ("text.freeze=true", "optim.lr=1e-2")
    whole = small(prepared, tmp_path, "whole", *own)
    train(whole)
    logged = rows(whole)
    assert all(row["distill"] > 0 for row in logged)

    halted = small(prepared, tmp_path, "halted", *own)
    train_stopped_after(2, halted)
    state = halted.run_folder / "checkpoints/step-000002/state.json"
    written = json.loads(state.read_text())
    with monkeypatch.context() as patch:
        patch.setattr("flap_fast.training.setup.checksum", lambda _: written["teacher"] + 1)
        with pytest.raises(ConfigError, match=OTHER_TEACHER):
            train(halted, resume=True)
    train(halted, resume=True)
    assert rows(halted) == logged
    folders = [model_folder(config.run_folder) for config in (whole, halted)]
    one, other = (load_weights(found) for found in folders)
    assert one.keys() == TwoTowers(tiny()).state_dict().keys()
    assert all(one[name].equal(other[name]) for name in one)


def test_clips_of_any_length_are_heard_as_the_student_hears_them(prepared: Path, tmp_path: Path):
    long = ("audio.length=variable", "audio.max_duration_s=2")
    teacher = write_teacher(tmp_path / "teacher", *long)
    own = (*long, "loss.distill.weight=1", f"loss.distill.teacher={teacher}")
    config = small(prepared, tmp_path, "run", *own, "train.micro_tokens=200")
    train(config)
    assert all(row["distill"] > 0 for row in rows(config))


OTHER = [
    (("audio.mean=-4",), r"with audio\.mean = -4\.0 \(here -4\.26"),
    (("audio.mel_bins=64",), r"with audio\.mel_bins = 64 \(here 128\)$"),
    (
        ("audio.frames=128", "text.max_tokens=40"),
        r"frames = 128 \(here 112\), text\.max_tokens = 4",
    ),
    (("audio.length=variable",), r"with audio\.length = variable \(here fixed\)"),
    (
        (*HTSAT, "audio.heads=2", "loss.recon.weight=0"),
        r"audio\.mel = clap \(here kaldi\), audio\.mel_bins = 16",
    ),
]


@pytest.mark.parametrize(("overrides", "says"), OTHER)
def test_a_teacher_of_another_front_end_is_refused_with_what_differs(
    overrides: tuple[str, ...], says: str, prepared: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    teacher = write_teacher(tmp_path / "teacher", *overrides)
    own = ("loss.distill.weight=1", f"loss.distill.teacher={teacher}")
    monkeypatch.setattr(loop, "set_up", lambda *_: pytest.fail("loaded"))
    with pytest.raises(ConfigError, match=rf"loss\.distill\.teacher must have .*{says}"):
        train(small(prepared, tmp_path, "run", *own))


def test_a_teacher_of_another_tokenizer_is_refused(roberta_folder: Path, tmp_path: Path):
    teacher = write_teacher(tmp_path / "teacher", f"text.folder={roberta_folder}")
    config = tiny("loss.distill.weight=1", f"loss.distill.teacher={teacher}")
    with pytest.raises(ConfigError, match=r"with another tokenizer \(text\.folder, text\.token"):
        check_teacher(config)
    same = f"text.folder={roberta_folder}"
    check_teacher(tiny("loss.distill.weight=1", f"loss.distill.teacher={teacher}", same))


def test_a_teacher_that_is_not_there_is_refused_in_a_plan_and_a_profile_too(tmp_path: Path):
    config = tiny("loss.distill.weight=1", f"loss.distill.teacher={tmp_path}/none")
    for use in (
        lambda: check_teacher(config),
        lambda: profile(config, synthetic=True, search=False),
        lambda: plan(config, Machine(gpus=1)),
    ):
        with pytest.raises(
            ConfigError,
            match=r"loss\.distill\.teacher must be an existing folder of a model or a run, got "
            r".*/none.; name one that",
        ):
            use()
