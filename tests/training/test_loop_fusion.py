"""Runs with feature fusion, of both encoders, on one rank and on several."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import torch.distributed as dist

from flap_fast.data.batch import Batch
from flap_fast.model.two_towers import TwoTowers
from flap_fast.ranks import Ranks
from flap_fast.tools.embedder import load
from flap_fast.training import step as step_file
from flap_fast.training.engine import DeepSpeedEngine
from flap_fast.training.loop import train
from tests.ranks import on_ranks
from tests.sounds import noise
from tests.tiny import HTSAT, tiny

ENCODERS = {"vit": ("loss.recon.weight=1", "decoder.depth=1"), "htsat": HTSAT}


@pytest.mark.parametrize("name", ENCODERS)
def test_a_fused_run_trains_scores_and_hears_whole_clips(name, prepared, tmp_path, monkeypatch):
    """Also what differs outside any one crop; the loop passes on what the batch says."""
    seen: list[tuple[Batch, dict]] = []
    real, forward = step_file.model_inputs, TwoTowers.forward
    monkeypatch.setattr(
        step_file,
        "model_inputs",
        lambda batch, *rest: seen.append((batch, {})) or real(batch, *rest),
    )

    def watched(self, **given):
        seen[-1] = (seen[-1][0], given)
        return forward(self, **given)

    monkeypatch.setattr(TwoTowers, "forward", watched)
    config = tiny(
        *ENCODERS[name],
        *(f"run.folder={tmp_path}", f"data.train={prepared}/train", f"data.val={prepared}/val"),
        *("train.steps=2", "log.every_steps=1", "log.tensorboard=false", "sched.warmup_steps=1"),
        *("fusion.type=aff_2d", "fusion.max_duration_s=1.6"),
    )
    assert train(config) is not None
    rows = [json.loads(line) for line in (tmp_path / "flap/metrics.jsonl").read_text().splitlines()]
    assert all(np.isfinite(row["loss"]) for row in rows if "loss" in row)
    assert len(seen) == 2
    for batch, given in seen:
        assert given["media"].shape[1] == 4
        assert (given["target"] is None) == (name == "htsat")
        assert (given["erase"] is None) == (name == "vit")
        assert given["longer"] is batch.longer
        assert given["longer"].any()
    model = load(tmp_path / "flap", "cpu")
    long = noise(0, 1.6, 16_000)
    other = long.copy()
    other[:2000] = other[-2000:] = 0
    a, b, c = model.embed_audio([long, other, long[:16_000]])
    assert (a - b).abs().max() > 1e-5
    assert (a - c).abs().max() > 1e-5
    assert torch.allclose(a, model.embed_audio([long])[0], atol=1e-5)


def one_rank_of_short_clips():
    """ZeRO-3 gathers weights as modules are called: a rank without a longer clip must call them."""
    ranks = Ranks(rank=dist.get_rank(), world=dist.get_world_size(), launched=True)
    config = tiny("fusion.type=aff_2d", "train.zero_stage=3", "audio.depth=1")
    torch.manual_seed(0)
    engine = DeepSpeedEngine(config, TwoTowers(config), ranks)
    mel = torch.randn(2, 4, 112, 128, generator=torch.Generator().manual_seed(0))
    longer = torch.tensor([ranks.first, False])
    engine.module.eval()
    with torch.no_grad():
        return engine.module.embed_media(mel, longer=longer)


def test_under_zero_3_a_rank_may_have_no_longer_clip():
    pytest.importorskip("deepspeed")
    fused, short = on_ranks(2, one_rank_of_short_clips, timeout_s=60)
    assert (fused[0] - short[0]).abs().max() > 1e-4
    assert torch.allclose(fused[1], short[1], atol=1e-6)
