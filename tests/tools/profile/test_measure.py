"""A profile: parts that add up, memory, a ceiling, the largest micro-batch; its files."""

from __future__ import annotations

import gzip
import json
import mmap
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from typer.testing import CliRunner

from flap_fast.__main__ import app
from flap_fast.checks import ConfigError
from flap_fast.config import Config
from flap_fast.config.file import dump_config, load_config
from flap_fast.data.batch import PackedMels
from flap_fast.losses import total_loss
from flap_fast.model.two_towers import TwoTowers
from flap_fast.ranks import Ranks
from flap_fast.tools.profile import fits
from flap_fast.tools.profile import search as searching
from flap_fast.tools.profile.counts import StepCounts
from flap_fast.tools.profile.device import Memory, free_bytes, measure_ceiling, resident_bytes
from flap_fast.tools.profile.measure import profile
from flap_fast.tools.profile.memory import footprint
from flap_fast.tools.profile.parts import step_parts
from flap_fast.tools.profile.search import Attempts, search
from flap_fast.tools.profile.synthetic import (
    SyntheticLoader,
    caption_lengths,
    without_files,
)
from flap_fast.tools.profile.tables import profile_table
from flap_fast.tools.profile.timeline import (
    Timeline,
    timed_batches,
    timed_collectives,
    timed_engine,
)
from flap_fast.tools.profile.trials import Trial, largest, trials
from flap_fast.training.engine import PlainEngine
from flap_fast.training.step import Gradients
from tests.ranks import on_ranks
from tests.tiny import HTSAT, YAMNET, tiny, tiny_clip
from tests.tools.profile.live import Live
from tests.tools.profile.shipped import shipped

CPU = torch.device("cpu")
PARTS = step_parts("audio")


@pytest.fixture(scope="module")
def found(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """A profile of two steps on shards, and its folder."""
    out = tmp_path_factory.mktemp("profile")
    config = tiny(f"data.train={prepared}/train", "frontend.backend=torch", "train.global_batch=4")
    result = profile(config, steps=2, search=False, out=out)
    assert result is not None
    return result, out


def test_parts_add_up_to_the_step(found: tuple[dict[str, Any], Path]):
    result, _ = found
    assert list(result["parts_ms"]) == list(PARTS)
    assert sum(result["parts_ms"].values()) == pytest.approx(result["step_ms"])
    assert len(result["steps_ms"]) == result["steps"] == 2
    least, median, most = result["step_ms_least_median_most"]
    assert least <= median <= most
    assert median == pytest.approx(result["step_ms"])  # of two steps
    busy = {"data wait", "audio tower", "text tower", "loss", "optimizer", "other"}
    assert {part for part, ms in result["parts_ms"].items() if ms > 0} == busy


def test_speed_is_clips_over_time_and_flop_over_time(found: tuple[dict[str, Any], Path]):
    result, _ = found
    assert result["clips_per_s"] == pytest.approx(4 / result["step_ms"] * 1000)
    total = sum(part["total"] for part in result["flop"].values())
    assert result["flop_per_s"] == pytest.approx(total / result["step_ms"] * 1000)
    assert result["utilisation"] == result["flop_per_s"] / result["ceiling_flop_per_s"]
    assert 0 < result["utilisation"] < 1
    assert 0 < result["real_tokens"] < 1  # captions of several lengths, padded to the longest
    # Three quarters of a forward and backward are the activations that a step allocates at least.
    assert 0.1 < result["allocated_in_a_step_mib"] < 50


def test_of_a_frozen_text_encoder_new_captions_are_counted_and_no_flop(tmp_path: Path):
    """Synthetic captions are the same in all steps: after the warm-up none is new."""
    config = tiny("train.global_batch=4", "text.freeze=true")
    result = profile(config, steps=1, synthetic=True, search=False, out=tmp_path)
    assert result is not None
    assert result["new_captions_per_step"] == 0
    assert result["flop"]["text tower"]["forward"] == 2 * 4 * (32 * 16 + 16 * 16)  # the head's


def test_its_files_open(found: tuple[dict[str, Any], Path]):
    result, out = found
    assert json.loads((out / "profile.json").read_text()) == result
    trace = json.loads(gzip.decompress((out / "trace.json.gz").read_bytes()))
    names = {event["name"] for event in trace["traceEvents"] if "name" in event}
    ranges = {f"flap: {part}" for part in ("data wait", "audio tower", "text tower", "loss")}
    assert ranges | {"flap: optimizer", "[memory]", "aten::mm"} <= names
    assert result["files"]["memory_snapshot"].startswith("not available on a CPU")


def slow_parts(config: Config, sleeps: dict[str, float]) -> tuple[dict[str, float], int]:
    """Of a run of two steps whose modules sleep, forward and backward: the second's parts; sleeps.

    A batch sleeps when it is read.
    """
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        time.sleep(seconds)

    class Sleep(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor, seconds: float) -> torch.Tensor:
            ctx.seconds = seconds
            sleep(seconds)
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor):  # type: ignore[override]
            sleep(ctx.seconds)
            return grad, None

    engine = PlainEngine(config, TwoTowers(config), Ranks())
    for name, seconds in sleeps.items():
        if name == "batch":
            continue
        head = engine.module.get_submodule(name)
        head.register_forward_hook(lambda _, __, out, s=seconds: Sleep.apply(out, s))
    loader = SyntheticLoader(config, engine.module.text, Ranks())
    timeline = Timeline(CPU)
    with timed_engine(engine, lambda: timeline) as engine:
        gradients = Gradients(config, Ranks(), engine, 1000, 1000)
        real = loader.batches(0, 2, times=gradients.reads)
        late = (sleep(sleeps["batch"]) or batch for batch in real) if "batch" in sleeps else real
        batches = timed_batches(late, lambda: timeline)
        for step in (1, 2):
            timeline.begin_step()
            gradients(step, batches)
            engine.step(1e-4)
    timeline.end()
    assert len(timeline.steps()) == 2
    return timeline.steps()[-1], len(slept)


SLEEP_S = 0.15


def test_a_part_that_sleeps_is_the_part_that_takes_long_forward_and_backward():
    """Each of the towers in turn: the backward is told apart without a wait."""
    config = tiny("train.global_batch=2")
    audio, _ = slow_parts(config, {"audio_head.0": SLEEP_S})
    text, _ = slow_parts(config, {"text_head.0": SLEEP_S})
    for parts, part in ((audio, "audio tower"), (text, "text tower")):
        assert parts[part] >= 2 * SLEEP_S
        assert max(parts, key=lambda name: parts[name]) == part


def test_with_two_passes_each_micro_batch_has_its_waits_forwards_and_backward():
    """Two micro-batches, each two forwards and a backward of its towers, one of the decoder."""
    recon = ("loss.recon.weight=1", "decoder.width=16", "decoder.depth=1", "decoder.heads=2")
    config = tiny("train.global_batch=2", "train.micro_batch=1", *recon)
    for name, part, times in (
        ("text_head.0", "text tower", 6),
        ("decoder.norm", "decoder", 4),
        ("batch", "data wait", 4),
    ):
        parts, slept = slow_parts(config, {name: SLEEP_S})
        assert slept == 2 * times, part
        # Sleeps are at least as long as asked for, and all of them in this part: on a busy machine
        # no more can be said of times.
        assert parts[part] >= times * SLEEP_S, part
        assert parts[part] == max(parts.values()), parts


def communicating():
    """On one rank: the parts of a step whose loss meets a rank that comes late."""
    ranks = Ranks(rank=dist.get_rank(), world=dist.get_world_size())
    config = tiny("train.global_batch=4")
    torch.manual_seed(0)
    timeline = Timeline(CPU)
    engine = PlainEngine(config, TwoTowers(config), ranks)
    real = dist.all_reduce
    with timed_collectives(lambda: timeline):
        batch = next(SyntheticLoader(config, engine.module.text, ranks).batches(0, 1))
        with timed_engine(engine, lambda: timeline) as engine:
            timeline.begin_step()
            outputs = engine.model(batch.media, batch.ids, batch.attention_mask, None)
            dist.barrier()
            if ranks.rank == 1:
                time.sleep(1.0)
            engine.backward(total_loss(outputs, config)["total"])
            work = dist.all_reduce(torch.ones(1), async_op=True)
            assert work is not None
            work.wait()
            assert timeline.part == "other"
        timeline.end()
    assert dist.all_reduce is real
    return timeline.steps()[0]


def test_waiting_for_a_rank_is_communication():
    first, second = on_ranks(2, communicating)
    assert first["communication"] > 0.3
    assert second["loss"] >= 1.0  # where it sleeps


def test_a_stand_in_for_a_text_tower_that_is_not_here_is_robertas_shape():
    config = tiny("text.folder=models/nowhere")
    with without_files(config) as complete, torch.device("meta"):
        text = TwoTowers(complete, weights=False).text
    assert sum(p.numel() for p in text.parameters()) == 124_645_632  # roberta-base, with its pooler


def test_synthetic_captions_are_as_long_as_they_are_said_to_be():
    assert caption_lengths(4, 77) == [24, 17, 10, 20]
    assert caption_lengths(3, 12) == [12, 10, 8]
    config = tiny("train.global_batch=4")
    text: Any = TwoTowers(config).text
    batch = next(SyntheticLoader(config, text, Ranks()).batches(0, 1))
    assert batch.attention_mask.sum(1).tolist() == [24, 17, 10, 20]
    assert ((batch.ids == text.pad_token_id) == (batch.attention_mask == 0)).all()


_SMALL_TEXT = ("text.width=32", "text.depth=2", "text.heads=2", "joint.width=16")
_SMALL_MEDIA = {
    "vit": (
        *("audio.size=tiny", "audio.width=32", "audio.depth=2", "audio.heads=2"),
        *("audio.duration_s=1.0", "audio.frames=112"),
    ),
    "yamnet": ("audio.width=32", "audio.mel_bins=32", "train.init_audio_from=null"),
    "htsat": ("audio.width=16", "audio.depths=[2, 2]", "audio.duration_s=1.0", "audio.frames=101"),
    "resnet50": ("image.width=8", "image.layers=[1,1,1,1]", "image.resolution=32"),
}


def shrunk(file: Path) -> Config:
    """A shipped config with small encoders, in batches of 4."""
    config = load_config(file)
    small = [*_SMALL_MEDIA[config.encoder.encoder], *_SMALL_TEXT]
    small += ["train.global_batch=4", "train.micro_batch=null", "frontend.threads=1"]
    if config.joint.text_head == "none":
        small += ["text.width=16"]
    if hasattr(config.text, "folder"):
        small += ["text.folder=null"]
    if config.loss.recon.weight:
        small += ["decoder.width=16", "decoder.depth=1", "decoder.heads=2"]
    return load_config(file, small)


@pytest.mark.parametrize("file", shipped())
def test_every_shipped_config_is_profiled_without_files(file: Path, tmp_path: Path):
    """Of each kind of config one at once, and all of them with the slow tests."""
    config = shrunk(file)
    found = profile(config, steps=1, synthetic=True, search=False, out=tmp_path)
    assert found is not None
    modality = config.encoder.modality
    assert list(found["parts_ms"]) == list(step_parts(modality))
    for part in (f"{modality} tower", "text tower", "loss"):
        assert found["parts_ms"][part] > 0
        idle = part == "text tower" and config.joint.text_head == "none"
        assert bool(found["flop"][part]["total"]) != idle


OTHERS = [
    tiny(*HTSAT),
    tiny(*YAMNET),
    tiny("fusion.type=aff_2d"),
    tiny("text.dropout=0.1", "loss.simcse.weight=1", "loss.nli.weight=1", "train.micro_batch=4"),
    tiny("loss.contrastive.weight=0", "loss.recon.weight=1", "decoder.width=16"),
    tiny("loss.sigmoid.weight=1", "loss.contrastive.duplicates=positive", "train.micro_batch=4"),
    tiny("loss.contrastive.negatives=2", "loss.contrastive.duplicates=mask"),
    tiny_clip(),
    tiny_clip("text.tokenizer=package:nowhere", "loss.nli.weight=1"),
]


def test_a_tokenizer_that_is_not_here_has_clips_vocabulary_in_its_place():
    config = tiny_clip("text.tokenizer=package:nowhere")
    with without_files(config) as complete, torch.device("meta"):
        text: Any = TwoTowers(complete, weights=False).text
    assert text.vocabulary == len(text.token_embedding.weight) == 49_408


@pytest.mark.parametrize("config", OTHERS)
def test_batches_have_all_sentences_and_the_shape_of_the_encoders_input(config: Config):
    with without_files(config) as complete:
        model = TwoTowers(complete, weights=False)
        loader = SyntheticLoader(complete, model.text, Ranks())
    batch = next(loader.batches(0, 1))
    clips, sentences = len(batch.media), len(config.loss.sentences)
    assert not isinstance(batch.media, PackedMels)
    assert batch.media.shape[1:] == config.encoder.input_shape(config.fusion)
    assert len(batch.ids) == len(batch.attention_mask) == clips * sentences
    assert (batch.longer is not None) == config.fusion.on
    if config.loss.pair_ids:
        assert batch.pair_ids is not None
        assert batch.pair_ids.shape == (clips, 2 + config.loss.negatives)
    else:
        assert batch.pair_ids is None


def test_a_batch_that_would_take_the_machine_down_is_refused_before_it_is_made(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(fits, "free_bytes", lambda _: 2**28)
    config = tiny("train.global_batch=4096")
    with pytest.raises(ConfigError, match=r"global_batch must fit in 70% of the 0\.2 GiB .* try"):
        profile(config, synthetic=True, search=False)
    config = tiny("train.global_batch=4096", "train.micro_batch=2048")
    with pytest.raises(ConfigError, match=r"micro_batch must fit in 70% .*; try .*_batch=\d+$"):
        profile(config, synthetic=True, search=False)
    config = tiny("train.global_batch=4096", "audio.length=variable", "audio.max_duration_s=2")
    with pytest.raises(ConfigError, match=r"micro_tokens must fit in 70% .* tokens at a .* try"):
        profile(config, synthetic=True, search=False)
    monkeypatch.setattr(fits, "free_bytes", lambda _: 2**20)
    with pytest.raises(ConfigError, match="not even one clip does: take a smaller encoder"):
        profile(tiny(), synthetic=True, search=False)


def test_without_data_the_remedy_is_named():
    with pytest.raises(ConfigError, match=r"data\.train must name .* Without data: --synthetic"):
        profile(tiny(), search=False)


def attempts(limit: int, tried: list[int], *, trial_s: float = 0.0):
    def attempt(clips: int) -> Trial:
        tried.append(clips)
        return Trial(clips, clips <= limit, 100 + 10 * clips, trial_s * clips)

    return attempt


def test_the_search_doubles_then_bisects_what_divides_the_batch():
    tried: list[int] = []
    found = list(trials(attempts(37, tried), batch=360, limit_bytes=None, seconds=60))
    assert tried == [2, 4, 8, 16, 32, 64, 45, 40, 36]
    assert largest(found, 360, None)["micro_batch"] == 36
    best = [n for n in range(1, 38) if 360 % n == 0][-1]
    assert best == 36  # as far as trials of every divisor would have come


def test_the_search_ends_with_the_whole_batch_at_once():
    tried: list[int] = []
    found = list(trials(attempts(10**9, tried), batch=9, limit_bytes=None, seconds=60))
    assert tried == [2, 4, 9]
    assert largest(found, 9, None)["micro_batch"] == 9


def test_a_batch_that_nothing_divides_goes_one_by_one_where_it_does_not_fit_at_once():
    tried: list[int] = []
    found = list(trials(attempts(5, tried), batch=7, limit_bytes=None, seconds=60))
    assert tried == [2, 7]
    assert largest(found, 7, None)["micro_batch"] == 1


def test_the_search_begins_no_trial_that_is_expected_above_the_limit():
    """Peaks of 100 + 10 a clip, and room for 37: nothing above is tried."""
    tried: list[int] = []
    found = list(trials(attempts(10**9, tried), batch=360, limit_bytes=470, seconds=60))
    assert max(tried) == 36
    assert largest(found, 360, 470) == {
        "global_batch": 360,
        "tried": 36,
        "micro_batch": 36,
        "predicted": 36,
        "trials": [vars(trial) for trial in found],
    }


def test_the_search_stops_where_the_next_trial_would_take_too_long():
    tried: list[int] = []
    slow = attempts(10**9, tried, trial_s=1)
    found = list(trials(slow, batch=360, limit_bytes=900, seconds=20, clock=lambda: 0.0))
    assert tried == [2, 4, 8]  # 16 clips would take 16 s, and twice that is too much of 20
    assert largest(found, 360, 900)["predicted"] == 72  # the line says 80


def two_micro_batches():
    """Their trials, and the difference of their peaks by formula."""
    config = tiny("audio.width=64", "audio.depth=4", "train.global_batch=512")
    attempt, counts = Attempts(config, CPU), StepCounts(config, half=False, on_gpu=False)
    few, many = (
        footprint(
            config.model_copy(
                update={"train": config.train.model_copy(update={"micro_batch": clips})}
            ),
            counts,
            512,
            24,
            1,
            engine="plain",
            on_gpu=False,
        ).peak
        for clips in (2, 256)
    )
    return attempt(2), attempt(256), many - few


def test_a_larger_micro_batch_takes_more_memory():
    """In a process whose heap holds nothing of other tests; an allocator keeps pages to spare."""
    ((few, many, more),) = on_ranks(1, two_micro_batches)
    assert few.fits
    assert many.fits
    assert 0.8 * more < many.peak_bytes - few.peak_bytes < 2 * more


@pytest.mark.parametrize("micro_batch", [2, 4])
def test_a_trial_holds_what_a_whole_step_holds(micro_batch: int):
    """Tensors of a trial against those of the step, with log-mels kept: counted, not resident."""
    small = ("audio.width=16", "text.width=16", "audio.depth=1", "text.depth=1")
    config = tiny(*small, "train.global_batch=64", "train.replay=keep")
    attempt = Attempts(config, CPU)
    attempt(1)
    with Live() as trial:
        attempt._take(micro_batch)
    whole = attempt._config.train.model_copy(update={"micro_batch": micro_batch})
    with Live() as step:
        attempt._step(config.model_copy(update={"train": whole}))
    assert trial.most == pytest.approx(step.most, rel=0.05)


def test_running_out_of_memory_does_not_end_the_search(monkeypatch: pytest.MonkeyPatch):
    attempt = Attempts(tiny(), CPU)
    tower = attempt._engine.module.get_submodule("audio")
    real = tower.forward

    def full(mel: torch.Tensor, *rest: Any, **named: Any) -> Any:
        if len(mel) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(mel, *rest, **named)

    monkeypatch.setattr(tower, "forward", full)
    assert [attempt(n).fits for n in (4, 8, 4)] == [True, False, True]
    monkeypatch.setattr(tower, "forward", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        attempt(4)


def test_the_search_runs_in_a_process_of_its_own():
    before = resident_bytes()
    found = search(tiny(), seconds=0.5)
    assert found["tried"] >= 2
    assert 0 < found["limit_bytes"] <= free_bytes(CPU) + resident_bytes()
    assert resident_bytes() < before + 2**26


@pytest.fixture
def child(monkeypatch: pytest.MonkeyPatch):
    """Stands for the process that searches: its exit code and what it printed."""

    def stands_for(code: int, *lines: dict[str, Any], said: str = "") -> None:
        printed = "\n".join(json.dumps(line) for line in lines)
        done = subprocess.CompletedProcess([], code, printed, said)
        monkeypatch.setattr(searching.subprocess, "run", lambda *_, **__: done)

    return stands_for


def test_a_search_that_fails_says_why(child: Callable[..., None]):
    child(1, {"limit_bytes": 100}, said="Traceback: KeyError: 'what it lacked'")
    with pytest.raises(RuntimeError, match=r"search for a micro-batch failed:\n.*what it lacked"):
        search(tiny(), seconds=1)


def test_a_search_that_the_kernel_ends_has_found_what_it_had(child: Callable[..., None]):
    fits = vars(Trial(4, True, 50, 1.0))
    child(-9, {"limit_bytes": 100}, {"begun": 4}, fits, {"begun": 8})
    found = search(tiny(), seconds=1)
    assert found["tried"] == 4
    assert found["trials"][-1] == vars(Trial(8, False))


def test_peaks_of_a_cpu_count_from_where_they_are_begun():
    memory = Memory(CPU)
    with mmap.mmap(-1, 2**26) as large:
        large.write(bytes(2**26))
        assert memory.peak() >= 2**26
        assert memory.steady() >= 2**26
    memory.begin()
    assert memory.peak() < 2**26


def test_the_ceiling_is_a_rate_that_the_product_really_had():
    begun = time.perf_counter()
    ceiling = measure_ceiling(CPU, half=False, seconds=0.1)
    assert 1e8 < ceiling < 1e13
    assert ceiling > 2 * 1024**3 / (time.perf_counter() - begun)


def test_the_table_is_narrow_and_has_a_row_for_each_part(
    found: tuple[dict[str, Any], Path], capsys: pytest.CaptureFixture
):
    from rich.console import Console

    Console(width=100).print(profile_table(found[0]))
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 100
    for part in (*PARTS, "a step"):
        assert any(line.strip().startswith(part) for line in lines), part


def test_the_command_profiles_without_data_and_draws(tmp_path: Path):
    pytest.importorskip("matplotlib")
    file, out = tmp_path / "config.yaml", tmp_path / "out"
    file.write_text(dump_config(tiny("train.global_batch=2")))
    options = ["--synthetic", "--no-search", "--steps", "1", "--out", str(out)]
    result = CliRunner().invoke(app, ["profile", str(file), *options])
    assert result.exit_code == 0, result.output
    assert "of ceiling" in result.output
    assert {f.name for f in out.iterdir()} == {"profile.json", "profile.png", "trace.json.gz"}
    assert (out / "profile.png").read_bytes().startswith(b"\x89PNG")


def test_the_search_takes_a_run_that_reads_no_captions():
    config = tiny("loss.contrastive.weight=0", "loss.recon.weight=1", "decoder.width=16")
    assert search(config, seconds=0.5)["tried"] >= 1
