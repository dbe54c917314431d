"""Sentences around a class name: zero-shot prompts.

Source: the language-encoder paper, Table 12, and CLIP's ImageNet prompts, which CyCLIP
uses for every image data set.
"""

from __future__ import annotations

import os

from flap_fast.checks import read_text, require

LABEL = "{label}"
SOUND = "This is a sound of {label}."

AUDIO_29 = (
    "A sound of {label}",
    "a sound of {label}.",
    "A constant sound of {label}",
    "A constant sound of {label}.",
    "a constant sound of {label}",
    "a constant sound of {label}.",
    "A big sound of {label}",
    "a big sound of {label}",
    "A big sound of {label}.",
    "A small sound of {label}",
    "a small sound of {label}",
    "A small sound of {label}.",
    "A {label} is making a sound.",
    "a {label} is making a sound",
    "An {label} is making a sound.",
    "an {label} is making a sound",
    "A sound of {label} followed by a sound of {label}",
    "A sound of {label} followed by {label}",
    "A {label} ",
    "A {label}",
    "An {label}",
    "an {label}",
    "{label} ",
    "{label}",
    "{label} and {label}",
    "A {label} is running.",
    "A {label} is running",
    "A {label} is happening.",
    "A {label} is happening",
)

# fmt: off
IMAGENET_80 = (
    "a bad photo of a {label}.",
    "a photo of many {label}.",
    "a sculpture of a {label}.",
    "a photo of the hard to see {label}.",
    "a low resolution photo of the {label}.",
    "a rendering of a {label}.",
    "graffiti of a {label}.",
    "a bad photo of the {label}.",
    "a cropped photo of the {label}.",
    "a tattoo of a {label}.",
    "the embroidered {label}.",
    "a photo of a hard to see {label}.",
    "a bright photo of a {label}.",
    "a photo of a clean {label}.",
    "a photo of a dirty {label}.",
    "a dark photo of the {label}.",
    "a drawing of a {label}.",
    "a photo of my {label}.",
    "the plastic {label}.",
    "a photo of the cool {label}.",
    "a close-up photo of a {label}.",
    "a black and white photo of the {label}.",
    "a painting of the {label}.",
    "a painting of a {label}.",
    "a pixelated photo of the {label}.",
    "a sculpture of the {label}.",
    "a bright photo of the {label}.",
    "a cropped photo of a {label}.",
    "a plastic {label}.",
    "a photo of the dirty {label}.",
    "a jpeg corrupted photo of a {label}.",
    "a blurry photo of the {label}.",
    "a photo of the {label}.",
    "a good photo of the {label}.",
    "a rendering of the {label}.",
    "a {label} in a video game.",
    "a photo of one {label}.",
    "a doodle of a {label}.",
    "a close-up photo of the {label}.",
    "a photo of a {label}.",
    "the origami {label}.",
    "the {label} in a video game.",
    "a sketch of a {label}.",
    "a doodle of the {label}.",
    "a origami {label}.",
    "a low resolution photo of a {label}.",
    "the toy {label}.",
    "a rendition of the {label}.",
    "a photo of the clean {label}.",
    "a photo of a large {label}.",
    "a rendition of a {label}.",
    "a photo of a nice {label}.",
    "a photo of a weird {label}.",
    "a blurry photo of a {label}.",
    "a cartoon {label}.",
    "art of a {label}.",
    "a sketch of the {label}.",
    "a embroidered {label}.",
    "a pixelated photo of a {label}.",
    "itap of the {label}.",
    "a jpeg corrupted photo of the {label}.",
    "a good photo of a {label}.",
    "a plushie {label}.",
    "a photo of the nice {label}.",
    "a photo of the small {label}.",
    "a photo of the weird {label}.",
    "the cartoon {label}.",
    "art of the {label}.",
    "a drawing of the {label}.",
    "a photo of the large {label}.",
    "a black and white photo of a {label}.",
    "the plushie {label}.",
    "a dark photo of a {label}.",
    "itap of a {label}.",
    "graffiti of the {label}.",
    "a toy {label}.",
    "itap of my {label}.",
    "a photo of a cool {label}.",
    "a photo of a small {label}.",
    "a tattoo of the {label}.",
)
# fmt: on

SETS = {"audio29": AUDIO_29, "imagenet80": IMAGENET_80}


def prompts(templates: str) -> tuple[str, ...]:
    """The templates of a setting: one, a set's name, or a text file with one a line.

    Raises:
        ConfigError: none of these, or a line without {label}.
    """
    if templates in SETS:
        return SETS[templates]
    if LABEL in templates:
        return (templates,)
    remedy = f"for example '{SOUND}'; sets: {', '.join(SETS)}"
    rule = "contain {label}, or name a set or a text file with one a line"
    require(os.path.isfile(templates), "eval.templates", rule, templates, remedy)
    text = read_text("eval.templates", templates)
    lines = tuple(line for line in text.splitlines() if line.strip())
    require(bool(lines), "eval.templates", "name a file that is not empty", templates)
    for line in lines:
        require(LABEL in line, f"a line of {templates}", "contain {label}", line)
    return lines


def fill(template: str, label: str) -> str:
    """The template with the class name in it."""
    return template.replace(LABEL, label)
