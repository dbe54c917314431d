"""FLOP of a step: PyTorch's counter on a real one, closed forms by hand, parts that add up."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from flap_fast.config import Config
from flap_fast.config.file import load_config
from flap_fast.model.two_towers import TwoTowers
from flap_fast.ranks import Ranks
from flap_fast.tools.profile.counts import StepCounts
from flap_fast.tools.profile.lengths import LengthMix
from flap_fast.tools.profile.noted import Noted, noting, sentence_lengths
from flap_fast.tools.profile.synthetic import SyntheticLoader
from flap_fast.tools.profile.trace import Trace, formulas
from flap_fast.tools.profile.work import rank_work
from flap_fast.training.engine import PlainEngine
from flap_fast.training.frozen import frozen
from flap_fast.training.step import Gradients, model_inputs
from flap_fast.training.teacher import teacher
from flap_kernels.masked_mse import _masked_mse, _masked_mse_backward
from tests.tiny import HTSAT, YAMNET, YAMNET_NAMED, tiny, tiny_clip


def counter() -> FlopCounterMode:
    return FlopCounterMode(display=False, custom_mapping=formulas())


def test_inside_of_the_masked_error_there_are_as_many_products_as_it_is_counted_for():
    """Of 2 x 3 dropped patches of 4 x 4 pixels, 8 wide."""
    hidden, weight, bias = torch.randn(2, 3, 8), torch.randn(16, 8), torch.randn(16)
    mel, drop = torch.randn(2, 16, 8), torch.arange(3).expand(2, 3)
    rest = (hidden, weight, bias, mel, drop, None, 4, True, torch.float32)
    one, ours = torch.ones(()), torch.ops.flap_kernels
    for inside, operator, arguments, products in (
        (_masked_mse, ours.masked_mse, rest, 1),
        (_masked_mse_backward, ours.masked_mse_backward, (one, *rest), 3),
    ):
        with counter() as within:
            inside._init_fn(*arguments)
        with counter() as outside:
            operator(*arguments)
        assert within.get_total_flops() == outside.get_total_flops() == products * 2 * 6 * 8 * 16


RECON = ("loss.recon.weight=1", "decoder.width=16", "decoder.depth=3", "decoder.heads=2")
CYCLIC = ("loss.cyclic.cross_weight=0.25", "loss.cyclic.in_weight=0.25")
MICRO = "train.micro_batch=2"


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("mask.kind=none", "text.pool=mean", "audio.use_cls=false"),
        ("text.freeze=true",),
        ("train.checkpoint_activations=true",),
        ("train.checkpoint_activations=audio",),
        ("train.checkpoint_activations=text",),
        RECON,
        (*RECON, "audio.use_cls=false", "train.checkpoint_activations=decoder"),
        (*CYCLIC, "loss.cyclic.form=tiled"),
        ("loss.cyclic.cross_weight=1", "loss.cyclic.form=tiled"),
        (*CYCLIC, "loss.cyclic.form=gram"),
        ("loss.cyclic.in_weight=1", "joint.width=2", "loss.contrastive.weight=0"),
        (MICRO,),
        (MICRO, "train.checkpoint_activations=true", *RECON, *CYCLIC),
        (MICRO, "text.freeze=true", *RECON, "train.replay=keep"),
        (MICRO, "train.accumulation=local", *RECON, *CYCLIC),
    ],
)
def test_a_steps_products_are_as_many_as_pytorch_counts_in_the_trainers_step(overrides: tuple):
    """Of the trainer's own passes, on captions of several lengths."""
    config = tiny("train.global_batch=6", *overrides)
    lengths, counted = products_of_a_step(config)
    assert len(set(lengths)) > 1
    parts = StepCounts(config, half=False).flop(lengths)
    assert sum(part.total for part in parts.values()) == counted


SIGMOID = ("loss.sigmoid.weight=1", "loss.sigmoid.duplicates=positive")
SIMCSE, NLI = ("text.dropout=0.1", "loss.simcse.weight=1"), ("loss.nli.weight=1",)
FUSION = ("fusion.type=aff_2d",)
NEGATIVES = ("loss.contrastive.negatives=2",)
OTHERS = [
    tiny(*HTSAT, "train.global_batch=6", "audio.drop_path=0.1"),
    tiny(*HTSAT, "train.global_batch=6", "train.checkpoint_activations=true"),
    tiny(*FUSION, "train.global_batch=6"),
    tiny(*SIMCSE, "train.global_batch=6", MICRO),
    tiny(*SIMCSE, *NLI, "loss.simcse.on=nli", "train.global_batch=6"),
    tiny_clip(*NLI, "train.global_batch=6", MICRO),
    tiny(*NLI, *RECON, "loss.contrastive.weight=0", "train.global_batch=6"),
    tiny(*RECON, "loss.contrastive.weight=0", "train.global_batch=6"),
    tiny(*SIGMOID, "loss.contrastive.weight=0", "train.global_batch=6", MICRO),
    tiny(*SIGMOID, "loss.contrastive.duplicates=mask", "train.global_batch=6"),
    tiny(*NEGATIVES, "loss.sigmoid.weight=1", "loss.sigmoid.negatives=1", "train.global_batch=6"),
    tiny(*NEGATIVES, "loss.contrastive.duplicates=mask", "train.global_batch=6", MICRO),
]


@pytest.mark.parametrize("config", OTHERS)
def test_other_encoders_and_losses_are_counted_as_they_are(config: Config):
    lengths, counted = products_of_a_step(config)
    parts = StepCounts(config, half=False).flop(lengths)
    assert sum(part.total for part in parts.values()) == counted


VARIABLE = ("audio.length=variable", "audio.max_duration_s=2")


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        RECON,
        ("train.micro_tokens=80", *RECON),
        ("train.micro_batch=2", "train.checkpoint_activations=true"),
        ("mask.kind=1d", "mask.ratio=0.3", "audio.use_cls=false", "text.pool=mean"),
        YAMNET,
        YAMNET_NAMED,
    ],
)
def test_products_of_clips_of_their_own_lengths_are_as_many_as_pytorch_counts(overrides: tuple):
    config = tiny("train.global_batch=6", *VARIABLE, *overrides)
    mix = LengthMix("a test", np.array([0.05, 0.3, 0.7, 0.7, 1.1, 1.9, 3.0]))
    work = rank_work(config, 1, mix)
    assert work.lengths is not None
    assert len(set(work.lengths.frames)) > 3
    assert work.micro_batches == (3 if config.train.micro_tokens or config.train.micro_batch else 1)
    lengths, counted = products_of_a_step(config, mix)
    parts = StepCounts(config, half=False, mix=mix).flop(lengths)
    assert sum(part.total for part in parts.values()) == counted


def products_of_a_step(config: Config, mix: LengthMix | None = None) -> tuple[list[int], int]:
    """The tokens of a step's sentences, captions first, and what PyTorch counts in it."""
    engine = PlainEngine(config, TwoTowers(config).train(), Ranks())
    loader = SyntheticLoader(config, engine.module.text, Ranks(), mix)
    with frozen(config, engine.module, Ranks()) as kept:
        models = kept, teacher(config, Ranks())
        gradients = Gradients(config, Ranks(), engine, 1000, 1000, *models)
        batches = list(loader.batches(0, 1, times=gradients.reads))
        for batch in batches:  # of frozen encoders: no caption and no clip is new
            kept.fill(model_inputs(batch, None, config), batch)
        # Attention as plain products: PyTorch's own registry does not have the CPU's fused one.
        with sdpa_kernel(SDPBackend.MATH), counter() as counted:
            gradients(1, iter(batches))
    noted: list[Noted] = []
    list(noting(iter(batches[: batches[0].micro_batches]), noted))
    lengths = sentence_lengths(noted, len(config.loss.sentences))
    if config.text.encoder == "clip":  # computes the padding, too
        lengths = [max(lengths)] * len(lengths)
    return lengths, counted.get_total_flops()


def test_a_kernel_that_is_imported_inside_of_a_trace_is_counted(monkeypatch: pytest.MonkeyPatch):
    with Trace() as trace:
        monkeypatch.setitem(flop_registry, torch.ops.aten.neg, lambda *_, **__: 7)
        torch.ones(2).neg()
    assert trace.flop()["other"].total == 7


def test_what_a_second_pass_adds_is_a_forward_of_the_towers():
    whole, halves = (
        StepCounts(tiny("train.global_batch=4", *more), half=False).flop([9] * 4)
        for more in (RECON, (*RECON, "train.micro_batch=2"))
    )
    for name, part in whole.items():
        added = part.forward if "tower" in name else 0
        assert halves[name].total == part.total + added, name


@pytest.mark.parametrize(("world", "scheme"), [(1, "auto"), (4, "sharded"), (4, "replicated")])
def test_the_losss_products_by_hand(world: int, scheme: str):
    """Of a rank with 6 clips: logits, once more in the backward, and both gradients."""
    config = tiny(f"loss.contrastive.scheme={scheme}")
    loss = StepCounts(config, half=False).loss(6, world)
    least = 8 * 6 * 6 * world * config.joint.width
    # Replicated, a rank takes its clips against all captions and its captions against all clips.
    assert loss.flop.total == (1.5 * least if scheme == "replicated" else least)


def test_negatives_are_rows_of_the_text_encoder_and_columns_of_the_clips():
    config = tiny(*NEGATIVES, "loss.contrastive.direction=a2t", "loss.contrastive.scheme=sharded")
    loss = StepCounts(config, half=False).loss(6, 4)
    assert loss.flop.total == 8 * 6 * (3 * 6 * 4) * config.joint.width
    with_some, without = (
        StepCounts(tiny(*some), half=False).flop([9] * 6 * (1 + 2 * len(some)))
        for some in (NEGATIVES, ())
    )
    assert with_some["text tower"].total == 3 * without["text tower"].total
    assert with_some["audio tower"] == without["audio tower"]


def test_vit_b_by_hand():
    """12 blocks of 307 tokens, 768 wide, and the kept patches' embedding and head."""
    config = load_config(None, ("text.folder=models/nowhere",))
    n, D, P, joint = 306 + 1, 768, 256, 512
    block = n * 12 * D**2 + 2 * n**2 * D
    embed, head = 306 * P * D, D * joint + joint**2
    flop = StepCounts(config, half=True).flop([24])["audio tower"]
    assert flop.forward == 2 * (12 * block + embed + head)
    assert flop.backward == 2 * (2 * 12 * block + embed + 2 * head)  # patches want no gradient
    assert (flop.recomputed, flop.first_pass) == (0, 0)


def test_htsat_costs_what_it_did():
    """Pinned: forward and backward of a clip through LAION-CLAP's HTSAT and its head."""
    config = load_config(None, ("audio.encoder=htsat", "text.folder=models/nowhere"))
    flop = StepCounts(config, half=True).flop([24])["audio tower"]
    assert flop.total / 1e9 == pytest.approx(35.450, abs=0.0005)


def test_flaps_decoder_adds_what_the_paper_says():
    """61.9 G multiply-adds for 8 clips (4 x 512, 513 tokens), all patches predicted.

    We predict but the 206 of 512 that are dropped. Source: FLAP, section 6.3.
    """
    config = load_config(None, ("loss.recon.weight=1", "text.folder=models/nowhere"))
    norms, rest = 8 * 9 * 5 * 513 * 512, 8 * 306 * 512 * 256
    flop = StepCounts(config, half=True).flop([24] * 8)["decoder"].forward
    assert (flop / 2 + norms + rest) / 1e9 == pytest.approx(61.9, abs=0.05)


@pytest.mark.parametrize("tokens", [1, 5, 13, 24, 40])
def test_between_lengths_a_captions_products_are_interpolated_exactly(tokens: int):
    config = tiny()
    counts = StepCounts(config, half=False)
    several = counts.flop([8, tokens])["text tower"]
    alone = [counts.flop([n])["text tower"] for n in (8, tokens)]
    assert several.total == sum(one.total for one in alone)


def test_products_grow_as_the_clips_do():
    counts = StepCounts(tiny(*HTSAT), half=False)
    few, many = (counts._traced(clips, 8)[0] for clips in (2, 4))
    assert few.keys() == many.keys()
    assert all(many[part].total == 2 * few[part].total for part in few)
