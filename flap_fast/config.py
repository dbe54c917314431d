"""Every knob of a run, with its unit and its check, in one frozen tree.

    YAML file  ->  overrides `a.b=c`  ->  Config  ->  `flap config show`

A knob is a field below with a docstring (of sections `audio` and `fusion`, in `config_audio.py`);
nothing else has to be touched. Names follow the papers
(FLAP, arXiv 2311.01615) and the toolkit's options. A wrong value dies here, before a file is
opened: the error names the setting, the rule, the value and the remedy.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, get_args

from pydantic import BeforeValidator, Field, model_validator

from flap_fast.checks import need
from flap_fast.config_audio import Audio, Count, CountOrZero, Fusion, Positive, Ratio, Section

Folders = Annotated[
    tuple[Path, ...], BeforeValidator(lambda v: (v,) if isinstance(v, (str, Path)) else v)
]

Recomputed = Literal["audio", "text", "decoder"]


def _named(value: object) -> object:
    """`true`, `false` and a single name as the names they stand for."""
    if isinstance(value, bool):
        return get_args(Recomputed) if value else ()
    return (value,) if isinstance(value, str) else value


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


class Image(Section):
    """Setting this section puts an image tower in the place of the audio tower."""

    encoder: Literal["resnet50"] = "resnet50"
    """CLIP's ResNet: a stem of three convolutions, blurred strides, pooling by attention."""
    width: Annotated[int, Field(ge=2, multiple_of=2)] = 64
    """Channels behind the stem; the pooled vector is 32 times as wide, in heads of 64."""
    layers: tuple[Count, Count, Count, Count] = (3, 4, 6, 3)
    """Bottlenecks of each stage: ResNet-50's."""
    resolution: Annotated[int, Field(ge=32, multiple_of=32)] = 224
    """Side of the square that the model sees: the shorter side is brought to it, the middle cut."""
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    """CLIP's mean of red, green and blue in [0, 1], subtracted."""
    std: tuple[Positive, Positive, Positive] = (0.26862954, 0.26130258, 0.27577711)
    """CLIP's standard deviations, which divide."""

    @property
    def heads(self) -> int:
        """Of the pooling, 64 numbers wide each, as in all of CLIP's ResNets."""
        return self.width * 32 // 64


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
    encoder: Literal["roberta", "clip"] = "roberta"
    """RoBERTa or what `folder` holds, or CLIP's causal transformer, of random weights of the sizes
    below (512 wide, 12 layers, 8 heads when not given)."""
    folder: str | None = None
    """A transformers encoder and its tokenizer: a folder, or `package:NAME/sub/folder` inside an
    installed Python package. Without one: a RoBERTa of random weights, of the sizes below."""
    tokenizer: str = "bytes"
    """For random weights: a tokenizer's folder (CLIP's: `package:open_clip`), or `bytes` (UTF-8
    bytes, needs no file)."""
    width: Count = 768
    """Random weights: width."""
    depth: Count = 12
    """Random weights: layers."""
    heads: Count = 12
    """Random weights: heads."""
    max_tokens: Count = 77
    """Longer captions are cut; batches are padded to their own longest, to a multiple of 8."""
    packing: Literal["auto", "packed", "padded"] = "auto"
    """`packed` lays a batch's captions end to end, without padding (BERT, RoBERTa, XLM-RoBERTa,
    CamemBERT); the numbers are the same within rounding. `auto` packs where that is faster: on a
    CPU, and on a GPU whose variable-length attention serves (bf16, or xformers)."""
    attention: Literal["sdpa", "xformers"] = "sdpa"
    """For packed captions on a GPU: PyTorch's variable-length attention, or xformers'."""
    pool: Literal["pooler", "mean", "cls"] = "pooler"
    """RoBERTa's pooler (tanh of a linear layer on <s>), the mean over tokens, or plain <s>. CLIP's
    `pooler` is its last norm at the end-of-text token."""
    dropout: Ratio = 0.1
    """Dropout everywhere in the tower."""
    freeze: bool = False
    """Keep the tower as it is and train the projection alone."""

    @model_validator(mode="before")
    @classmethod
    def _follow(cls, tree):
        """Defaults that follow the encoder."""
        if isinstance(tree, dict) and tree.get("encoder") == "clip":
            tree = {"width": 512, "heads": 8, **tree}
        return tree

    @model_validator(mode="after")
    def _fits(self):
        if self.encoder == "clip":
            remedy = "set text.encoder=roberta, which takes any encoder's folder"
            rule = "be left out with text.encoder = clip"
            need(self.folder is None, "text.folder", rule, self.folder, remedy)
            rule = "be {} with text.encoder = clip"
            need(self.pool == "pooler", "text.pool", rule.format("pooler"), self.pool)
            need(self.packing != "packed", "text.packing", rule.format("padded"), self.packing)
            need(self.attention == "sdpa", "text.attention", rule.format("sdpa"), self.attention)
        need(
            self.folder is not None or self.width % self.heads == 0,
            "text.width",
            f"be a multiple of text.heads = {self.heads}",
            self.width,
        )
        rule = "be 'sdpa' with text.packing = padded"
        fits = self.attention == "sdpa" or self.packing != "padded"
        need(fits, "text.attention", rule, self.attention, "set text.packing=auto")
        return self


class Decoder(Section):
    """Rebuilds the patches that masking dropped, where loss.recon.weight is above 0."""

    width: Count = 512
    """Width of its blocks."""
    depth: Count = 4
    """Blocks."""
    heads: Count = 4
    """Attention heads of a block."""

    @model_validator(mode="after")
    def _fits(self):
        need(
            self.width % self.heads == 0,
            "decoder.width",
            f"be a multiple of decoder.heads = {self.heads}",
            self.width,
        )
        need(self.width % 4 == 0, "decoder.width", "be a multiple of 4 (2-D sines)", self.width)
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
    precision: Literal["ieee", "tf32", "bf16"] = "ieee"
    """Of the embeddings in its products, summed in fp32: as they are, or rounded for a GPU's tensor
    cores (`tf32` is exact on a CPU). `python -m bench.infonce_precision` prints what each costs."""


class Cyclic(Section):
    cross_weight: Annotated[float, Field(ge=0)] = 0.0
    """Weight of `cyclic_cross`: sound j with caption k as sound k with caption j (C-cyclic)."""
    in_weight: Annotated[float, Field(ge=0)] = 0.0
    """Weight of `cyclic_in`: sounds j and k as alike as their captions (I-cyclic)."""
    form: Literal["auto", "tiled", "gram"] = "auto"
    """How it is computed; the numbers are the same. `auto` takes what does less for the batch."""


class SimCSE(Section):
    weight: Annotated[float, Field(ge=0)] = 0.0
    """Its weight in the total. The sentences go through the text tower twice."""
    temperature: Positive = 0.05
    """Divides the cosines; fixed."""
    on: Literal["captions", "nli"] = "captions"
    """Of which sentences: the clips' captions, or as many premises of data.nli (CLIPe)."""

    @property
    def views(self) -> tuple[str, str]:
        """The two embeddings of a sentence, by name."""
        return {"captions": ("text", "text_again"), "nli": ("premise", "premise_again")}[self.on]


class NLI(Section):
    weight: Annotated[float, Field(ge=0)] = 0.0
    """Its weight in the total. Three sentences of data.nli for each clip."""
    temperature: Positive = 0.05
    """Divides the cosines; fixed."""


class Recon(Section):
    weight: Annotated[float, Field(ge=0)] = 0.0
    """Its weight in the total; 0 builds no decoder. FLAP gives none; AudioMAE's is 1."""
    norm_pix: bool = True
    """Compare with patches brought to mean 0 and variance 1 each (as AudioMAE trains)."""
    target: Literal["clean", "augmented"] = "clean"
    """What is to be rebuilt: the log-mel before SpecAug, or after it."""


class Loss(Section):
    contrastive: Contrastive = Contrastive()
    cyclic: Cyclic = Cyclic()
    simcse: SimCSE = SimCSE()
    nli: NLI = NLI()
    recon: Recon = Recon()

    @property
    def sentences(self) -> tuple[str, ...]:
        """What the text tower reads for each clip, in its rows' order: `text` is the caption.

        `_again` names the same sentence, under a dropout of its own; the others are data.nli's.
        """
        views = self.simcse.views if self.simcse.weight else ()
        triple = ("premise", "entailment", "contradiction") if self.nli.weight else ()
        return tuple(dict.fromkeys(("text", *views, *triple)))

    @model_validator(mode="after")
    def _something(self):
        cyclic = self.cyclic.cross_weight + self.cyclic.in_weight
        of_text = self.simcse.weight + self.nli.weight
        weight = self.contrastive.weight + cyclic + of_text + self.recon.weight
        need(weight > 0, "loss.contrastive.weight", "be above 0 where no other loss is", 0)
        return self


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
    micro_batch: Count | None = None
    """Clips a rank takes through the towers at a time; its whole share without. They need the
    memory of so many, and one more forward pass. BatchNorm, where there is one, sees them alone."""
    accumulation: Literal["exact", "local"] = "exact"
    """Of micro-batches: contrast the whole global batch (two passes, the gradients of one), or each
    micro-batch within itself (one pass, fewer negatives, another loss)."""
    replay: Literal["auto", "keep", "decode"] = "auto"
    """Where the second of two passes takes a step's log-mels from: kept on the device (0.5 MB for
    10 s of sound), or decoded again. `auto` keeps them on a GPU; on a CPU it decodes, where that is
    little beside the towers."""
    epochs: Count | None = 45
    """Passes over the data; the last incomplete batch of each is dropped."""
    steps: Count | None = None
    """Optimizer steps, instead of epochs."""
    init_from: Path | None = None
    """A model folder or a run whose weights a new run begins with (`flap import` writes folders);
    a decoder that it lacks begins at random."""
    init_audio_from: Path | None = None
    """The same of the audio tower alone: an imported AudioMAE, a model folder or a run; feature
    fusion that it lacks begins at random."""
    engine: Literal["auto", "plain", "deepspeed"] = "auto"
    """`auto`: DeepSpeed under a launcher, plain PyTorch for a process of its own."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    """What DeepSpeed shards: nothing, optimizer states, gradients too, parameters too."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Of the towers: bf16 autocast on a GPU and fp32 on a CPU (`auto`), or one of them anywhere.
    Parameters, embeddings and losses stay in fp32."""
    offload: Literal["none", "optimizer", "all"] = "none"
    """What DeepSpeed keeps in the CPU's memory: Adam's states and gradients (ZeRO 1 to 3), or the
    parameters too (ZeRO 3). PyTorch's fused Adam then updates them on the CPU."""
    checkpoint_activations: Annotated[tuple[Recomputed, ...], BeforeValidator(_named)] = ()
    """Whose transformer blocks are computed again in the backward pass instead of being kept: some
    of `audio`, `text` and `decoder`, or `true` for all of them."""
    compile: bool = False
    """torch.compile the audio encoder's blocks (and the decoder's), whose shapes never change in
    training. Text is left as it is: its lengths change with each batch."""

    def micro_batches(self, world: int) -> int:
        """How many a rank takes through the towers in a step, where `world` share it."""
        share = self.global_batch // world
        return share // (self.micro_batch or share)

    @model_validator(mode="after")
    def _one_length(self):
        if "steps" in self.model_fields_set and self.steps:
            object.__setattr__(self, "epochs", None)
        need(
            bool(self.epochs or self.steps), "train.epochs", "be set when train.steps is not", None
        )
        rule, audio = "be left out with train.init_from", self.init_audio_from
        need(not (audio and self.init_from), "train.init_audio_from", rule, audio)
        rule = "be off with train.zero_stage = 3, whose hooks gather weights inside of each block"
        need(not (self.compile and self.zero_stage == 3), "train.compile", rule, self.compile)
        return self

    @model_validator(mode="after")
    def _offloads(self):
        lowest = {"none": 0, "optimizer": 1, "all": 3}[self.offload]
        rule = f"be at least {lowest} with train.offload = {self.offload}"
        fits = self.zero_stage >= lowest
        need(fits, "train.zero_stage", rule, self.zero_stage, f"set train.zero_stage={lowest}")
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
    crop: str = Field(default="random", pattern=r"^(random|center|multi:[1-9]\d*)$")
    """Crop of clips longer than audio.duration_s: `random` (fixed by the clip, not by the run),
    `center`, or `multi:K`, the mean embedding of K crops at equal steps from begin to end."""
    templates: str = "This is a sound of {label}."
    """Prompt of zero-shot classes; or `audio29` or `imagenet80`, or a text file with one a line."""
    sentences: Literal["joint", "tower"] = "joint"
    """What STS and SentEval take of a caption: its joint embedding, or the text tower's."""

    @property
    def crops(self) -> int:
        """Crops of a clip."""
        return int(self.crop[6:]) if self.crop.startswith("multi:") else 1


class Log(Section):
    every_steps: Count = 10
    """Steps between lines of metrics.jsonl."""
    tensorboard: bool = True
    """Write TensorBoard's event files."""
    wandb: bool = False
    """Report to Weights & Biases too (`pip install wandb`)."""


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
        need(not given, "audio", rule, ", ".join(given))
        rule, remedy = "be {} where image is set", "leave it out"
        for name, value, wanted in (
            ("mask.kind", self.mask.kind, "none"),
            ("specaug.time_frames", self.specaug.time_frames, 0),
            ("specaug.freq_bins", self.specaug.freq_bins, 0),
            ("loss.recon.weight", self.loss.recon.weight, 0),
            ("eval.crop", self.eval.crop, "center"),
            ("train.compile", self.train.compile, False),
        ):
            need(value == wanted, name, rule.format(wanted), value, remedy)
        rule = "not be dali_mel where image is set"
        need(self.frontend.backend != "dali_mel", "frontend.backend", rule, self.frontend.backend)
        rule = "not name audio where image is set: its BatchNorms would count each image twice"
        again = self.train.checkpoint_activations
        need("audio" not in again, "train.checkpoint_activations", rule, ", ".join(again))
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
        need(vit or self.mask.kind == "none", "mask.kind", rule, self.mask.kind, remedy)
        rule = "be 0 with audio.encoder = htsat, which drops no patches to rebuild"
        need(vit or recon == 0, "loss.recon.weight", rule, recon, "set audio.encoder=vit")
        rule = "be off with audio.encoder = htsat, whose blocks are run as they are"
        need(vit or not self.train.compile, "train.compile", rule, True)
        return self

    @model_validator(mode="after")
    def _rebuilds_what_is_masked(self):
        need(
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
            need(
                self.fusion.max_duration_s >= self.audio.duration_s,
                "fusion.max_duration_s",
                f"be at least audio.duration_s = {self.audio.duration_s:g}",
                self.fusion.max_duration_s,
            )
            need(
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
            need(not self.text.freeze, "text.freeze", rule.format("off"), self.text.freeze)
            dropout = self.text.dropout
            need(dropout > 0, "text.dropout", rule.format("above 0"), dropout, "0.1 is usual")
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
    check_micro_batch(config, world)
    for name in ("init_from", "init_audio_from"):
        folder, rule = getattr(config.train, name), "be an existing folder of weights"
        need(folder is None or folder.is_dir(), f"train.{name}", rule, folder, "see flap import")
    need(bool(config.data.train), "data.train", "name at least one folder of shards", "nothing")
    rule = "name files of sentences for loss.nli, and for loss.simcse.on = nli"
    there = bool(config.data.nli) or "premise" not in config.loss.sentences
    need(there, "data.nli", rule, "nothing")
    for file in config.data.nli:
        need(file.exists(), "data.nli", "be existing files or folders of them", file)
    for name in ("train", "val"):
        for folder in getattr(config.data, name):
            need(
                folder.is_dir(),
                f"data.{name}",
                "be existing folders of shards",
                folder,
                "write them with: flap prepare MANIFEST OUT (the demo's: make data)",
            )
    first = config.data.train[0]
    need(
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
    need(
        micro is None or share % micro == 0,
        "train.micro_batch",
        f"divide the {share} clips of train.global_batch that a rank of {world} has",
        micro,
        f"for example {next((m for m in range(micro or 1, 0, -1) if share % m == 0), 1)}",
    )
