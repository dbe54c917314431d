"""All settings of a run, with units and checks, in one frozen tree.

    YAML file  ->  overrides `a.b=c`  ->  Config  ->  `flap config show`

A setting is a field with a docstring, in the file of its section; nothing else has to be touched.
The sections `audio`, `image` and `text` are an encoder's (`flap_fast.encoders`), `loss` has one for
each loss (`flap_fast.losses`). Names follow the papers. A wrong value is refused before a file
is opened: the error names the setting, the rule, the value and the remedy.
"""

from __future__ import annotations

from functools import reduce
from operator import or_
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from flap_fast.config import rules
from flap_fast.config.heads import Decoder, Joint
from flap_fast.config.masking import Fusion, Mask, SpecAug
from flap_fast.config.rules import check_before_loading, check_effects, check_micro_batch
from flap_fast.config.train import Ckpt, Eval, Log, Optim, Sched, Train
from flap_fast.encoders import AUDIO_ENCODERS, IMAGE_ENCODERS, TEXT_ENCODERS
from flap_fast.encoders.audio_settings import Audio
from flap_fast.encoders.settings import Encoder, MediaEncoder
from flap_fast.losses import Losses
from flap_fast.places import MixedPlaces, Place, Places, place_in
from flap_fast.section import (
    FREE_ON_RESUME,
    NAMES_FILES,
    Count,
    CountOrZero,
    Folders,
    Positive,
    Section,
)

__all__ = [
    "Audio",
    "Ckpt",
    "Config",
    "Data",
    "Decoder",
    "Eval",
    "Frontend",
    "Fusion",
    "Joint",
    "Log",
    "Losses",
    "Mask",
    "Optim",
    "Run",
    "Sched",
    "Section",
    "SpecAug",
    "Train",
    "check_before_loading",
    "check_effects",
    "check_micro_batch",
]


class Run(Section):
    name: str = Field(default="flap", max_length=200, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """The run is written to `folder/name/`."""
    folder: Annotated[Path, FREE_ON_RESUME, NAMES_FILES] = Path("runs")
    """The folder of all runs."""
    seed: int = Field(default=3407, ge=0, lt=2**32)
    """Keys every random draw: weights, order, crops, masks, augmentation, dropout."""


class Data(Section):
    train: Annotated[MixedPlaces, NAMES_FILES] = ()
    """WebDataset shards to train on, concatenated (`flap prepare` writes them): folders, .tar files
    and patterns such as `shards/{0000..0127}.tar`, on disk or by URL (s3://, gs://, https://,
    hf://datasets/). `{path: PLACE, weight: W}`: an epoch takes each clip W times; of 0.5, half of
    them, the other half in the next epoch."""
    val: Annotated[Places, FREE_ON_RESUME, NAMES_FILES] = ()
    """Shards to evaluate on, as in data.train; each entry is scored under its folder's name."""
    cache: Annotated[Path | None, FREE_ON_RESUME, NAMES_FILES] = None
    """Folder for shards read by URL, on a local disk; may be shared by the runs of a machine. null:
    flap_fast/ in the user's cache folder ($XDG_CACHE_HOME, ~/.cache)."""
    cache_gib: Annotated[Positive, FREE_ON_RESUME] = 100.0
    """Most GiB of shards in data.cache; those read longest ago are deleted first."""
    retry_s: Annotated[Positive, FREE_ON_RESUME] = 300.0
    """Seconds that a failing read by URL (a timeout, a 503) is tried again before the run ends."""
    nli: Annotated[Folders, NAMES_FILES] = ()
    """Triples of sentences for loss.nli, and loss.simcse.on = nli: JSON-lines, TSV or CSV files, or
    folders of them, with `premise`, `entailment` and `contradiction` (or SimCSE's names)."""
    shuffle_shards: CountOrZero = 0
    """Shards shuffled at a time; 0 shuffles all clips. Use 8 or so where random reads are slow."""
    on_bad_clip: Literal["replace", "stop"] = "replace"
    """An unreadable clip is replaced by the next one and reported, or stops the run."""
    captions: Literal["original", "mix", "concat", "replace"] = "original"
    """Captions in training, for folders of data.train with a captions.jsonl of `flap enrich`: the
    original ones; at each sample the enriched one with probability data.enriched_ratio; each clip
    twice an epoch, with either (as FLAP trained); only the enriched ones. Evaluation reads the
    original captions."""
    enriched_ratio: float = Field(default=0.5, ge=0, le=1)
    """data.captions = mix: probability of the enriched caption."""

    @property
    def train_places(self) -> tuple[Place, ...]:
        """data.train without weights."""
        return tuple(map(place_in, self.train))


class Frontend(Section):
    backend: Literal["auto", "dali_wave", "dali_mel", "torch"] = "auto"
    """The decoder: DALI, and the exact log-mel on the device (`auto` where DALI is installed), only
    DALI (an approximation of Kaldi's mel), or the PyTorch reference implementation, which also
    decodes the windows of eval.crop = whole, unless this is `dali_mel`."""
    threads: Annotated[CountOrZero, Field(le=4096), FREE_ON_RESUME] = 0
    """Decoding threads per rank; 0 divides the machine's cores among its ranks."""
    prefetch: Annotated[Count, FREE_ON_RESUME] = 2
    """Batches decoded ahead."""
    cache_mib: Annotated[CountOrZero, FREE_ON_RESUME] = 1024
    """With audio.length = variable, on a CPU: memory for the log-mels of clips that are not
    cropped, in MiB per rank; a second of sound takes 50 KiB. What fits is decoded once, but for
    the shortest clip of a batch that is kept as a whole."""


def _told_apart(arms: tuple[type[Encoder], ...]) -> Any:
    """The union of the encoders' settings, discriminated by `encoder`; the first is the default."""
    default = arms[0].name()

    def name(value: Any) -> Any:
        found = value.get("encoder") if isinstance(value, dict) else getattr(value, "encoder", None)
        return default if found is None else found

    tagged = [Annotated[arm, Tag(arm.name())] for arm in arms]
    return Annotated[reduce(or_, tagged), Discriminator(name)] if tagged[1:] else arms[0]


if TYPE_CHECKING:
    # A reader of `config.audio` wants the settings of the encoder that it names.
    from flap_fast.encoders.audio_settings import AudioEncoder
    from flap_fast.encoders.settings import ImageEncoder, TextEncoder
else:
    AudioEncoder = _told_apart(AUDIO_ENCODERS)
    ImageEncoder = _told_apart(IMAGE_ENCODERS)
    TextEncoder = _told_apart(TEXT_ENCODERS)


class Config(Section):
    """All settings of a run."""

    run: Run = Run()
    data: Data = Data()
    frontend: Frontend = Frontend()
    audio: AudioEncoder = AUDIO_ENCODERS[0]()
    """The audio encoder and its front end."""
    image: ImageEncoder | None = None
    """Set, even to `{}`: an image encoder instead of the audio encoder."""
    fusion: Fusion = Fusion()
    specaug: SpecAug = SpecAug()
    mask: Mask = Mask()
    text: TextEncoder = TEXT_ENCODERS[0]()
    """The text encoder."""
    decoder: Decoder = Decoder()
    joint: Joint = Joint()
    loss: Losses = Losses()
    optim: Optim = Optim()
    sched: Sched = Sched()
    train: Train = Train()
    ckpt: Annotated[Ckpt, FREE_ON_RESUME] = Ckpt()
    eval: Annotated[Eval, FREE_ON_RESUME] = Eval()
    log: Annotated[Log, FREE_ON_RESUME] = Log()

    @model_validator(mode="before")
    @classmethod
    def _follow(cls, tree):
        """Fill in defaults that depend on other sections."""
        return rules.with_defaults(tree) if tree is None or isinstance(tree, dict) else tree

    @model_validator(mode="after")
    def _suits_the_encoder(self):
        rules.check_encoder(self)
        rules.check_sections(self)
        return self

    @property
    def encoder(self) -> MediaEncoder:
        """The settings of the media encoder: `image` if it is set, else `audio`."""
        return self.audio if self.image is None else self.image

    @property
    def media_once(self) -> bool:
        """Whether the frozen media encoder gives a clip the same vector in each step.

        So it does if nothing about the clip is drawn at random; a longer sound's crop may be.
        """
        whole = self.image is not None or self.audio.variable
        drops = self.mask.kind != "none" or (self.encoder.specaug != "none" and self.specaug.on)
        return self.encoder.freeze and whole and not drops

    @property
    def run_folder(self) -> Path:
        """The folder of this run."""
        return self.run.folder / self.run.name
