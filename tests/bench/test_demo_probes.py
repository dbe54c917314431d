"""The demo's probes: their rule, and that each class can be held out."""

from __future__ import annotations

import json
from collections import Counter

from bench import demo_probes
from bench.machine import ROOT
from flap_fast.preparation.manifest import read_manifest


def test_the_demos_probes_are_what_their_rule_gives():
    lines = (ROOT / "demo/probes.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == list(demo_probes.rows())


def test_each_class_of_the_demos_probes_has_three_sources_and_each_sound_exists():
    demo = ROOT / "demo"
    clips = read_manifest(demo / "probes.jsonl")
    assert all(clip.audio.is_file() and len(clip.labels) == 1 for clip in clips)
    found: dict[tuple[str, str], set] = {}
    for clip in clips:
        found.setdefault((clip.split, clip.labels[0]), set()).add(clip.original["source"])
    classes = Counter(probe for probe, _ in found)
    assert classes == {"instrument_family": 10, "pitch_register": 5, "drum_kind": 5}
    assert min(map(len, found.values())) >= 3


def test_notes_of_one_set_of_samples_or_of_one_program_have_one_source():
    clips = read_manifest(ROOT / "demo/probes.jsonl")
    source = {clip.id: clip.original["source"] for clip in clips}
    # One piano that three programs play, and takes of one stroke; an oboe is none of a piano's.
    assert source["fluid_0_000_195"] == source["fluid_0_001_191"] == source["fluid_0_003_187"]
    assert source["sonicpi_tabla_ghe1"] == source["sonicpi_tabla_ghe8"]
    assert source["sonicpi_drum_tom_hi_hard"] == source["sonicpi_drum_tom_hi_soft"]
    assert source["fluid_0_068_451"] != source["fluid_0_000_195"]
