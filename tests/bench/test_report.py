"""RESULTS.md says what the results say, and the CPU benchmarks compare like with like."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bench import (
    infonce_cpu,
    lengths_mix,
    loaders,
    losses_cpu,
    microbatch_memory,
    probes,
    report,
    reproduce,
)
from bench.machine import ROOT, machine, save
from bench.sweep import BOTH, FORWARD, Row
from flap_fast.config.file import load_config
from flap_fast.data.tokenize import tokenizer
from flap_fast.tools.profile.lengths import LengthMix


def row(op: str, B: int, provider: str, ms: float, call: str = BOTH, **fields) -> dict:
    found = Row(op, B, provider, call, "measured", median_ms=ms, low_ms=ms, high_ms=ms, rounds=9)
    return asdict(found) | fields


def h100(folder: Path, gpu_tests: dict[str, Any]) -> str:
    """RESULTS.md of an invented sweep on a GPU, with what its GPU tests came to."""
    squared = 8 * 65_536**2 * 512
    rows = [
        row("infonce", 65_536, "ours", 20.0, flops=squared, peak_mib=700.0, gradients_mib=128.0),
        row("infonce", 65_536, "memeff", 50.0),
        row("infonce", 4608, "ours", 0.5),
        row("infonce", 4608, "reference", 0.45),
        row("infonce", 4608, "reference, compiled", 0.6),
        row("patch_embed", 288, "ours", 0.3, FORWARD),
        row("patch_embed", 288, "ours", 0.1, FORWARD, launches=False),
    ]
    facts = machine("cpu") | {"device": "NVIDIA H100", "driver": "580", "dirty": True}
    result = {
        "kind": "sweep",
        "device": "cuda",
        "quick": False,
        "machine": facts,
        "ceilings": {"matmul_tflops": 800.0, "copy_tb_per_s": 3.0},
        "gpu_tests": gpu_tests,
        "rows": rows,
    }
    save(folder, result)
    report.write(folder)
    return (folder / "RESULTS.md").read_text()


def target(text: str, what: str) -> list[str]:
    """The measured value, and whether the target is met."""
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {what}")]
    return [cell.strip() for cell in line.split("|")[3:5]]


def test_targets_take_their_values_from_the_rows(tmp_path):
    text = h100(tmp_path, {"status": "passed", "reason": "invented"})
    assert target(text, "InfoNCE, forward + backward, 65,536") == ["20 ms", "yes"]
    # 8 * 65,536^2 * 512 = 17.59 TFLOP in 20 ms; 700 - 128 MiB are 0.5998 GB.
    assert target(text, "... of its 8 B B D") == ["880 TFLOP/s", "yes"]
    assert "| ... memory above inputs and gradients | <= 0.6 GB | 0.6 GB | yes |" in text
    assert target(text, "... against memeff") == ["2.5 times as fast", "yes"]
    assert target(text, "... against inf_cl") == ["not measured", ""]
    # The faster of the two others counts, and it is faster.
    assert target(text, "InfoNCE, 4,608") == ["0.9 times as fast", "no"]
    assert target(text, "masked patch embedding") == ["100 us", "yes"]
    assert "not measured yet" not in text


def test_results_own_up_to_uncommitted_changes_and_red_tests(tmp_path):
    text = h100(tmp_path, {"status": "failed", "reason": "invented"})
    assert "with uncommitted changes" in text
    assert "GPU tests, compiled: failed (invented)." in text
    # 17.59 TFLOP at 800 TFLOP/s are 22 ms: 110 % of 20 would be a wrong ceiling, and shows.
    assert "| 880 | 110 % |" in text
    # No target is met by a time on a red test.
    assert target(text, "InfoNCE, forward + backward, 65,536") == ["not measured", ""]


def test_infonce_on_a_cpu_is_compared_on_the_same_inputs(tmp_path):
    found = infonce_cpu.measure(64, 96, rounds=2)
    mine, theirs, large = found["rows"]
    assert (mine["B"], theirs["B"], large["B"]) == (64, 64, 96)
    assert max(mine["error"], theirs["error"]) < 1e-4
    assert mine["rounds"] == theirs["rounds"] == 2
    ratio = mine["median_ms"] / theirs["median_ms"]
    assert found["figures"]["time_ratio"] == pytest.approx(ratio)
    save(tmp_path, {"kind": "infonce_cpu", "machine": machine("cpu"), **found})
    report.write(tmp_path)
    text = (tmp_path / "RESULTS.md").read_text()
    assert f"| 64 x 512 | {infonce_cpu.PEER} |" in text
    assert target(text, "InfoNCE on a CPU")[0] == f"{ratio:,.3g}"
    assert "**GPU: not measured yet.**" in text


def test_other_losses_are_compared_with_infonce_in_the_same_run(tmp_path):
    found = losses_cpu.measure(64, rounds=2)
    of = {row["loss"]: row for row in found["rows"]}
    assert of[losses_cpu.PLAIN]["time_ratio"] == 1
    assert found["figures"]["sigmoid_ratio"] == of["sigmoid"]["time_ratio"]
    save(tmp_path, {"kind": "losses_cpu", "machine": machine("cpu"), **found})
    report.write(tmp_path)
    text = (tmp_path / "RESULTS.md").read_text()
    assert target(text, "several positives")[0] == f"{of['positive']['time_ratio']:,.3g}"
    assert "| teacher's probabilities |" in text


def test_pairs_of_the_comparison_share_captions_as_audiocaps_do(monkeypatch):
    asked = {}
    monkeypatch.setattr(losses_cpu, "infonce", lambda **given: asked.update(given))
    losses_cpu.functions(8192)["masked"]()
    clip, caption = asked["ids"].unbind(1)
    assert len(clip.unique()) == 8192
    _, number, count = caption.unique(return_inverse=True, return_counts=True)
    shared = (count[number] > 1).double().mean().item()
    assert shared == pytest.approx(0.116, abs=0.03)


def test_the_memory_of_micro_batches_is_shown_with_its_ratios(tmp_path):
    peaks = {row: 100.0 + row[0] + row[1] / 64 for row in microbatch_memory.ROWS}
    figures = microbatch_memory.figures(peaks)
    assert figures["512 over 64 clips a rank, 2 rank(s)"] == (102 + 16) / (102 + 2)
    assert figures["512 clips on 4 ranks over 1"] == (104 + 8) / (101 + 8)
    row = {"ranks": 2, "global_batch": 1024, "replay": "auto", "peak_mib": 118.0}
    result = {"micro_batch": 32, "rows": [row], "figures": figures}
    save(tmp_path, {"kind": "microbatch_memory", "machine": machine("cpu"), **result})
    report.write(tmp_path)
    text = (tmp_path / "RESULTS.md").read_text()
    assert "| 2 | 1024 | auto | 118 |" in text
    assert "512 clips on 4 ranks over 1: 1.028" in text


def test_every_loader_gives_the_same_sounds(tmp_path, monkeypatch):
    pytest.importorskip("nvidia.dali")
    for name, value in {"BATCH": 2, "FILLING": 1, "TIMED": 1}.items():
        monkeypatch.setattr(loaders, name, value)
    shards = loaders.write_shards(tmp_path, clips=2)
    found = {}
    for case in loaders.LOADER_CASES:
        # Worker processes take seconds to start, and read a clip as the threads do.
        if case.stored_hz == loaders.RATE_HZ and case.loader is not loaders.in_processes:
            batches = case.filled(shards)
            found[case.name] = next(batches).clone()
    assert set(loaders.PEERS) - set(found) == {"soundfile + torchaudio, DataLoader"}
    assert {loaders.DALI, loaders.THREADED} <= set(found)
    first = found[loaders.DALI]
    assert first.shape == (2, 160_000)
    assert first.abs().max() > 0.01
    for name, waves in found.items():
        torch.testing.assert_close(waves, first, rtol=0, atol=1e-6, msg=name)


def test_layouts_of_clips_and_captions_compute_what_they_say():
    """Clips of 2 and of 40 s, captions of 4 and of 9 bytes with their end."""
    settings = [*lengths_mix._VARIABLE, *lengths_mix._SMALL]
    config = load_config(None, settings)
    read = tokenizer(config.text)
    batch = lengths_mix.Drawn(config, np.array([40.0, 2.0]), ["dog", "birdsong"], read)
    assert batch.laid_out("packed") == ((208, 3008), [4, 9])
    assert batch.laid_out("longest") == ((3008, 3008), [16, 16])
    assert batch.laid_out("10 s, 77") == ((1024, 1024), [77, 77])


def test_ratios_of_layouts_are_of_the_same_rounds(tmp_path: Path):
    config = load_config(None, [*lengths_mix._VARIABLE, *lengths_mix._SMALL])
    batch = lengths_mix.Drawn(config, np.array([12.0, 2.0]), ["a", "b"], tokenizer(config.text))
    flop = {"packed": 2 * 10**9, "longest": 4 * 10**9, "10 s, 77": 8 * 10**9}
    times = {"packed": [1.0, 2.0, 9.0], "longest": [2.0, 8.0, 10.0], "10 s, 77": [4.0, 4.0, 9.0]}
    mix = LengthMix("a test", np.array([2.0, 12.0]))
    row = lengths_mix.row_of(mix, [batch], [flop], times)
    found = row["layouts"]
    assert found["longest"]["packed_flop"] == 0.5
    assert found["longest"]["packed_time"] == 0.5
    assert found["10 s, 77"]["gflop_per_clip"] == 4
    assert (found["packed"]["sound_s"], found["10 s, 77"]["sound_s"]) == (7, 6)
    facts = machine("cpu")
    result = {"kind": "lengths_mix", "machine": facts, "batch": 2, "counted": 1, "rounds": 3}
    save(tmp_path, result | {"clock": "cpu", "captions": "some", "tokenizer": "", "rows": [row]})
    report.write(tmp_path)
    written = (tmp_path / "RESULTS.md").read_text()
    assert "| a test | longest | 2 | 7.0 | 0.286 | 8 (2-10) | 0.50 | 0.50 |" in written


def test_probes_of_towers_are_averaged_over_seeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Two seeds of six towers, trained once each and scored on all probes in one call."""
    calls: list[tuple[str, ...]] = []

    def flap(*arguments: str) -> None:
        calls.append(arguments)
        if arguments[0] == "import":
            (tmp_path / arguments[-1]).mkdir(parents=True)
        if arguments[0] == "eval":
            value = 0.25 if "-1-" in arguments[1] else 0.75
            one = {kind: {"accuracy": value} for kind in ("linear", "knn")}
            found = {"joint": one, "pooled": one, "chance": {"accuracy": 0.125}}
            file = Path(arguments[arguments.index("--out") + 1])
            file.parent.mkdir(parents=True)
            file.write_text(json.dumps({"probe": dict.fromkeys(probes.PROBES, found)}))

    monkeypatch.setattr(probes, "flap", flap)
    monkeypatch.setattr(probes, "ROOT", tmp_path)
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    head, *rows = probes.table([1, 2], 150)
    again = len(calls)
    assert probes.table([1, 2], 150) == [head, *rows]
    assert len(calls) == again + 1  # data are prepared; what is scored is not repeated
    assert [arguments[0] for arguments in calls].count("train") == 12
    trained = [c for c in calls if c[0] == "train"]
    (random,) = (c for c in trained if any(s.startswith("run.name=random-1-150-") for s in c))
    assert random.index("train.steps=0") > random.index("train.steps=150")  # the last one counts
    assert rows[0] == ["instrument_family", "contrast", *["50.0 (25.0-75.0)"] * 4]
    assert rows[6] == ["instrument_family", "chance", *["12.5"] * 4]
    assert len(rows) == 21
    config = tmp_path / "configs/demo.yaml"
    config.write_text(config.read_text().replace("lr: 1.0e-3", "lr: 2.0e-3"))
    probes.table([1, 2], 150)
    assert [arguments[0] for arguments in calls].count("train") == 12 + 8  # those of its towers


@pytest.mark.parametrize("name", list(reproduce.COMMANDS))
def test_what_is_reproduced_stands_in_the_report(tmp_path: Path, name: str):
    about = {"kind": f"reproduce_{name}", "machine": machine("cpu"), "command": f"flap {name}"}
    save(tmp_path, {**about, "table": [["a"], ["17"]]})
    report.write(tmp_path)
    text = (tmp_path / "RESULTS.md").read_text()
    assert f"`flap {name}`, by `python -m bench.reproduce {name}`" in text
    assert "| 17 |" in text
