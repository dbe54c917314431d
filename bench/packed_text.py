"""Packed captions against padding to the batch's longest and to 77: FLOP and time, as ratios.

    python -m bench.packed_text CAPTIONS [text.tokenizer=models/roberta-base] [text.NAME=VALUE ...]

CAPTIONS is a CSV with a column `caption`, or a file of one caption a line. Without settings: the
shape of RoBERTa-base, random weights, dropout as in training. A step is forward and backward, of a
frozen tower only forward. FLOP are PyTorch's count over batches without values, a multiply-add as
two; times are medians over rounds in which the layouts take turns on the same batch, and a ratio is
the median of its rounds' ratios. On a CPU that others use too, `--clock cpu` counts the time that
this process was given instead of the time that went by.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import random
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from flap_fast.config.file import load_config
from flap_fast.data.tokenize import tokenizer
from flap_fast.encoders.roberta.model import TransformersText
from flap_fast.encoders.roberta.settings import RobertaSettings

LAYOUTS = ("packed", "padded", "padded_77")
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
Captions = tuple[Tensor, Tensor]


def main() -> None:
    args = arguments()
    text = load_config(None, args.settings).text
    device = torch.device(args.device)
    tokens = tokenizer(text)
    some = read_captions(args.captions)
    random.Random(0).shuffle(some)
    batches = [
        tokens(some[i * args.batch : (i + 1) * args.batch])
        for i in range(max(args.counted, args.timed))
    ]
    torch.manual_seed(0)
    assert isinstance(text, RobertaSettings)
    model = TransformersText(text).train().to(device)
    pad = model.inner.config.pad_token_id
    clock = CLOCKS[args.clock]
    times = time_steps(model, batches[: args.timed], pad, args.rounds, device, clock)
    flop = count_flop(model.to("meta"), batches[: args.counted], pad)
    lengths = torch.cat([mask.sum(1) for _, mask in batches[: args.counted]]).double()
    report = {
        "what": "text tower, " + ("forward" if text.freeze else "forward and backward"),
        "captions": args.corpus or args.captions.name,
        "tokens_per_caption": {"mean": round(lengths.mean().item(), 2), "max": int(lengths.max())},
        "batch": args.batch,
        "text": text.model_dump(mode="json", exclude={"folder", "tokenizer"}),
        "tokenizer": args.tokens,
        "gflop_per_caption": {
            layout: round(count / 1e9 / args.batch / args.counted, 3)
            for layout, count in flop.items()
        },
        "step_ms": {layout: round(statistics.median(ms), 1) for layout, ms in times.items()},
        "step_ms_range": {
            layout: [round(min(ms), 1), round(max(ms), 1)] for layout, ms in times.items()
        },
        "clock": args.clock,
        "rounds": args.rounds,
        "batches_counted": args.counted,
        "machine": machine(device),
        "packed_over": {
            layout: {
                "flop": round(flop["packed"] / flop[layout], 3),
                "time": round(
                    statistics.median(
                        a / b for a, b in zip(times["packed"], times[layout], strict=True)
                    ),
                    3,
                ),
            }
            for layout in LAYOUTS[1:]
        },
    }
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("captions", type=Path)
    parser.add_argument("settings", nargs="*", help="text.NAME=VALUE")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=9, help="steps of each layout")
    parser.add_argument("--timed", type=int, default=3, help="batches that the rounds go through")
    parser.add_argument("--counted", type=int, default=20, help="batches whose FLOP are counted")
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--corpus", help="the captions, in words")
    parser.add_argument("--tokens", default="of the settings", help="the tokenizer, in words")
    parser.add_argument("--out", type=Path, help="a JSON file")
    return parser.parse_intermixed_args()


def read_captions(file: Path) -> list[str]:
    """The column `caption` of a CSV, or all lines of a text file that are not empty."""
    with file.open(newline="", encoding="utf-8") as lines:
        if file.suffix == ".csv":
            return [row["caption"] for row in csv.DictReader(lines)]
        return [line.strip() for line in lines if line.strip()]


def in_layout(layout: str, batch: Captions, pad: int) -> Captions:
    """A batch in a layout; the tokenizer pads to the batch's longest, to a multiple of 8."""
    if layout != "padded_77":
        return batch
    ids, mask = batch
    more = 77 - ids.shape[1]  # negative where a caption of 77 was padded to 80
    return functional.pad(ids, (0, more), value=pad), functional.pad(mask, (0, more))


def step(model: TransformersText, layout: str, batch: Captions, device: torch.device) -> None:
    model.packing = "packed" if layout == "packed" else "padded"
    model.zero_grad()
    ids, mask = batch
    with torch.autocast("cuda", torch.bfloat16, enabled=device.type == "cuda"):
        out = model(ids.to(device), mask)
    if out.requires_grad:
        out.square().mean().backward()


def time_steps(
    model: TransformersText,
    batches: list[Captions],
    pad: int,
    rounds: int,
    device: torch.device,
    clock: Callable[[], float],
) -> dict[str, list[float]]:
    """Milliseconds of each layout's steps, after one warm-up step."""
    taken: dict[str, list[float]] = {layout: [] for layout in LAYOUTS}
    for layout in LAYOUTS:
        step(model, layout, in_layout(layout, batches[0], pad), device)
    for number in range(rounds):
        turn = number % len(LAYOUTS)
        for layout in LAYOUTS[turn:] + LAYOUTS[:turn]:
            batch = in_layout(layout, batches[number % len(batches)], pad)
            wait(device)
            start = clock()
            step(model, layout, batch, device)
            wait(device)
            taken[layout].append((clock() - start) * 1e3)
    return taken


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def count_flop(model: TransformersText, batches: list[Captions], pad: int) -> dict[str, int]:
    """FLOP of each layout over all batches."""
    flop: dict[str, int] = {}
    for layout in LAYOUTS:
        counter = FlopCounterMode(display=False)
        # Attention as plain products, which the counter knows on every device.
        with sdpa_kernel(SDPBackend.MATH), counter:
            for batch in batches:
                ids, mask = in_layout(layout, batch, pad)
                # The products of padding are those of a pack in which padding counts as tokens:
                # transformers' own pass asks a mask for its values, and here there are none.
                mask = mask if layout == "packed" else torch.ones_like(mask)
                step(model, "packed", (ids, mask), torch.device("meta"))
        flop[layout] = counter.get_total_flops()
    return flop


def machine(device: torch.device) -> dict[str, Any]:
    """The hardware and versions that the numbers depend on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
    return {
        "device": name,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": [round(load, 1) for load in os.getloadavg()],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": git("rev-parse", "--short", "HEAD"),
        "dirty": bool(git("status", "--porcelain", "--untracked-files=no")),
    }


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()


if __name__ == "__main__":
    main()
