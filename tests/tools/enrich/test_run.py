"""captions.jsonl: whole or not there; a kill loses nothing and repeats nothing."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest

from flap_fast.checks import ConfigError
from flap_fast.data.enriched import caption_key
from flap_fast.data.preprocess.waveform import BadSound
from flap_fast.tools.enrich.prompts import prompt
from flap_fast.tools.enrich.run import Recipe, enrich
from flap_fast.tools.enrich.sources import Clip, Source
from flap_fast.tools.enrich.writer import Written


@dataclass
class Bell:
    """Hears bells: its class' probability is the first sample."""

    name: str = "bell"
    sample_rate_hz: int = 8000
    tagged: list[float] = field(default_factory=list)

    def __call__(self, wave):
        self.tagged.append(float(wave[0]))
        return [("Wind", 0.1), ("Bell, chime", float(wave[0]))]


@dataclass
class Parrot:
    """Says the caption and its key, after `kill_after` batches nothing more."""

    name: str = "parrot"
    said: list[int] = field(default_factory=list)
    kill_after: int | None = None
    is_caption: bool = False
    answers: dict[int, Written] = field(default_factory=dict)

    def __call__(self, prompts, keys):
        if self.kill_after is not None:
            if self.kill_after == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            self.kill_after -= 1
        self.said += keys
        answers = [
            Written(f"New {p.split('|')[-1]}, {k}.", False)
            for p, k in zip(prompts, keys, strict=True)
        ]
        return [self.answers.get(k, a) for k, a in zip(keys, answers, strict=True)]

    def tokens(self, text):
        return len(text.split())


def recipe(**changes) -> Recipe:
    defaults = {"writer": Parrot(), "prompt": prompt("Hear {events}|{caption}", events=True)}
    return Recipe(**{**defaults, "tagger": Bell(), "batch": 4, **changes})


def clips(count: int) -> Source:
    """Of one or two captions: 3 captions in two clips."""

    def sound(n: int):
        return lambda rate: np.full(rate, 0.3 + n / 100, np.float32)

    captions = [[f"sound {n} é"] + [f"another {n}"] * (n % 2) for n in range(count)]
    return Source([Clip(f"c{n}", texts, sound(n)) for n, texts in enumerate(captions)], 0)


def lines(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "captions.jsonl").read_text().splitlines()]


def test_a_line_holds_events_prompt_and_answer(tmp_path):
    writer = Parrot()
    counts = enrich(clips(2), tmp_path, recipe(writer=writer))
    first, second, third = lines(tmp_path)
    key = caption_key("c0", "sound 0 é")
    assert first == {
        "id": "c0",
        "original": "sound 0 é",
        "caption": f"New sound 0 é, {key}.",
        "reason": None,
        "aed": [["Bell, chime", 0.3]],
        "prompt": "Hear Bell, chime|sound 0 é",
        "generated": f"New sound 0 é, {key}.",
        "model": "parrot",
        "seed": 3407,
        "version": first["version"],
    }
    assert [line["original"] for line in (second, third)] == ["sound 1 é", "another 1"]
    assert writer.said == [key, caption_key("c1", "sound 1 é"), caption_key("c1", "another 1")]
    assert counts["enriched"] == 3
    assert sum(counts.values()) == 3
    assert json.loads((tmp_path / "enrich.json").read_text())["counts"] == counts
    assert sorted(f.name for f in tmp_path.iterdir()) == ["captions.jsonl", "enrich.json"]


def test_the_original_stays_and_each_reason_is_counted(tmp_path):
    source = clips(4)
    written = {
        "c0": Written("", False),
        "c1": Written("I'm sorry, I cannot hear sound 1.", False),
        "c2": Written("Sound 2 goes on and", True),
    }
    answers = {caption_key(c.id, c.captions[0]): written[c.id] for c in source.clips[:3]}
    counts = enrich(source, tmp_path, recipe(writer=Parrot(answers=answers)))
    assert {reason: n for reason, n in counts.items() if n} == {
        "enriched": 3,
        "empty": 1,
        "refusal": 1,
        "long": 1,
    }
    kept = [line for line in lines(tmp_path) if line["reason"]]
    assert [line["reason"] for line in kept] == ["empty", "refusal", "long"]
    assert [line["caption"] for line in kept] == [line["original"] for line in kept]
    assert kept[2]["generated"] == "Sound 2 goes on and"


def test_a_sound_that_cannot_be_read_is_not_asked_about(tmp_path):
    def broken(rate: int) -> np.ndarray:
        raise BadSound("missing: no such file")

    source = clips(3)
    source.clips[1] = replace(source.clips[1], read=broken)
    writer = Parrot()
    counts = enrich(source, tmp_path, recipe(writer=writer))
    assert (counts["unheard"], counts["enriched"], len(writer.said)) == (2, 2, 2)
    assert [line["reason"] for line in lines(tmp_path)] == [None, "unheard", "unheard", None]
    alone = [replace(source.clips[1], id="x")]
    assert enrich(Source(alone, 0), tmp_path / "alone", recipe())["unheard"] == 2


def test_a_clip_is_tagged_once_and_without_a_tagger_not_read(tmp_path):
    bell = Bell()
    enrich(clips(4), tmp_path / "a", recipe(tagger=bell))
    assert bell.tagged == pytest.approx([0.3, 0.31, 0.32, 0.33])
    enrich(clips(4), tmp_path / "b", recipe(tagger=None, prompt=prompt("{caption}", events=False)))
    assert all(line["aed"] == [] for line in lines(tmp_path / "b"))


def killed_after(batches: int, source: Source, out: Path) -> None:
    """Enrich in a process of its own that is killed, as by `kill -9`, in its next batch."""
    child = os.fork()
    if child == 0:
        try:
            enrich(source, out, recipe(writer=Parrot(kill_after=batches)))
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == signal.SIGKILL


@pytest.mark.parametrize("torn", [b"", b'{"id": "c2", "orig', '{"id": "é'.encode()[:-1]])
def test_a_kill_in_the_middle_loses_nothing_and_repeats_nothing(tmp_path, torn):
    """15 captions in batches of 4; killed in the third batch, and in the fourth."""
    source = clips(10)
    enrich(source, tmp_path / "whole", recipe())
    out = tmp_path / "out"
    killed_after(2, source, out)
    part = out / "captions.jsonl.part"
    assert not (out / "captions.jsonl").exists()
    assert len(part.read_bytes().splitlines()) == 8
    with part.open("ab") as file:
        file.write(torn)
    killed_after(1, source, out)
    assert len(part.read_bytes().splitlines()) == 12
    writer, seen = Parrot(), []
    enrich(source, out, recipe(writer=writer), seen.append)
    assert seen == [12, 3]
    assert len(writer.said) == 3
    assert (out / "captions.jsonl").read_bytes() == (tmp_path / "whole/captions.jsonl").read_bytes()
    assert not part.exists()


def test_a_batch_that_was_written_in_part_is_written_anew(tmp_path):
    source = clips(6)
    killed_after(1, source, tmp_path)
    part = tmp_path / "captions.jsonl.part"
    part.write_bytes(part.read_bytes() + part.read_bytes().splitlines(keepends=True)[0])
    writer = Parrot()
    enrich(source, tmp_path, recipe(writer=writer))
    assert len(writer.said) == 5
    assert [line["original"] for line in lines(tmp_path)] == [
        text for clip in source.clips for text in clip.captions
    ]


def test_what_is_whole_is_not_written_again(tmp_path):
    counts = enrich(clips(5), tmp_path, recipe())
    before, writer, seen = (tmp_path / "captions.jsonl").stat(), Parrot(), []
    assert enrich(clips(5), tmp_path, recipe(writer=writer), seen.append) == counts
    after = (tmp_path / "captions.jsonl").stat()
    assert (writer.said, seen, after.st_mtime_ns) == ([], [7], before.st_mtime_ns)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, r"got seed = 3407 in '.*enrich.json', not 1; delete"),
        ({"writer": Parrot(name="owl")}, "got model = 'parrot' .* not 'owl'"),
        ({"batch": 2}, "got batch = 4 .* not 2"),
        ({"settings": (("top_p", 0.5),)}, "got top_p = None .* not 0.5"),
        ({"prompt": prompt("{events} {caption}", events=True)}, "got prompt = "),
    ],
)
def test_captions_of_other_settings_are_not_mixed(tmp_path, changes, message):
    killed_after(1, clips(5), tmp_path)
    before = (tmp_path / "captions.jsonl.part").read_bytes()
    with pytest.raises(ConfigError, match=message):
        enrich(clips(5), tmp_path, recipe(**changes))
    with pytest.raises(ConfigError, match="got captions = 7 "):
        enrich(clips(6), tmp_path, recipe())
    assert (tmp_path / "captions.jsonl.part").read_bytes() == before


def test_captions_that_came_from_elsewhere_are_not_overwritten(tmp_path):
    (tmp_path / "captions.jsonl").write_text("mine\n")
    with pytest.raises(ConfigError, match=r"^OUT must be new or made by flap enrich"):
        enrich(clips(2), tmp_path, recipe())
    assert [f.name for f in tmp_path.iterdir()] == ["captions.jsonl"]


def test_two_processes_do_not_write_one_file(tmp_path):
    class Second(Parrot):
        def __call__(self, prompts, keys):
            with pytest.raises(ConfigError, match="must be written by one process"):
                enrich(clips(2), tmp_path, recipe())
            return super().__call__(prompts, keys)

    assert enrich(clips(2), tmp_path, recipe(writer=Second()))["enriched"] == 3
