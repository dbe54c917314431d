"""Labels of the demo's sounds for probes, from their names: writes demo/probes.jsonl.

    python -m bench.demo_probes > demo/probes.jsonl

    instrument_family   of notes: the General MIDI family of their program, the first ten of sixteen
    pitch_register      of notes: very low to very high, in their instrument's range
    drum_kind           of drum samples: by their names

`source` keeps what was recorded together in one fold: notes of one program or of one set of
samples (a piano that three programs play), hard and soft strokes of one drum, numbered takes.

Source: General MIDI System Level 1 (1991), table 1, for the families of programs.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from bench.machine import ROOT

# Of eight programs each. Left out are synthesisers, whose samples are other families', and ethnic
# and percussive instruments and effects, which have little in common.
FAMILIES = (
    *("piano", "chromatic percussion", "organ", "guitar", "bass"),
    *("strings", "ensemble", "brass", "reed", "pipe"),
)
# By the beginnings of samples' names; the first that fits.
DRUMS = {
    "bass drum": r"bd_|drum_bass|(drum|elec)_.*kick",
    "snare drum": r"sn_|drum_snare|elec_.*snare",
    "cymbal": r"drum_cymbal|drum_splash|elec_cymbal",
    "tom": r"drum_tom|elec_fuzz_tom",
    "tabla": r"tabla_",
}
_REGISTER = re.compile(r"An? ((?:very )?(?:low|high)|middle) note ")
_NOTE = re.compile(r"[ _]*[A-Ga-g][#b]? ?\d*[LR]?(\([LR]\))?$")
_STROKE = re.compile(r"(_hard|_soft)?\d*$")


def rows() -> Iterator[dict[str, Any]]:
    """The rows of demo/probes.jsonl, a split for each probe."""
    lines = (ROOT / "demo/manifest.jsonl").read_text().splitlines()
    clips = [json.loads(line) for line in lines]
    notes = [clip for clip in clips if clip["id"].startswith("fluid_")]
    sources = dict(zip((clip["id"] for clip in notes), recordings(notes), strict=True))

    def row(probe: str, clip: dict[str, Any], label: str, source: str) -> dict[str, Any]:
        named = {"audio": clip["audio"], "split": probe, "id": clip["id"]}
        return {**named, "labels": [label], "source": source}

    for clip in notes:
        family = _program(clip) // 8
        if family < len(FAMILIES):
            yield row("instrument_family", clip, FAMILIES[family], sources[clip["id"]])
    for clip in notes:
        register = _REGISTER.match(clip["caption"])
        if register:
            yield row("pitch_register", clip, register[1], sources[clip["id"]])
    for clip in clips:
        name = clip["original_text"]
        kind = next((kind for kind, names in DRUMS.items() if re.match(names, name)), None)
        if clip["source"] == "sonicpi" and kind:
            yield row("drum_kind", clip, kind, _STROKE.sub("", name))


def recordings(notes: list[dict[str, Any]]) -> list[str]:
    """What each note was recorded with: a name that notes of one program or sample set share."""
    programs = [clip["id"].rpartition("_")[0] for clip in notes]
    samples = [_NOTE.sub("", clip["original_text"].partition(" / ")[2]) for clip in notes]
    named = samples
    while True:
        of_program: dict[str, str] = {}
        for program, name in zip(programs, named, strict=True):
            of_program[program] = min(name, of_program.get(program, name))
        of_sample: dict[str, str] = {}
        for program, sample in zip(programs, samples, strict=True):
            name = of_program[program]
            of_sample[sample] = min(name, of_sample.get(sample, name))
        now = [of_sample[sample] for sample in samples]
        if now == named:
            return now
        named = now


def _program(clip: dict[str, Any]) -> int:
    """General MIDI's program, from 0: the middle of fluid_BANK_PROGRAM_SAMPLE."""
    return int(clip["id"].split("_")[2])


if __name__ == "__main__":
    for one in rows():
        print(json.dumps(one))
