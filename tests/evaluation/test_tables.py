"""Tables beside the papers' rows."""

from __future__ import annotations

import json
import re

import pytest
from rich.console import Console

from flap_fast.evaluation.papers import PRECISION, RETRIEVAL, SENTEVAL, ZERO_SHOT, data_set
from flap_fast.evaluation.tables import latex, markdown, sheets, terminal

FOUND = {"R@1": 0.25, "R@5": 0.5, "R@10": 1.0, "mAP@10": 0.375, "mAP@16": 0.45}
CHANCE = {"R@1": 0.01, "R@5": 0.05, "R@10": 0.1}
SCORES = {
    "retrieval": {
        "test": {
            "audio_to_text": {**FOUND, "mAP@10_laion": 0.5},
            "text_to_audio": FOUND,
            "chance": {"audio_to_text": CHANCE, "text_to_audio": CHANCE},
            "clips": 4,
            "captions": 20,
        }
    },
    "zero_shot": {
        "fold_1": {
            "top_1": 0.75,
            "top_5": 1.0,
            "mAP@10": 0.8,
            "mAP": 0.7,
            "templates": 1,
            "chance": {"top_1": 0.02, "top_5": 0.1},
            "clips": 400,
            "classes": 50,
            "unlabelled": 3,
        }
    },
    "data": {"test": "data/Clotho/test", "fold_1": "data/ESC-50/fold_1"},
}


def test_the_papers_rows_stand_below_ours():
    text = markdown(SCORES)
    ours = f"| this model | {2 * '25.00 | 50.00 | 100.00 | 37.50 | 45.00 | '}".rstrip()
    flap = "(FLAP, Table 2, batch 2304) | 17.2 | 41.1 | 52.8 | - | - | 23.7 | 48.7"
    mean = "(Language encoder, Table 4) | - | - | - | 21.21 | - | - | - | - | 12.24 | - |"
    assert 0 < text.index(ours) < text.index(flap) < text.index(mean)
    assert "as LAION-CLAP computes it: 50.00" in text
    assert "evaluation split" in text
    assert "32.7 | 68.0" not in text  # a row of AudioCaps
    assert "| CyCLAP, trained on Clotho (Language encoder, Tables 7 and 11) | 78.00 |" in text
    assert "3 clips without a label are left out" in text


@pytest.mark.parametrize(
    ("count", "right", "said"),
    [
        (3, True, "20 captions, 3 equal to another clip's (counted as right)"),
        (3, False, "20 captions, 3 equal to another clip's (not counted as right)"),
        (0, False, "20 captions, 0 equal to another clip's"),
    ],
)
def test_tables_say_how_many_captions_are_equal(count: int, right: bool, said: str):
    more = {"equal_captions": count, "equal_captions_are_right": right}
    scores = {"retrieval": {"test": {**SCORES["retrieval"]["test"], **more}}}
    console = Console(width=100, record=True)
    console.print(*terminal(scores))
    assert f"test: 4 clips, {said}\n" in re.sub(r" *\n", "\n", console.export_text())
    assert said.replace("20 captions, ", "Captions: ") + "." in markdown(scores)


def test_scores_of_an_older_version_have_a_dash_for_what_they_lack():
    old = json.loads(json.dumps({"retrieval": SCORES["retrieval"]}).replace("mAP@16", "other"))
    assert "| 37.50 | - |" in markdown(old)
    assert "equal to another" not in markdown(old)
    console = Console(width=80, record=True)
    console.print(*terminal(old))
    assert "0.375" in console.export_text()


def test_zero_shot_rows_are_those_of_as_many_templates():
    many = {**SCORES["zero_shot"]["fold_1"], "templates": 29}
    text = markdown({"zero_shot": {"esc50": many}})
    assert "| CyCLAP, trained on Clotho (Language encoder, Tables 7 and 11) | 77.00 |" in text
    assert "78.00" not in text


def test_every_row_has_a_cell_for_every_heading():
    sts = {"STS12": {"spearman": 0.5, "pairs": 9}, "average": 0.5}
    transfer = {"MR": {"accuracy": 0.5, "sentences": 9}, "average": 0.5}
    geometry = {"alignment": 1.0, "uniformity_audio": -2.0, "uniformity_text": -3.0}
    flops = {"kind": "2d", "unit": "token", "ratio": 0.2, "clips": 8, "kept": 306}
    flops |= {"gflops": 223.5, "gflops_fused": 223.4}
    rest = {"sts": {"a": sts}, "transfer": {"a": transfer}, "geometry": {"a": geometry}}
    found = sheets({**SCORES, **rest, "flops": [flops]})
    assert len(found) == 6
    for sheet in found:
        for row in (*sheet.ours, *sheet.papers):
            assert len(row) == len(sheet.head), row


def test_what_has_no_number_is_a_dash():
    geometry = {"alignment": 1.0, "uniformity_audio": None, "uniformity_text": -3.0}
    assert "| this model | 1.000 | - | -3.000 |" in markdown({"geometry": {"val": geometry}})


@pytest.mark.parametrize(
    ("path", "modality", "said"),
    [
        ("clotho/test", "audio", True),
        ("musiccaps/test", "audio", False),
        ("coco/val", "image", False),
    ],
)
def test_table_4_is_named_where_it_has_the_data(path: str, modality: str, said: bool):
    found = json.loads(json.dumps(SCORES["retrieval"]["test"]).replace("audio", modality))
    text = markdown({"retrieval": {"test": found}, "data": {"test": path}})
    assert "| CLAP" in text or "| CLIP" in text
    assert ("which is what Language encoder, Table 4 reports" in text) == said


def test_the_terminal_shows_every_digit_on_80_columns_and_names_as_they_are():
    names = ("STS12", "STS13", "STS14", "STS15", "STS16", "STSBenchmark", "SICKRelatedness")
    sts = {name: {"spearman": (70 + n) / 100, "pairs": 9} for n, name in enumerate(names)}
    odd = {"u[/val]": {"spearman": 0.5, "pairs": 9}}
    console = Console(width=80, record=True)
    for one in terminal({"sts": {"senteval": {**sts, "average": 0.7777}, "f": odd}}):
        console.print(one)
    text = console.export_text()
    assert all(f"{70 + n}.00" in text for n in range(7))
    assert "77.77" in text
    assert "u[/val]" in text
    assert "…" not in text


def test_latex_escapes_what_it_would_stumble_over():
    text = latex({"zero_shot": {"fold_1 & 50% {x}\\": SCORES["zero_shot"]["fold_1"]}})
    assert r"fold\_1 \& 50\% \{x\}\textbackslash " in text
    assert text.count(r"\toprule") == text.count(r"\bottomrule") == 1
    assert r"\begin{tabular}{lrrrr}" in text


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("data/audiocaps/test", "AudioCaps"),
        ("/d/Clotho_v2.1/evaluation", "Clotho"),
        ("esc-50", "ESC50"),
        ("UrbanSound8K/all", "US8K"),
        ("mine/val", None),
        ("coco/sounds/val", None),
        ("recordings/coconut/val", None),
    ],
)
def test_sounds_are_known_by_their_paths(path: str, name: str | None):
    assert data_set(path, "audio") == name


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("cifar100/test", "CIFAR100"),
        ("cifar-10/test", "CIFAR10"),
        ("imagenet-a/val", "ImageNet-A"),
        ("imagenet/val", "ImageNet1K"),
        ("imagenet_sketch", "Sketch"),
        ("ms-coco/val", "MSCOCO"),
        ("coco2017/val", "MSCOCO"),
        ("coconut/val", None),
        ("cocoa_pods/test", None),
        ("esc-50", None),
    ],
)
def test_images_are_known_by_their_paths(path: str, name: str | None):
    assert data_set(path, "image") == name


def test_the_papers_figures_are_all_there():
    """Counted in the papers' tables; a cell that was lost or doubled would be seen."""
    counts = {name: len(rows) for name, rows in RETRIEVAL.items()}
    assert counts == {"AudioCaps": 21, "Clotho": 21, "MusicCaps": 4, "MSCOCO": 8, "Flickr30K": 4}
    for rows in RETRIEVAL.values():
        for row in rows:
            for three in (row.text_to_media, row.media_to_text):
                at_1, at_5, at_10 = map(float, three.split())
                assert at_1 < at_5 < at_10 <= 100
    assert [len(rows) for rows in ZERO_SHOT.values()] == [8] * 10
    assert len(PRECISION) == 2
    assert len(SENTEVAL) == 8
