"""Packed clips and captions against padding, on two mixes of clips' lengths: FLOP and time.

    python -m bench.lengths_mix CAPTIONS [text.tokenizer=models/roberta-base] [NAME=VALUE ...]

    10 s, 77   clips filled or cropped to 10 s (1024 frames), captions padded to 77 tokens
    longest    both padded to the longest of the batch
    packed     neither padded

Clips of 10 s, as AudioCaps has, and a WavCaps-like mix up to 30 s (`tools/profile/lengths.py`);
CAPTIONS, as `bench.packed_text` reads them, for both. Whole training steps: forward, losses and
backward, with 2-D masking. FLOP are PyTorch's, of ViT-B and RoBERTa-base on tensors without values;
times are those of small towers on a CPU, in rounds in which the layouts take turns on one batch:
medians, and a ratio is the median of its rounds' ratios. A padded batch is computed as a pack in
which padding counts as sound and as tokens, so that only lengths differ. What `10 s, 77` crops away
is sound that it does not see: `sound_s` is the mean of a clip that each layout sees.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.machine import machine, save
from bench.packed_text import CLOCKS, read_captions
from flap_fast.config import Config
from flap_fast.config.file import load_config
from flap_fast.data.batch import Batch, PackedMels
from flap_fast.data.tokenize import Tokenizer, tokenizer
from flap_fast.losses import total_loss
from flap_fast.model.two_towers import TwoTowers
from flap_fast.tools.profile.counts import StepCounts
from flap_fast.tools.profile.lengths import LengthMix, frames_of, wavcaps_like
from flap_fast.training.step import model_inputs, patch_mask_of

LAYOUTS = ("packed", "longest", "10 s, 77")
_VARIABLE = ("audio.length=variable", "audio.max_duration_s=30", "mask.kind=2d")
_SMALL = (
    *("audio.size=tiny", "audio.width=128", "audio.depth=4", "audio.heads=2", "joint.width=64"),
    *("text.width=128", "text.depth=4", "text.heads=2"),
)
_FRAMES, _TOKENS = 1024, 77


def main() -> None:
    asked = arguments()
    large = load_config(None, ["audio.size=base", *_VARIABLE, *asked.settings])
    small = load_config(None, [*_SMALL, *_VARIABLE, *asked.settings])
    captions = read_captions(asked.captions)
    random.Random(0).shuffle(captions)
    facts = machine("cpu")
    rows = []
    for mix in (LengthMix("clips of 10 s", np.full(1000, 10.0)), wavcaps_like()):
        batches = drawn(large, mix, captions, asked.batch, max(asked.counted, asked.rounds))
        counts = StepCounts(large, half=True, mix=mix)
        flop = [count_flop(counts, batch) for batch in batches[: asked.counted]]
        rows.append(row_of(mix, batches, flop, time_steps(small, batches, asked)))
        print(json.dumps(rows[-1], indent=1), flush=True)
    result = {
        "kind": "lengths_mix",
        "machine": facts,
        "batch": asked.batch,
        "counted": asked.counted,
        "rounds": asked.rounds,
        "clock": asked.clock,
        "captions": asked.corpus or asked.captions.name,
        "tokenizer": asked.tokens,
        "rows": rows,
        **({"note": asked.note} if asked.note else {}),
    }
    print(save(asked.out, result))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.lengths_mix")
    parser.add_argument("captions", type=Path)
    parser.add_argument("settings", nargs="*", help="NAME=VALUE")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7, help="steps of each layout")
    parser.add_argument("--counted", type=int, default=10, help="batches whose FLOP are counted")
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--out", type=Path, default=Path("bench"), help="the folder of results/")
    parser.add_argument("--corpus", help="the captions, in words")
    parser.add_argument("--tokens", default="of the settings", help="the tokenizer, in words")
    parser.add_argument("--note", help="what else a reader must know")
    return parser.parse_intermixed_args()


class Drawn:
    """Clips and captions of a batch: seconds, frames (ascending) and tokens of each."""

    def __init__(self, config: Config, seconds: np.ndarray, captions: list[str], read: Tokenizer):
        self.seconds, self.frames = seconds, frames_of(config, seconds)
        _, mask = read(captions)
        self.tokens, self.padded = mask.sum(1).tolist(), mask.shape[1]

    def laid_out(self, layout: str) -> tuple[tuple[int, ...], list[int]]:
        """Frames of each clip and tokens of each caption that a layout computes."""
        clips = len(self.frames)
        if layout == "packed":
            return self.frames, self.tokens
        if layout == "longest":
            return (self.frames[-1],) * clips, [min(self.padded, _TOKENS)] * clips
        return (_FRAMES,) * clips, [_TOKENS] * clips


def drawn(
    config: Config, mix: LengthMix, captions: list[str], clips: int, count: int
) -> list[Drawn]:
    """Batches of clips of random lengths of the mix, and of the next captions."""
    draw, read = np.random.default_rng(0), tokenizer(config.text)
    rows = [captions[n * clips : (n + 1) * clips] for n in range(count)]
    return [Drawn(config, draw.choice(mix.seconds, clips), some, read) for some in rows]


def count_flop(counts: StepCounts, batch: Drawn) -> dict[str, int]:
    """FLOP of a step in each layout."""
    found = {}
    for layout in LAYOUTS:
        frames, tokens = batch.laid_out(layout)
        parts = counts.flop(tokens, frames=frames, micro_batches=1)
        found[layout] = sum(part.total for part in parts.values())
    return found


def time_steps(
    config: Config, batches: list[Drawn], asked: argparse.Namespace
) -> dict[str, list[float]]:
    """Milliseconds of each layout's steps, after one warm-up step."""
    torch.manual_seed(0)
    model, clock = TwoTowers(config).train(), CLOCKS[asked.clock]
    taken: dict[str, list[float]] = {layout: [] for layout in LAYOUTS}
    for layout in LAYOUTS:
        step(config, model, real(config, model, batches[0].laid_out(layout)))
    for number in range(asked.rounds):
        turn = number % len(LAYOUTS)
        for layout in LAYOUTS[turn:] + LAYOUTS[:turn]:
            batch = real(config, model, batches[number].laid_out(layout))
            start = clock()
            step(config, model, batch)
            taken[layout].append((clock() - start) * 1e3)
    return taken


def real(config: Config, model: TwoTowers, laid_out: tuple[tuple[int, ...], list[int]]) -> Batch:
    """A batch of random log-mels and tokens."""
    frames, tokens = laid_out
    clips = len(frames)
    mask = (torch.arange(max(tokens)) < torch.tensor(tokens)[:, None]).long()
    vocabulary: Any = model.text.vocabulary
    pad: Any = model.text.pad_token_id
    ids = torch.randint(vocabulary - 1, mask.shape)
    ids = (ids + (ids >= pad)).where(mask.bool(), torch.tensor(pad))
    media = PackedMels(torch.randn(sum(frames), config.audio.mel_bins), frames, tuple(range(clips)))
    return Batch(media, ids, mask, torch.arange(clips), np.arange(clips), 0, 1)


def step(config: Config, model: TwoTowers, batch: Batch) -> None:
    model.zero_grad()
    mask = patch_mask_of(batch, config, 1000, 1)
    outputs = model(**model_inputs(batch, mask, config))
    total_loss(outputs, config)["total"].backward()


def row_of(
    mix: LengthMix,
    batches: list[Drawn],
    flop: list[dict[str, int]],
    times: dict[str, list[float]],
) -> dict[str, Any]:
    """Figures of a mix, by layout."""
    seconds = np.concatenate([batch.seconds for batch in batches])
    clips = len(batches[0].seconds)
    seen = {layout: float(seconds.clip(max=30).mean()) for layout in LAYOUTS}
    seen["10 s, 77"] = float(seconds.clip(max=10).mean())
    layouts = {}
    for layout in LAYOUTS:
        ratios = [a / b for a, b in zip(times["packed"], times[layout], strict=True)]
        total = sum(counted[layout] for counted in flop)
        layouts[layout] = {
            "gflop_per_clip": total / 1e9 / clips / len(flop),
            "sound_s": seen[layout],
            "step_ms": statistics.median(times[layout]),
            "least_ms": min(times[layout]),
            "most_ms": max(times[layout]),
            "packed_flop": sum(counted["packed"] for counted in flop) / total,
            "packed_time": statistics.median(ratios),
        }
    tokens = [n for batch in batches for n in batch.tokens]
    return {"mix": mix.source, "tokens_per_caption": statistics.mean(tokens), "layouts": layouts}


if __name__ == "__main__":
    main()
