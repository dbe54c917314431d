"""Every knob of a run, with its unit and its check, in one frozen tree.

    YAML file  ->  overrides `a.b=c`  ->  Config  ->  `flap config show`

A knob is a field with a docstring, here or in the file of its section; nothing else has to be
touched. Names follow the papers (FLAP, arXiv 2311.01615) and the toolkit's options. A wrong value
dies here, before a file is opened: the error names the setting, the rule, the value and the remedy.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from flap_fast.checks import require
from flap_fast.config.audio import Audio, Fusion, Mask, SpecAug
from flap_fast.config.loss import NLI, Contrastive, Cyclic, Loss, Recon, SimCSE
from flap_fast.config.section import Count, CountOrZero, Folders, Section
from flap_fast.config.towers import Decoder, Image, Joint, Text
from flap_fast.config.train import Ckpt, Eval, Log, Optim, Sched, Train

__all__ = [
    "NLI",
    "Audio",
    "Ckpt",
    "Config",
    "Contrastive",
    "Cyclic",
    "Data",
    "Decoder",
    "Eval",
    "Frontend",
    "Fusion",
    "Image",
    "Joint",
    "Log",
    "Loss",
    "Mask",
    "Optim",
    "Recon",
    "Run",
    "Sched",
    "Section",
    "SimCSE",
    "SpecAug",
    "Text",
    "Train",
    "check_before_loading",
    "check_micro_batch",
]

# HTSAT's SpecAug. Source: SPEC 3.5.
_HTSAT_SPECAUG = {"time_frames": 64, "freq_bins": 8, "stripes": 2}


class Run(Section):
    name: str = Field(default="flap", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """The run lives in `folder/name/`."""
    folder: Path = Path("runs")
    """Where runs live."""
    seed: int = Field(default=3407, ge=0, lt=2**32)
    """Keys every random draw: weights, order, crops, masks, augmentation, dropout."""


class Data(Section):
    train: Folders = ()
    """Folders of WebDataset shards to train on, concatenated (`flap prepare` writes them)."""
    val: Folders = ()
    """Folders of shards to evaluate on; each is scored under its folder's name."""
    nli: Folders = ()
    """Triples of sentences for loss.nli, and loss.simcse.on = nli: JSON-lines, TSV or CSV files, or
    folders of them, with `premise`, `entailment` and `contradiction` (or SimCSE's names)."""
    shuffle_shards: CountOrZero = 0
    """Shards mixed at a time; 0 mixes all clips. Use 8 or so where random reads are slow."""
    on_bad_clip: Literal["replace", "stop"] = "replace"
    """An unreadable clip is replaced by the next one and reported, or stops the run."""
    captions: Literal["original", "mix", "concat", "replace"] = "original"
    """Captions in training, for folders of data.train with a captions.jsonl of `flap enrich`: their
    own; at each visit the richer one with probability data.enriched_ratio; each clip twice an
    epoch, with either (as FLAP trained); the richer ones alone. Evaluation reads their own."""
    enriched_ratio: float = Field(default=0.5, ge=0, le=1)
    """data.captions = mix: how often a visit reads the richer caption."""


class Frontend(Section):
    backend: Literal["auto", "dali_wave", "dali_mel", "torch"] = "auto"
    """Who decodes: DALI and the exact mel on the device (`auto` where DALI is installed), DALI
    alone (an approximation of Kaldi's mel), or the plain PyTorch twin."""
    threads: CountOrZero = 0
    """Decoding threads a rank; 0 shares the machine's cores among its ranks."""
    prefetch: Count = 2
    """Batches decoded ahead."""


# What other sections are by themselves where `image` is set.
_OF_IMAGES = {
    "mask": {"kind": "none"},
    "specaug": {"time_frames": 0, "freq_bins": 0},
    "eval": {"crop": "center", "templates": "imagenet80"},
}


def _under(defaults: dict[str, object], given: object) -> object:
    """A section with other defaults."""
    return {**defaults, **(given or {})} if isinstance(given, (dict, type(None))) else given


class Config(Section):
    """All settings of a run."""

    run: Run = Run()
    data: Data = Data()
    frontend: Frontend = Frontend()
    audio: Audio = Audio()
    image: Image | None = None
    """Set, even to `{}`: pictures instead of sounds."""
    fusion: Fusion = Fusion()
    specaug: SpecAug = SpecAug()
    mask: Mask = Mask()
    text: Text = Text()
    decoder: Decoder = Decoder()
    joint: Joint = Joint()
    loss: Loss = Loss()
    optim: Optim = Optim()
    sched: Sched = Sched()
    train: Train = Train()
    ckpt: Ckpt = Ckpt()
    eval: Eval = Eval()
    log: Log = Log()

    @model_validator(mode="before")
    @classmethod
    def _follow_image(cls, tree):
        """Defaults that follow the tower: nothing of a picture is masked, and CLIP's prompts."""
        if not isinstance(tree, dict) or tree.get("image") is None:
            return tree
        return {**tree, **{name: _under(own, tree.get(name)) for name, own in _OF_IMAGES.items()}}

    @model_validator(mode="after")
    def _sees_or_hears(self):
        if self.image is None:
            return self
        rule = "be left out where image is set, which replaces the audio tower"
        given = self.audio.model_dump(exclude_defaults=True)
        require(not given, "audio", rule, ", ".join(given))
        rule, remedy = "be {} where image is set", "leave it out"
        for name, value, wanted in (
            ("mask.kind", self.mask.kind, "none"),
            ("specaug.time_frames", self.specaug.time_frames, 0),
            ("specaug.freq_bins", self.specaug.freq_bins, 0),
            ("loss.recon.weight", self.loss.recon.weight, 0),
            ("eval.crop", self.eval.crop, "center"),
            ("train.compile", self.train.compile, False),
        ):
            require(value == wanted, name, rule.format(wanted), value, remedy)
        rule = "not be dali_mel where image is set"
        require(
            self.frontend.backend != "dali_mel", "frontend.backend", rule, self.frontend.backend
        )
        rule = "not name audio where image is set: its BatchNorms would count each image twice"
        again = self.train.checkpoint_activations
        require("audio" not in again, "train.checkpoint_activations", rule, ", ".join(again))
        return self

    @model_validator(mode="before")
    @classmethod
    def _follow(cls, tree):
        """Defaults of a section that follow another one."""
        tree = dict(tree or {})
        if _given(tree, "audio", "encoder") == "htsat":
            _default(tree, "mask", {"kind": "none"})
            _default(tree, "specaug", _HTSAT_SPECAUG)
        if _given(tree, "fusion", "type") not in (None, "none"):
            _default(tree, "audio", {"mel_variant": "htk_none"})
        return tree

    @model_validator(mode="after")
    def _suits_the_encoder(self):
        vit, recon = self.audio.encoder == "vit", self.loss.recon.weight
        rule = "be 'none' with audio.encoder = htsat, whose windows need every patch"
        remedy = "set mask.kind=none, or audio.encoder=vit"
        require(vit or self.mask.kind == "none", "mask.kind", rule, self.mask.kind, remedy)
        rule = "be 0 with audio.encoder = htsat, which drops no patches to rebuild"
        require(vit or recon == 0, "loss.recon.weight", rule, recon, "set audio.encoder=vit")
        rule = "be off with audio.encoder = htsat, whose blocks are run as they are"
        require(vit or not self.train.compile, "train.compile", rule, True)
        return self

    @model_validator(mode="after")
    def _rebuilds_what_is_masked(self):
        require(
            self.loss.recon.weight == 0 or self.mask.kind != "none",
            "loss.recon.weight",
            "be 0 where nothing is masked",
            self.loss.recon.weight,
            "set mask.kind=2d",
        )
        return self

    @model_validator(mode="after")
    def _fuses(self):
        if self.fusion.on:
            require(
                self.fusion.max_duration_s >= self.audio.duration_s,
                "fusion.max_duration_s",
                f"be at least audio.duration_s = {self.audio.duration_s:g}",
                self.fusion.max_duration_s,
            )
            require(
                self.fusion.force_one or self.train.zero_stage < 3,
                "fusion.force_one",
                "be true with train.zero_stage = 3, whose ranks gather weights in step",
                self.fusion.force_one,
            )
        return self

    @model_validator(mode="after")
    def _two_views_differ(self):
        if self.loss.simcse.weight:
            rule = "be {} with loss.simcse, whose two views of a sentence differ by dropout alone"
            require(not self.text.freeze, "text.freeze", rule.format("off"), self.text.freeze)
            dropout = self.text.dropout
            require(dropout > 0, "text.dropout", rule.format("above 0"), dropout, "0.1 is usual")
        return self

    @property
    def run_folder(self) -> Path:
        """Where this run keeps everything it writes."""
        return self.run.folder / self.run.name


def _given(tree: dict, section: str, name: str) -> object:
    """A setting of a tree whose sections are mappings or checked already; None if not given."""
    value = tree.get(section)
    return value.get(name) if isinstance(value, dict) else getattr(value, name, None)


def _default(tree: dict, section: str, defaults: dict) -> None:
    """Fill in what a section does not say, unless it was checked already."""
    if tree.get(section) is None or isinstance(tree[section], dict):
        tree[section] = {**defaults, **(tree.get(section) or {})}


def check_before_loading(config: Config, world: int) -> None:
    """Raise `ConfigError` for what a run of `world` ranks would only trip over later."""
    batch = config.train.global_batch
    require(
        batch % world == 0,
        "train.global_batch",
        f"be a multiple of the {world} ranks",
        batch,
        f"for example {max(world, batch // world * world)}",
    )
    check_micro_batch(config, world)
    for name in ("init_from", "init_audio_from"):
        folder, rule = getattr(config.train, name), "be an existing folder of weights"
        require(folder is None or folder.is_dir(), f"train.{name}", rule, folder, "see flap import")
    require(bool(config.data.train), "data.train", "name at least one folder of shards", "nothing")
    rule = "name files of sentences for loss.nli, and for loss.simcse.on = nli"
    there = bool(config.data.nli) or "premise" not in config.loss.sentences
    require(there, "data.nli", rule, "nothing")
    for file in config.data.nli:
        require(file.exists(), "data.nli", "be existing files or folders of them", file)
    for name in ("train", "val"):
        for folder in getattr(config.data, name):
            require(
                folder.is_dir(),
                f"data.{name}",
                "be existing folders of shards",
                folder,
                "write them with: flap prepare MANIFEST OUT (the demo's: make data)",
            )
    first = config.data.train[0]
    require(
        config.data.captions == "original"
        or any((folder / "captions.jsonl").is_file() for folder in config.data.train),
        "data.captions",
        "be 'original' where no folder of data.train has a captions.jsonl",
        config.data.captions,
        f"write it with: flap enrich {first} {first} --model MODEL",
    )


def check_micro_batch(config: Config, world: int) -> None:
    """Raise `ConfigError` for a train.micro_batch that does not fill a rank's share."""
    share, micro = config.train.global_batch // world, config.train.micro_batch
    require(
        micro is None or share % micro == 0,
        "train.micro_batch",
        f"divide the {share} clips of train.global_batch that a rank of {world} has",
        micro,
        f"for example {next((m for m in range(micro or 1, 0, -1) if share % m == 0), 1)}",
    )
