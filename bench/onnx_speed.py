"""A model by onnxruntime against PyTorch, on one core: time, file sizes, cosine, R@10.

    python -m bench.onnx_speed demo RUN DATA    a run, on the sounds and captions of its shards
    python -m bench.onnx_speed vit              ViT-B and RoBERTa of FLAP's sizes, random weights
    python -m bench.onnx_speed htsat            the same with LAION-CLAP's HTSAT

A sound's time is that from its samples to its embedding, front end included, one sound at a time; a
caption's that from its tokens, alone and as one of 32. A round is PyTorch, float32, int8, PyTorch;
a ratio is to the mean of both PyTorchs of its round: median, least and most. The real-time factor
is the median time by the sound's. `--clock cpu` counts the time that this process was given, for a
CPU that others use too.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from onnxruntime import InferenceSession, SessionOptions  # pyright: ignore

from bench.machine import machine
from flap_fast.config.file import load_config
from flap_fast.data.preprocess.waveform import crop_and_fill, read_sound
from flap_fast.data.shards import Shards, open_shards
from flap_fast.evaluation.retrieval import retrieval
from flap_fast.interchange.to_onnx.folder import export_onnx
from flap_fast.model.model_folder import save_model
from flap_fast.model.two_towers import TwoTowers
from flap_fast.tools.embedder import Embedder, load

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
RANDOM = {
    "vit": ("audio.size=base", "mask.kind=none"),
    "htsat": ("audio.encoder=htsat",),
}
CAPTIONS = (
    "A dog barks twice while rain falls on a tin roof and a car passes by slowly",
    "Someone plays a short melody on a piano in a large hall",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", choices=["demo", *RANDOM])
    parser.add_argument("run", nargs="?", type=Path)
    parser.add_argument("data", nargs="?", type=Path)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as work:
        run = args.run if args.model == "demo" else random_model(args.model, Path(work) / "run")
        out = Path(work) / "onnx"
        print(export_onnx(run, out))
        ours = load(run, "cpu")
        shards = open_shards([args.data], ("sounds",)) if args.model == "demo" else None
        waves = sounds(ours, shards)
        found = measured(ours, out, waves, args.rounds, CLOCKS[args.clock])
        if shards is not None:
            found["retrieval"] = {
                name: retrieved(embed, ours, shards)
                for name, embed in {"pytorch": ours, **models(out)}.items()
            }
    print(json.dumps({"model": args.model, "clock": args.clock, **found}, indent=1))
    print(json.dumps(machine("cpu")))


def random_model(name: str, folder: Path) -> Path:
    config = load_config(None, RANDOM[name])
    torch.manual_seed(0)
    model = TwoTowers(config)
    save_model(folder, config, model, model.state_dict())
    return folder


def sounds(ours: Embedder, shards: Shards | None) -> list[np.ndarray]:
    """Waveforms at the model's rate: 16 of the shards, or one of 10 s."""
    rate = ours.config.audio.sample_rate_hz
    if shards is None:
        return [0.1 * np.random.default_rng(0).standard_normal(10 * rate).astype(np.float32)]
    return [read_sound(shards.encoded(n), rate) for n in range(0, len(shards), len(shards) // 16)]


def measured(
    ours: Embedder, out: Path, waves: list[np.ndarray], rounds: int, clock: Callable[[], float]
) -> dict[str, Any]:
    """Times, cosines and sizes."""
    options = SessionOptions()
    options.intra_op_num_threads = 1
    files = ("frontend", "audio", "audio.int8", "text", "text.int8")
    session: dict[str, Any] = {
        name: InferenceSession(out / f"{name}.onnx", options) for name in files
    }
    audio = ours.config.audio

    def by_pytorch(wave: np.ndarray) -> np.ndarray:
        return ours._embed_waves([crop_and_fill(wave, 0.5, audio)]).numpy()

    def by_onnx(tower: str) -> Callable[[np.ndarray], np.ndarray]:
        def embed(wave: np.ndarray) -> np.ndarray:
            (media,) = session["frontend"].run(None, {"wave": wave[None]})
            return session[tower].run(None, {"media": media})[0]

        return embed

    ways = {"float32": by_onnx("audio"), "int8": by_onnx("audio.int8")}
    seconds = sum(len(wave) for wave in waves) / audio.sample_rate_hz
    front_end = [timed(lambda w: session["frontend"].run(None, {"wave": w[None]}), waves, clock)]
    found: dict[str, Any] = {
        "sounds": len(waves),
        "seconds": round(seconds, 1),
        "megabytes": {
            name: round((out / f"{name}.onnx").stat().st_size / 1e6, 1) for name in files
        },
        "front_end_real_time_factor": front_end[0] / seconds,
        "least_cosine": {name: least_cosine(by_pytorch, way, waves) for name, way in ways.items()},
        "sound": compared(by_pytorch, ways, waves, rounds, clock, per=seconds),
    }
    for count in (1, 32):
        ids, mask = ours.tokenizer([CAPTIONS[n % 2] for n in range(count)])
        feed = {"ids": ids.numpy(), "attention_mask": mask.numpy()}

        @torch.no_grad()
        def text(_: Any, ids: Any = ids, mask: Any = mask) -> Any:
            return ours.model.embed_text(ids, mask)

        others = {
            kind: lambda _, name=name, feed=feed: session[name].run(None, feed)
            for kind, name in (("float32", "text"), ("int8", "text.int8"))
        }
        found[f"captions_{count}"] = compared(text, others, [None], rounds, clock, per=count)
    return found


def compared(
    pytorch: Callable[[Any], Any],
    others: dict[str, Callable[[Any], Any]],
    inputs: Sequence[Any],
    rounds: int,
    clock: Callable[[], float],
    per: float,
) -> dict[str, Any]:
    """Time by the unit of `per`, and each way's ratio to PyTorch, in rounds of A B C A."""
    times: dict[str, list[float]] = {"pytorch": [], **{name: [] for name in others}}
    ratios: dict[str, list[float]] = {name: [] for name in others}
    for _ in range(rounds + 1):
        first = timed(pytorch, inputs, clock)
        each = {name: timed(other, inputs, clock) for name, other in others.items()}
        base = (first + timed(pytorch, inputs, clock)) / 2
        times["pytorch"].append(base / per)
        for name, value in each.items():
            times[name].append(value / per)
            ratios[name].append(value / base)
    return {  # the first round is the warm-up
        "time_per_unit": {name: statistics.median(some[1:]) for name, some in times.items()},
        "ratio": {
            name: [statistics.median(some[1:]), min(some[1:]), max(some[1:])]
            for name, some in ratios.items()
        },
    }


def timed(way: Callable[[Any], Any], inputs: Sequence[Any], clock: Callable[[], float]) -> float:
    start = clock()
    for some in inputs:
        way(some)
    return clock() - start


def least_cosine(pytorch: Callable, other: Callable, waves: list[np.ndarray]) -> float:
    return min(float((pytorch(wave) * other(wave)).sum()) for wave in waves)


def models(out: Path) -> dict[str, Any]:
    """The program in the folder, as one without this package runs it."""
    spec = importlib.util.spec_from_file_location("embed", out / "embed.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return {"float32": module.Model(out), "int8": module.Model(out, int8=True)}


def retrieved(model: Any, ours: Embedder, shards: Shards) -> dict[str, float]:
    """R@10 and mAP@10 of both directions, each sound's middle; of int8 the least cosines too."""
    captions, clips, media, cosines = [], [], [], []
    with tempfile.TemporaryDirectory() as work:
        for n in range(len(shards)):
            texts = shards.record(n)["text"]
            captions += texts
            clips += [n] * len(texts)
            file = Path(work) / "sound.flac"
            file.write_bytes(shards.encoded(n))
            wanted = ours.embed_audio([file], crop="center").numpy()
            found = wanted if isinstance(model, Embedder) else model.embed(file)
            cosines.append(float((found * wanted).sum()))
            media.append(found[0])
    wanted = ours.embed_text(captions).numpy()
    text = wanted if isinstance(model, Embedder) else model.embed_text(captions)
    rows = torch.from_numpy(np.stack(media)), torch.from_numpy(np.asarray(text))
    scores = retrieval(*rows, torch.tensor(clips), modality="audio")
    found = {
        f"{direction} {name}": round(scores[direction][name], 4)
        for direction in ("audio_to_text", "text_to_audio")
        for name in ("R@10", "mAP@10")
    }
    least = {"audio": min(cosines), "text": float((rows[1].numpy() * wanted).sum(1).min())}
    return found | {f"least cosine {name}": round(value, 6) for name, value in least.items()}


if __name__ == "__main__":
    main()
