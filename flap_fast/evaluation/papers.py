"""Results of the papers, for comparison with ours; percentages as printed.

FLAP's Clotho rows are of the official evaluation split, the language-encoder paper's of the
official validation split; both use five captions a clip.

Source: FLAP, arXiv 2311.01615, Tables 2 and 3; "On the Language Encoder of Contrastive Cross-modal
Models", Tables 3 to 7 and 11 to 17.
"""

from __future__ import annotations

import re
from typing import NamedTuple

FLAP_2 = "FLAP, Table 2, batch 2304"
FLAP_2_4608 = "FLAP, Table 2, batch 4608"
FLAP_3 = "FLAP, Table 3 (fusion), batch 2304"
FLAP_3_4608 = "FLAP, Table 3 (fusion), batch 4608"
LE_3 = "Language encoder, Tables 3 and 14"
LE_4 = "Language encoder, Table 4"
LE_5 = "Language encoder, Table 5"
LE_6_17 = "Language encoder, Tables 6 and 17"
LE_7_11 = "Language encoder, Tables 7 and 11"
LE_13 = "Language encoder, Table 13"
LE_15 = "Language encoder, Table 15"
LE_16 = "Language encoder, Table 16"


class Retrieved(NamedTuple):
    """R@1, R@5 and R@10 of both directions."""

    system: str
    source: str
    text_to_media: str
    media_to_text: str


class Precision(NamedTuple):
    """mAP@10 of both directions; media to text as LAION-CLAP computes it."""

    system: str
    source: str
    text_to_media: str
    media_to_text: str


class Classified(NamedTuple):
    """Zero-shot top-1 with one template and with many; empty if not reported."""

    system: str
    source: str
    one: str
    many: str


class Sentences(NamedTuple):
    """Averages over the seven STS sets and over the seven transfer tasks."""

    system: str
    source: str
    sts: str
    transfer: str


RETRIEVAL: dict[str, tuple[Retrieved, ...]] = {
    "AudioCaps": (
        Retrieved("LS-CLAP", FLAP_2, "32.7 68.0 81.2", "43.9 77.7 87.6"),
        Retrieved("FLAP without masking", FLAP_2, "34.8 70.0 82.7", "49.0 79.5 88.7"),
        Retrieved("FLAP 1-D 0.4", FLAP_2, "36.0 70.5 83.0", "49.0 78.9 89.2"),
        Retrieved("FLAP 1-D 0.4 + recon", FLAP_2, "36.7 71.2 83.3", "47.2 81.9 90.0"),
        Retrieved("FLAP 2-D 0.2/0.2", FLAP_2, "37.5 73.5 84.6", "49.6 82.3 89.4"),
        Retrieved("FLAP 2-D + recon", FLAP_2, "37.2 73.0 84.9", "50.3 81.4 90.0"),
        Retrieved("FLAP 2-D", FLAP_2_4608, "38.3 73.6 85.1", "50.6 83.1 91.2"),
        Retrieved("FLAP 2-D + LLM-aug", FLAP_2_4608, "40.4 74.7 85.0", "51.5 82.5 92.5"),
        Retrieved("LS-CLAP", FLAP_3, "36.2 70.3 82.5", "45.0 76.7 88.0"),
        Retrieved("FLAP 2-D", FLAP_3, "38.6 74.2 85.6", "49.6 83.8 91.1"),
        Retrieved("FLAP 2-D + recon", FLAP_3, "40.1 74.8 86.0", "50.8 81.9 91.0"),
        Retrieved("FLAP 2-D", FLAP_3_4608, "39.9 75.4 86.6", "50.6 81.7 91.9"),
        Retrieved("FLAP 2-D + LLM-aug", FLAP_3_4608, "41.5 75.5 86.0", "53.0 84.1 92.6"),
        Retrieved("CLAP", LE_5, "34.82 70.62 82.93", "44.10 76.80 87.67"),
        Retrieved("CLAPs", LE_5, "34.69 69.80 82.99", "42.73 75.44 87.57"),
        Retrieved("CyCLAP", LE_5, "34.13 69.24 82.30", "40.65 74.19 86.52"),
        Retrieved("CyCLAPs", LE_5, "34.23 70.24 82.74", "39.81 74.40 85.79"),
        Retrieved("CLAP from scratch", LE_13, "14.19 40.02 53.98", "16.30 43.78 58.41"),
        Retrieved("CLAPs from scratch", LE_13, "13.81 38.60 52.02", "17.76 44.10 57.99"),
        Retrieved("CyCLAP from scratch", LE_13, "14.96 39.94 54.67", "18.81 44.83 61.23"),
        Retrieved("CyCLAPs from scratch", LE_13, "13.96 40.56 54.84", "18.18 47.23 61.02"),
    ),
    "Clotho": (
        Retrieved("LS-CLAP", FLAP_2, "15.6 38.6 52.3", "23.7 48.9 59.9"),
        Retrieved("FLAP without masking", FLAP_2, "16.3 41.4 53.9", "23.0 49.2 61.4"),
        Retrieved("FLAP 1-D 0.4", FLAP_2, "16.8 40.7 53.4", "23.9 48.9 61.2"),
        Retrieved("FLAP 1-D 0.4 + recon", FLAP_2, "15.6 39.5 51.9", "21.7 50.6 61.3"),
        Retrieved("FLAP 2-D 0.2/0.2", FLAP_2, "17.2 41.1 52.8", "23.7 48.7 62.3"),
        Retrieved("FLAP 2-D + recon", FLAP_2, "17.0 41.2 53.5", "22.4 49.0 62.7"),
        Retrieved("FLAP 2-D", FLAP_2_4608, "16.7 41.5 54.2", "23.0 48.6 62.9"),
        Retrieved("FLAP 2-D + LLM-aug", FLAP_2_4608, "17.4 41.3 53.7", "21.6 51.2 63.1"),
        Retrieved("LS-CLAP", FLAP_3, "17.2 42.9 55.4", "24.2 51.1 66.9"),
        Retrieved("FLAP 2-D", FLAP_3, "17.3 43.1 55.7", "24.4 53.2 66.4"),
        Retrieved("FLAP 2-D + recon", FLAP_3, "17.8 44.0 56.3", "24.6 53.0 66.7"),
        Retrieved("FLAP 2-D", FLAP_3_4608, "17.5 43.4 56.0", "24.4 52.1 67.1"),
        Retrieved("FLAP 2-D + LLM-aug", FLAP_3_4608, "20.3 46.5 58.8", "25.5 53.4 67.9"),
        Retrieved("CLAP", LE_5, "11.67 33.80 47.10", "13.88 34.16 48.90"),
        Retrieved("CLAPs", LE_5, "11.92 32.54 45.47", "13.49 35.60 49.00"),
        Retrieved("CyCLAP", LE_5, "11.90 34.95 48.61", "14.74 35.50 48.52"),
        Retrieved("CyCLAPs", LE_5, "12.08 34.09 46.76", "14.93 36.84 51.00"),
        Retrieved("CLAP from scratch", LE_13, "2.28 7.94 13.47", "2.30 7.85 13.88"),
        Retrieved("CLAPs from scratch", LE_13, "2.81 8.84 14.91", "2.11 8.32 15.98"),
        Retrieved("CyCLAP from scratch", LE_13, "2.07 7.67 13.11", "2.97 9.09 14.07"),
        Retrieved("CyCLAPs from scratch", LE_13, "2.64 8.88 14.87", "3.54 10.05 15.41"),
    ),
    "MusicCaps": (
        Retrieved("CLAP", LE_15, "5.46 18.45 28.50", "6.05 18.42 28.33"),
        Retrieved("CLAPs", LE_15, "6.05 19.01 28.43", "5.99 18.66 28.85"),
        Retrieved("CyCLAP", LE_15, "6.69 18.87 29.45", "6.37 18.98 29.45"),
        Retrieved("CyCLAPs", LE_15, "6.62 19.36 29.13", "6.34 20.06 30.08"),
    ),
    "MSCOCO": (
        Retrieved("CLIP", LE_3, "12.48 31.10 42.23", "15.70 37.22 49.06"),
        Retrieved("CLIPs", LE_3, "13.46 32.93 44.09", "17.78 38.92 50.10"),
        Retrieved("CLIPn", LE_3, "13.12 31.46 42.55", "15.74 35.66 47.38"),
        Retrieved("CLIPe", LE_3, "13.21 31.21 42.26", "16.90 38.40 49.92"),
        Retrieved("CyCLIP", LE_3, "15.40 35.61 46.95", "18.92 41.46 54.00"),
        Retrieved("CyCLIPs", LE_3, "16.69 37.75 49.24", "21.30 44.34 56.54"),
        Retrieved("CyCLIPn", LE_3, "14.53 34.07 45.52", "16.32 36.76 48.16"),
        Retrieved("CyCLIPe", LE_3, "14.05 32.56 43.15", "16.22 37.52 49.22"),
    ),
    "Flickr30K": (
        Retrieved("CLIP", LE_3, "25.50 52.28 64.34", "31.80 62.10 72.90"),
        Retrieved("CLIPs", LE_3, "26.70 52.34 64.32", "35.20 63.20 75.30"),
        Retrieved("CyCLIP", LE_3, "30.22 56.70 67.40", "37.30 66.10 76.40"),
        Retrieved("CyCLIPs", LE_3, "31.74 58.02 69.46", "40.00 69.30 79.70"),
    ),
}

PRECISION: dict[str, tuple[Precision, ...]] = {
    "AudioCaps": (
        Precision("CLAP, reproduced", LE_4, "55.60", "51.34"),
        Precision("CLAP, LAION's figures", LE_4, "51.30", "45.70"),
    ),
    "Clotho": (
        Precision("CLAP, reproduced", LE_4, "21.21", "12.24"),
        Precision("CLAP, LAION's figures", LE_4, "20.40", "13.80"),
    ),
}

ZERO_SHOT: dict[str, tuple[Classified, ...]] = {
    "ESC50": (
        Classified("CLAP, trained on Clotho", LE_7_11, "72.25", "73.00"),
        Classified("CLAPs, trained on Clotho", LE_7_11, "71.75", "73.25"),
        Classified("CyCLAP, trained on Clotho", LE_7_11, "78.00", "77.00"),
        Classified("CyCLAPs, trained on Clotho", LE_7_11, "75.75", "77.75"),
        Classified("CLAP, trained on AudioCaps", LE_7_11, "74.50", "79.25"),
        Classified("CLAPs, trained on AudioCaps", LE_7_11, "72.75", "75.00"),
        Classified("CyCLAP, trained on AudioCaps", LE_7_11, "77.50", "80.50"),
        Classified("CyCLAPs, trained on AudioCaps", LE_7_11, "75.50", "78.50"),
    ),
    "US8K": (
        Classified("CLAP, trained on Clotho", LE_7_11, "67.76", "69.64"),
        Classified("CLAPs, trained on Clotho", LE_7_11, "67.42", "70.27"),
        Classified("CyCLAP, trained on Clotho", LE_7_11, "70.46", "71.82"),
        Classified("CyCLAPs, trained on Clotho", LE_7_11, "65.98", "68.75"),
        Classified("CLAP, trained on AudioCaps", LE_7_11, "69.78", "72.00"),
        Classified("CLAPs, trained on AudioCaps", LE_7_11, "64.14", "66.49"),
        Classified("CyCLAP, trained on AudioCaps", LE_7_11, "67.90", "69.46"),
        Classified("CyCLAPs, trained on AudioCaps", LE_7_11, "66.94", "69.38"),
    ),
}
_VISION_SYSTEMS = ("CLIP", "CLIPn", "CLIPe", "CLIPs", "CyCLIP", "CyCLIPn", "CyCLIPe", "CyCLIPs")
_VISION = {
    "CIFAR10": "28.31 44.06 33.97 36.80 38.67 41.16 50.48 44.97",
    "CIFAR100": "13.23 17.93 12.30 10.72 17.44 19.82 21.76 22.05",
    "ImageNet1K": "14.94 15.97 15.74 16.01 20.99 18.13 20.07 22.13",
    "ImageNetV2": "12.85 13.41 13.51 14.09 17.77 15.65 17.34 18.68",
    "Sketch": "7.72 7.75 6.36 8.14 11.67 9.93 11.54 12.85",
    "ImageNet-O": "20.75 21.95 20.45 21.30 27.05 24.45 27.20 29.55",
    "ImageNet-A": "3.59 3.41 3.59 3.95 5.03 4.45 4.93 5.19",
    "ImageNet-R": "18.39 18.51 18.25 18.24 24.37 23.07 24.36 26.72",
}
ZERO_SHOT |= {
    name: tuple(
        Classified(system, LE_6_17, "", top_1)
        for system, top_1 in zip(_VISION_SYSTEMS, line.split(), strict=True)
    )
    for name, line in _VISION.items()
}

SENTEVAL = (
    Sentences("CLIP", LE_16, "55.45", "67.03"),
    Sentences("CLIPn", LE_16, "64.50", "68.68"),
    Sentences("CLIPe", LE_16, "54.60", "66.10"),
    Sentences("CLIPs", LE_16, "57.58", "67.64"),
    Sentences("CyCLIP", LE_16, "53.72", "65.82"),
    Sentences("CyCLIPn", LE_16, "49.70", "69.49"),
    Sentences("CyCLIPe", LE_16, "39.69", "65.41"),
    Sentences("CyCLIPs", LE_16, "55.67", "67.95"),
)

# What a data set may be called in a path, without signs between letters and digits.
_PATTERNS: dict[str, dict[str, str]] = {
    "audio": {
        "AudioCaps": "audiocaps",
        "Clotho": "clotho",
        "MusicCaps": "musiccaps",
        "ESC50": "esc50",
        "US8K": "us8k|urbansound8k",
    },
    "image": {
        "MSCOCO": "^(ms)?coco(?!nut|a)",
        "Flickr30K": "flickr30k",
        "CIFAR100": "cifar100",
        "CIFAR10": "cifar10(?!0)",
        "ImageNetV2": "imagenetv2",
        "Sketch": "imagenetsketch",
        "ImageNet-O": "imageneto(?![a-z])",
        "ImageNet-A": "imageneta(?![a-z])",
        "ImageNet-R": "imagenetr(?![a-z])",
        "ImageNet1K": "imagenet1k|imagenet(?![a-z0-9])",
    },
}


def data_set(path: str, modality: str) -> str | None:
    """The papers' name of a data set, from the last three parts of its path; None of others."""
    for part in reversed(path.split("/")[-3:]):
        plain = re.sub(r"[-_. ]", "", part.lower())
        for name, pattern in _PATTERNS.get(modality, {}).items():
            if re.search(pattern, plain):
                return name
    return None


def cited(row: Retrieved | Precision | Classified | Sentences) -> str:
    """The system and where it is reported."""
    return f"{row.system} ({row.source})"
