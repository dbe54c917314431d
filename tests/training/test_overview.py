"""What is printed before a run's first step."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from flap_fast.config import Sched
from flap_fast.model.two_towers import TwoTowers
from flap_fast.ranks import Ranks
from flap_fast.training.overview import (
    Known,
    Parameters,
    overview,
    parameter_facts,
    parameters_of,
    short,
)
from tests.tiny import tiny


def test_each_parameter_is_counted_once_and_frozen_ones_apart():
    model = TwoTowers(tiny("text.freeze=true", "audio.freeze_blocks=1", "loss.recon.weight=1"))
    parts = parameters_of(model)
    assert list(parts) == ["audio", "text", "heads", "decoder"]
    total = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    facts = parameter_facts(parts)
    assert (facts["parameters"], facts["parameters_trained"]) == (total, trained)
    assert parts["text"].trained == 0 < parts["audio"].trained < parts["audio"].total
    heads = sum(p.numel() for m in (model.head, model.text_head) if m for p in m.parameters())
    assert parts["heads"].total == heads + 1  # the logit scale


def test_it_names_folder_ranks_parameters_data_and_length():
    config = tiny("run.folder=runs", "run.name=a", "train.global_batch=8", "data.val=[]")
    config = config.model_copy(update={"sched": Sched(warmup_steps=29)})
    parts = {"audio": Parameters(86_000_000, 1_000_000), "text": Parameters(1500, 0)}
    seconds = np.full(900, 4.0)
    known = Known("deepspeed", parts, 900, seconds, 30, 12, 1500)
    ranks = Ranks(rank=0, world=4, local_world=2, device=torch.device("cpu"))
    start = Path("runs/a/checkpoints/step-000010")
    found = dict(line.split(maxsplit=1) for line in overview(
        config, ranks, known, start, 10).splitlines())  # fmt: skip
    assert found["run"] == f"runs/a: goes on after step 10, from {start}"
    assert found["device"].startswith("4 ranks on 2 nodes, each with ")
    assert found["device"].endswith("; DeepSpeed, ZeRO 1")
    whole = "86 M, 1 M of them trained (audio 86 M of which 1 M trained, text 1.5 k frozen)"
    assert found["parameters"] == whole
    data = "900 clips to train on, 1.0 h, 1,500 samples an epoch"
    assert found["data"] == f"{data}; data.val is not set, nothing is scored"
    assert found["length"] == "30 steps, 2.5 epochs of 12 steps, global batch 8 (2 a rank)"
    alone = overview(
        config, Ranks(), known._replace(engine="plain", seconds=None, samples=900), None, 0
    )
    assert "runs/a: a new run" in alone
    assert "plain PyTorch" in alone
    assert "900 clips to train on; " in alone
    warming = config.model_copy(update={"sched": Sched(warmup_steps=30)})
    line = overview(warming, Ranks(), known, None, 0).splitlines()[-1]
    assert line.endswith("global batch 8, all of them warm-up (sched.warmup_steps = 30)")


def test_counts_are_rounded_to_three_digits():
    assert [short(n) for n in (7, 999, 1_000, 22_700_000, 1_550_000_000)] == [
        *("7", "999", "1 k", "22.7 M", "1.55 G")
    ]
