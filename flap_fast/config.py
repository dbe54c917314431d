"""Every knob of a run, with its unit and its check, in one frozen tree.

    YAML file  ->  overrides `a.b=c`  ->  Config  ->  `flap config show`

A knob is a field below with a docstring; nothing else has to be touched. Names follow the papers
(FLAP, arXiv 2311.01615) and the toolkit's options. A wrong value dies here, before a file is
opened: the error names the setting, the rule, the value and the remedy.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from flap_fast.checks import need

Ratio = Annotated[float, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=1)]
CountOrZero = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Folders = Annotated[
    tuple[Path, ...], BeforeValidator(lambda v: (v,) if isinstance(v, (str, Path)) else v)
]

# Width, depth and heads of the audio encoder. Source: SPEC 4.1; `tiny` is the demo's.
SIZES = {
    "tiny": (192, 4, 3),
    "small": (384, 12, 6),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
}
# HTSAT's first width and heads, doubled at each stage, and the blocks of each. Source: LAION-CLAP.
HTSAT_SIZES = {
    "tiny": (96, (2, 2, 6, 2), 4),
    "base": (128, (2, 2, 12, 2), 4),
    "large": (256, (2, 2, 12, 2), 4),
}
# Defaults that follow audio.encoder and audio.mel. Sources: SPEC 3.2, 3.5, 4.6.
_HTSAT = {"mel": "clap", "size": "tiny", "patch": 4, "drop_path": 0.1}
_CLAP = {"sample_rate_hz": 48_000, "mel_bins": 64, "frames": 1001, "int16_roundtrip": True}
_CLAP |= {"mean": 0.0, "std": 0.5}  # decibels stay as they are: HTSAT begins with a BatchNorm
_HTSAT_SPECAUG = {"time_frames": 64, "freq_bins": 8, "stripes": 2}


class Section(BaseModel):
    """Frozen settings; an unknown name is refused."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
    )

    @model_validator(mode="before")
    @classmethod
    def _empty(cls, tree):
        """`mask:` with all its lines commented out means the defaults."""
        return {} if tree is None else tree


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
    shuffle_shards: CountOrZero = 0
    """Shards mixed at a time; 0 mixes all clips. Use 8 or so where random reads are slow."""
    on_bad_clip: Literal["replace", "stop"] = "replace"
    """An unreadable clip is replaced by the next one and reported, or stops the run."""


class Frontend(Section):
    backend: Literal["auto", "dali_wave", "dali_mel", "torch"] = "auto"
    """Who decodes: DALI and the exact mel on the device (`auto` where DALI is installed), DALI
    alone (an approximation of Kaldi's mel), or the plain PyTorch twin."""
    threads: CountOrZero = 0
    """Decoding threads a rank; 0 shares the machine's cores among its ranks."""
    prefetch: Count = 2
    """Batches decoded ahead."""


class Audio(Section):
    encoder: Literal["vit", "htsat"] = "vit"
    """FLAP's ViT, or LAION-CLAP's HTSAT: a Swin transformer, which cannot be masked."""
    size: Literal["tiny", "small", "base", "large"] = "base"
    """Width, depth and heads of the ViT: 192/4/3, 384/12/6, 768/12/12, 1024/24/16. HTSAT: `tiny`
    (the default there), `base` or `large`, which begin 96, 128 or 256 wide."""
    width: Count | None = None
    """Overrides the size's width D (HTSAT: of the first stage, doubled at each)."""
    depth: Count | None = None
    """Overrides the size's number of blocks (ViT)."""
    depths: tuple[Count, ...] | None = None
    """Overrides the size's blocks of each stage (HTSAT)."""
    heads: Count | None = None
    """Overrides the size's number of heads (HTSAT: of the first stage, doubled at each)."""
    window_patches: Count = 8
    """Side of HTSAT's windows of attention."""
    duration_s: Positive = 10.0
    """Seconds of sound the model sees: longer clips are cropped, shorter ones filled."""
    mel: Literal["kaldi", "clap"] = "kaldi"
    """The front end: Kaldi's (25 ms windows, 16 kHz, natural logarithm), or LAION-CLAP's (1024
    samples at 48 kHz, decibels; HTSAT's default). Rate, bins and statistics follow it."""
    mel_variant: Literal["slaney_norm", "htk_none"] = "slaney_norm"
    """CLAP's mel matrix: Slaney's scale and areas (librosa), or HTK's scale (torchaudio; with
    fusion.type)."""
    low_hz: Annotated[float, Field(ge=0)] = 50.0
    """CLAP's lowest frequency; Kaldi's is 20 Hz."""
    high_hz: Positive = 14_000.0
    """CLAP's highest frequency; Kaldi's is half the rate."""
    int16_roundtrip: bool = False
    """Round samples to 16 bits, towards zero, as LAION-CLAP does (on with audio.mel = clap)."""
    sample_rate_hz: int = Field(default=16_000, ge=1000)
    """Rate of the front end; 48 kHz with audio.mel = clap."""
    mel_bins: Count = 128
    """Mel bins F; 64 with audio.mel = clap."""
    frames: Count = 1024
    """Frames T of the log-mel: 998 frames of 10 s, then rows of zeros; 1001 with audio.mel = clap,
    none of them of zeros."""
    patch: Count = 16
    """Side of a square patch, in frames and in bins; 4 for HTSAT."""
    mean: float = -4.2677393
    """Mean of AudioSet's log-mels, subtracted; 0 with audio.mel = clap."""
    std: Positive = 4.5689974
    """Their standard deviation; twice it divides. 0.5 with audio.mel = clap."""
    filling: Literal["repeatpad", "pad", "repeat"] = "repeatpad"
    """How a short clip is filled: whole repeats then zeros, zeros, or repeats cut off."""
    use_cls: bool = True
    """ViT: prepend a [CLS] token (as AudioMAE's checkpoints do)."""
    pool: Literal["mean_patch", "cls", "mean_all"] = "mean_patch"
    """ViT: what becomes the clip's vector; HTSAT's is the mean of its tokens."""
    norm_position: Literal["tokens", "pooled"] = "tokens"
    """ViT: the final LayerNorm on the tokens before pooling, or on the pooled vector."""
    pos_grid: Literal["correct", "audiomae_legacy"] = "correct"
    """ViT: grid of the fixed positions; AudioMAE's own table was built for the transposed grid."""
    drop_path: Ratio = 0.0
    """Stochastic depth at the last block, growing linearly from 0; 0.1 for HTSAT."""
    attention: Literal["sdpa", "xformers"] = "sdpa"
    """PyTorch's attention, or xformers' (CUDA only)."""

    @model_validator(mode="before")
    @classmethod
    def _follow(cls, tree):
        """Defaults that follow the encoder, then those that follow the front end."""
        if isinstance(tree, dict) and tree.get("encoder") == "htsat":
            tree = {**_HTSAT, **tree}
        if isinstance(tree, dict) and tree.get("mel") == "clap":
            tree = {**_CLAP, **tree}
        return tree

    @property
    def grid(self) -> tuple[int, int]:
        """Patches along time and along frequency; of HTSAT along both sides of its folded image."""
        if self.encoder == "htsat":
            return self.image_side // self.patch, self.image_side // self.patch
        return self.frames // self.patch, self.mel_bins // self.patch

    @property
    def samples(self) -> int:
        """Samples of a crop."""
        return round(self.duration_s * self.sample_rate_hz)

    @property
    def shape(self) -> tuple[int, int, int]:
        """The ViT's width, depth and heads in force."""
        width, depth, heads = SIZES[self.size]
        return self.width or width, self.depth or depth, self.heads or heads

    @property
    def stages(self) -> tuple[tuple[int, int, int], ...]:
        """Width, depth and heads of each of HTSAT's stages."""
        width, depths, heads = HTSAT_SIZES[self.size]
        width, depths, heads = self.width or width, self.depths or depths, self.heads or heads
        return tuple((width << n, depth, heads << n) for n, depth in enumerate(depths))

    @property
    def image_side(self) -> int:
        """Side of the square into which HTSAT folds a log-mel, in pixels: 256 of 1001 x 64.

        The smallest that holds all frames and that the stages can halve; 0 if there is none.
        """
        least = math.isqrt((self.frames - 1) // self.mel_bins) + 1
        sides = (folds * self.mel_bins for folds in range(least, 2 * least + 1))
        return next((side for side in sides if self._divides(side)), 0)

    def _divides(self, side: int) -> bool:
        grids = [side // self.patch >> n for n in range(len(self.stages))]
        whole = side % (self.patch << (len(grids) - 1)) == 0
        return whole and all(grid % min(self.window_patches, grid) == 0 for grid in grids)

    @property
    def window(self) -> int:
        """Samples of a frame: Kaldi's 25 ms, or CLAP's 1024."""
        return 1024 if self.mel == "clap" else self.sample_rate_hz * 25 // 1000

    @property
    def hop(self) -> int:
        """Samples of the 10 ms shift."""
        return self.sample_rate_hz // 100

    def frames_of(self, samples):
        """Frames of a sound: those that fit whole into it (Kaldi), or one at each shift (CLAP).

        Of a number, or of a tensor of them.
        """
        whole = samples if self.mel == "clap" else samples - self.window
        return 1 + whole // self.hop

    @model_validator(mode="after")
    def _fits(self):
        spoken = self.frames_of(self.samples)
        least = self.window
        rule = f"hold one window of {least * 1000 / self.sample_rate_hz:g} ms"
        need(self.samples >= least, "audio.duration_s", rule, self.duration_s)
        if self.mel == "clap":
            rule = f"be in (audio.low_hz = {self.low_hz:g}, half of audio.sample_rate_hz]"
            fits = self.low_hz < self.high_hz <= self.sample_rate_hz / 2
            need(fits, "audio.high_hz", rule, self.high_hz)
        (self._fits_htsat if self.encoder == "htsat" else self._fits_vit)(spoken)
        return self

    def _fits_vit(self, spoken: int) -> None:
        width, _, heads = self.shape
        need(width % heads == 0, "audio.width", f"be a multiple of audio.heads = {heads}", width)
        need(width % 4 == 0, "audio.width", "be a multiple of 4 (2-D sine positions)", width)
        for name in ("frames", "mel_bins"):
            value = getattr(self, name)
            need(value % self.patch == 0, f"audio.{name}", f"be a multiple of {self.patch}", value)
        need(
            self.frames >= spoken,
            "audio.frames",
            f"hold the {spoken} frames of audio.duration_s = {self.duration_s:g}",
            self.frames,
            f"set audio.frames={math.ceil(spoken / self.patch) * self.patch}",
        )
        need(
            self.use_cls or self.pool != "cls",
            "audio.pool",
            "not be 'cls' without audio.use_cls",
            self.pool,
        )
        rule, remedy = "be left out for a ViT", "set audio.depth, or audio.encoder=htsat"
        need(self.depths is None, "audio.depths", rule, self.depths, remedy)

    def _fits_htsat(self, spoken: int) -> None:
        remedy = "set audio.depths, the blocks of each stage"
        need(self.depth is None, "audio.depth", "be left out for HTSAT", self.depth, remedy)
        sizes = ", ".join(HTSAT_SIZES)
        need(self.size in HTSAT_SIZES, "audio.size", f"be one of HTSAT's {sizes}", self.size)
        width, _, heads = self.stages[0]
        need(width % heads == 0, "audio.width", f"be a multiple of audio.heads = {heads}", width)
        rule = f"be the {spoken} frames of audio.duration_s = {self.duration_s:g} for HTSAT"
        remedy = f"set audio.frames={spoken}"
        need(self.frames == spoken, "audio.frames", rule, self.frames, remedy)
        need(self.attention == "sdpa", "audio.attention", "be 'sdpa' for HTSAT", self.attention)
        of = f"a log-mel of {self.frames} frames and {self.mel_bins} bins, folded into a square"
        rule, remedy = (
            f"divide each of {len(self.stages)} stages of {of}",
            "or shorten audio.depths",
        )
        need(self.image_side > 0, "audio.window_patches", rule, self.window_patches, remedy)


class Fusion(Section):
    type: Literal[
        "none", "aff_2d", "iaff_2d", "daf_2d", "channel_map", "aff_1d", "iaff_1d", "daf_1d"
    ] = "none"
    """How clips longer than audio.duration_s are seen: cropped, or whole beside three pieces of
    them. The pieces join the patches' embeddings (`_2d`) or the log-mel (`_1d`) by attention, by
    attention twice or by a sum, or are channels of the patch embedding. LAION's is `aff_2d`."""
    max_duration_s: Positive = 30.0
    """Seconds of a clip that are decoded for it; still longer ones are cropped to as much."""
    force_one: bool = True
    """Take one clip for a longer one in a batch without any, so that each batch trains the fusion
    (LAION's; each rank's own). Needed by train.zero_stage = 3."""

    @property
    def on(self) -> bool:
        """Whether longer clips are seen whole."""
        return self.type != "none"

    def longest(self, audio: Audio) -> int:
        """Samples at most that are kept of a clip."""
        if not self.on:
            return audio.samples
        return round(self.max_duration_s * audio.sample_rate_hz)


class SpecAug(Section):
    time_frames: CountOrZero = 192
    """Widest time mask, exclusive; 0 turns it off."""
    freq_bins: CountOrZero = 48
    """Widest frequency mask, exclusive; 0 turns it off."""
    stripes: Count = 1
    """Masks of each kind. HTSAT's defaults are 2 of up to 63 frames and 2 of up to 7 bins."""
    domain: Literal["pre_norm", "post_norm"] = "pre_norm"
    """Zeros before normalisation (AudioMAE's order) or after; HTSAT's lie behind its BatchNorm."""


class Mask(Section):
    kind: Literal["none", "1d", "2d"] = "2d"
    """Which patches training drops: none, of the flat sequence, or whole rows and columns."""
    ratio: Ratio = 0.4
    """Share dropped by 1-D masking."""
    unit: Literal["token", "frame"] = "token"
    """What 1-D masking drops: patches, or whole time columns of them."""
    time_ratio: Ratio = 0.2
    """Share of time columns dropped by 2-D masking."""
    freq_ratio: Ratio = 0.2
    """Share of frequency rows dropped by 2-D masking."""
    shared_inner: bool = True
    """2-D: one draw of frequency rows a clip, or one for each time column."""
    rounding: Literal["floor", "round", "ceil"] = "floor"
    """How a kept count becomes whole."""
    unmasked_tail_epochs: CountOrZero = 0
    """Epochs at the end that train without masking (FLIP)."""


class Text(Section):
    folder: str | None = None
    """A transformers encoder and its tokenizer: a folder, or `package:NAME/sub/folder` inside an
    installed Python package. Without one: a RoBERTa of random weights, of the sizes below."""
    tokenizer: str = "bytes"
    """For random weights: a tokenizer's folder, or `bytes` (UTF-8 bytes, needs no file)."""
    width: Count = 768
    """Random weights: width."""
    depth: Count = 12
    """Random weights: layers."""
    heads: Count = 12
    """Random weights: heads."""
    max_tokens: Count = 77
    """Longer captions are cut; batches are padded to their own longest, to a multiple of 8."""
    pool: Literal["pooler", "mean", "cls"] = "pooler"
    """RoBERTa's pooler (tanh of a linear layer on <s>), the mean over tokens, or plain <s>."""
    dropout: Ratio = 0.1
    """Dropout everywhere in the tower."""
    freeze: bool = False
    """Keep the tower as it is and train the projection alone."""

    @model_validator(mode="after")
    def _fits(self):
        need(
            self.folder is not None or self.width % self.heads == 0,
            "text.width",
            f"be a multiple of text.heads = {self.heads}",
            self.width,
        )
        return self


class Joint(Section):
    width: Count = 512
    """Dimension d of the joint space."""
    temperature: Positive = 0.07
    """First temperature; the logit scale starts at its inverse."""
    max_scale: float = Field(default=100.0, ge=1)
    """The logit scale is clamped to [1, max_scale]."""


class Contrastive(Section):
    weight: Annotated[float, Field(ge=0)] = 1.0
    """Its weight in the total."""
    direction: Literal["symmetric", "a2t", "t2a"] = "symmetric"
    """Mean of both directions (the toolkit), or one (FLAP's Eq. 1 is a2t)."""
    scheme: Literal["auto", "replicated", "sharded"] = "auto"
    """How ranks share the work; the numbers are the same."""


class Loss(Section):
    contrastive: Contrastive = Contrastive()


class Optim(Section):
    name: Literal["adam", "adamw"] = "adam"
    """Adam, or AdamW with decoupled weight decay."""
    lr: Positive = 1e-4
    """Learning rate after warm-up."""
    betas: tuple[Ratio, Ratio] = (0.9, 0.999)
    """FLAP prints (0.99, 0.9), which no published script of its toolkit passes."""
    eps: Positive = 1e-8
    """Added to the root of the second moment."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """On matrices only: never on biases, norms, tokens or the logit scale."""
    clip_norm: Annotated[float, Field(ge=0)] = 0.0
    """Largest gradient norm; 0 does not clip."""

    @model_validator(mode="after")
    def _decays(self):
        rule = "be 0 with optim.name = adam, which would add it to the gradient"
        fits = self.name == "adamw" or self.weight_decay == 0
        need(fits, "optim.weight_decay", rule, self.weight_decay, "set optim.name=adamw")
        return self


class Sched(Section):
    warmup_steps: CountOrZero = 3200
    """Steps of linear warm-up; then a cosine to zero."""


class Train(Section):
    global_batch: Count = 2304
    """Clips contrasted with one another in a step, over all ranks."""
    epochs: Count | None = 45
    """Passes over the data; the last incomplete batch of each is dropped."""
    steps: Count | None = None
    """Optimizer steps, instead of epochs."""
    engine: Literal["auto", "plain", "deepspeed"] = "auto"
    """`auto`: DeepSpeed under a launcher, plain PyTorch for a process of its own."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    """What DeepSpeed shards: nothing, optimizer states, gradients too, parameters too."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Of the towers: bf16 autocast on a GPU and fp32 on a CPU (`auto`), or one of them anywhere.
    Parameters, embeddings and losses stay in fp32."""
    checkpoint_activations: bool = False
    """Recompute each transformer block in the backward pass instead of keeping it."""

    @model_validator(mode="after")
    def _one_length(self):
        if "steps" in self.model_fields_set and self.steps:
            object.__setattr__(self, "epochs", None)
        need(
            bool(self.epochs or self.steps), "train.epochs", "be set when train.steps is not", None
        )
        return self


class Ckpt(Section):
    every_steps: CountOrZero = 1000
    """Steps between checkpoints; the last step and an interruption always save. 0: only those."""
    keep_last: Count = 2
    """Older checkpoints are deleted, but for the best."""
    keep_best: bool = True
    """Keep the checkpoint with the best mean of both directions' mAP@10 on data.val."""


class Eval(Section):
    every_steps: CountOrZero = 0
    """Steps between evaluations on data.val. 0: at the end only."""
    batch: Count = 64
    """Clips a rank embeds at a time."""
    crop: Literal["random", "center"] = "random"
    """Crop of clips longer than audio.duration_s; `random` is fixed by the clip, not by the run."""


class Log(Section):
    every_steps: Count = 10
    """Steps between lines of metrics.jsonl."""
    tensorboard: bool = True
    """Write TensorBoard's event files."""
    wandb: bool = False
    """Report to Weights & Biases too (`pip install wandb`)."""


class Config(Section):
    """All settings of a run."""

    run: Run = Run()
    data: Data = Data()
    frontend: Frontend = Frontend()
    audio: Audio = Audio()
    fusion: Fusion = Fusion()
    specaug: SpecAug = SpecAug()
    mask: Mask = Mask()
    text: Text = Text()
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
    def _agree(self):
        need(
            self.audio.encoder == "vit" or self.mask.kind == "none",
            "mask.kind",
            "be 'none' with audio.encoder = htsat, whose windows need every patch",
            self.mask.kind,
            "set mask.kind=none, or audio.encoder=vit",
        )
        if self.fusion.on:
            most, least = self.fusion.max_duration_s, self.audio.duration_s
            rule = f"be at least audio.duration_s = {least:g}"
            need(most >= least, "fusion.max_duration_s", rule, most)
            rule = "be true with train.zero_stage = 3, whose ranks gather weights in step"
            fits = self.fusion.force_one or self.train.zero_stage < 3
            need(fits, "fusion.force_one", rule, self.fusion.force_one)
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
    need(
        batch % world == 0,
        "train.global_batch",
        f"be a multiple of the {world} ranks",
        batch,
        f"for example {max(world, batch // world * world)}",
    )
    need(bool(config.data.train), "data.train", "name at least one folder of shards", "nothing")
    for name in ("train", "val"):
        for folder in getattr(config.data, name):
            need(
                folder.is_dir(),
                f"data.{name}",
                "be existing folders of shards",
                folder,
                "write them with: flap prepare MANIFEST OUT (the demo's: make data)",
            )
