"""Time and memory of `flap embed` on a recording of an hour, by format and crops.

    python -m bench.long_sounds [--minutes 60] [--crops center multi:4 whole windows:10:5]

48 kHz stereo as WAV, FLAC and MP3, a small ViT of 10 s at 32 kHz with random weights, one decoding
thread. Each row is a process of its own. Its memory is the peak resident memory above what was
resident when the model had embedded a short sound, so the model's own for a batch is in it: the row
`10 s` shows that, of as many sounds of 10 s as the hour has windows. Its time is over that of
soundfile alone, which reads the file once in blocks. Linux only.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import soundfile
import torch

RATE = 48_000
FORMATS = ("wav", "flac", "mp3")
_SETTINGS = (
    *("audio.width=64", "audio.depth=2", "audio.heads=2", "audio.sample_rate_hz=32000"),
    *("audio.high_hz=14000", "text.width=32", "text.depth=2", "text.heads=2"),
    *("joint.width=16", "frontend.threads=1"),
)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.long_sounds")
    parser.add_argument("--minutes", type=int, default=60)
    parser.add_argument("--crops", nargs="+", default=["center", "multi:4", "whole"])
    parser.add_argument(
        "--one", nargs=4, metavar=("MODEL", "FILE", "CROP", "TIMES"), help="measure a row"
    )
    asked = parser.parse_args()
    if asked.one:
        model, file, crop, times = asked.one
        print(json.dumps(measured(Path(model), [Path(file)] * int(times), crop)))
        return
    with tempfile.TemporaryDirectory() as folder:
        model = write_model(Path(folder, "model"))
        print("format  crops    peak MiB above idle      s  of reading alone")
        short = write_recording(Path(folder, "10s.wav"), 1 / 6)
        row = row_of(model, short, "center", 6 * asked.minutes)
        print(f"10 s    center   {row['peak_mib']:19.0f}  {row['took_s']:5.1f}", flush=True)
        for format in FORMATS:
            file = write_recording(Path(folder, f"hour.{format}"), asked.minutes)
            alone_s = reading_s(file)
            for crop in asked.crops:
                row = row_of(model, file, crop, 1)
                peak, took_s = row["peak_mib"], row["took_s"]
                figures = f"{peak:19.0f}  {took_s:5.1f}  {took_s / alone_s:16.2f}"
                print(f"{format:6}  {crop:7}  {figures}", flush=True)
            print(f"{format:6}  reading alone                {alone_s:5.1f}", flush=True)
            file.unlink()


def row_of(model: Path, file: Path, crop: str, times: int) -> dict[str, float]:
    """What `measured` gives in a process of its own."""
    arguments = ["--one", str(model), str(file), crop, str(times)]
    command = [sys.executable, "-m", "bench.long_sounds", *arguments]
    return json.loads(subprocess.check_output(command, text=True).splitlines()[-1])


def write_recording(file: Path, minutes: float) -> Path:
    """Noise and a tone that rises, another noise in each channel; returns the file."""
    random = np.random.default_rng(0)
    t = np.arange(10 * RATE) / RATE
    with soundfile.SoundFile(file, "w", RATE, 2) as f:
        for n in range(round(6 * minutes)):
            noise = 0.02 * random.standard_normal((len(t), 2))
            f.write((noise + 0.2 * np.sin((300 + n) * 2 * np.pi * t)[:, None]).astype("f4"))
    return file


def reading_s(file: Path) -> float:
    """Seconds that soundfile takes for all samples, in blocks of the size that reading uses."""
    start = time.perf_counter()
    with soundfile.SoundFile(file) as f:
        while len(f.read(2**17, dtype="float32")):
            pass
    return time.perf_counter() - start


def write_model(folder: Path) -> Path:
    """A checkpoint with random weights."""
    from flap_fast.config.file import load_config
    from flap_fast.model.model_folder import save_model
    from flap_fast.model.two_towers import TwoTowers

    config = load_config(None, list(_SETTINGS))
    torch.manual_seed(0)
    model = TwoTowers(config)
    save_model(folder, config, model, model.state_dict())
    return folder


def measured(model: Path, files: list[Path], crop: str) -> dict[str, float]:
    """Embed a short sound, then the files; the peak and the seconds of these."""
    from flap_fast.tools.embed_files import embed_files

    short = model.parent / "short.wav"
    soundfile.write(short, np.random.default_rng(0).standard_normal(RATE), RATE)
    with tempfile.TemporaryDirectory() as out:
        embed_files(model, [short], Path(out, "warm"))
        Path("/proc/self/clear_refs").write_text("5")  # the peak is that from now on
        idle = _resident_mib("VmRSS")
        start = time.perf_counter()
        embedded = embed_files(model, files, Path(out, "all"), crop=crop)
        took_s = time.perf_counter() - start
        assert (embedded.windowed or embedded.rows) == len(files)
        return {"peak_mib": _resident_mib("VmHWM") - idle, "took_s": took_s}


def _resident_mib(name: str) -> float:
    status = Path("/proc/self/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith(name))
    return int(line.split()[1]) / 1024


if __name__ == "__main__":
    main()
