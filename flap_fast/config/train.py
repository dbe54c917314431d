"""The sections of a run's steps: `optim`, `sched`, `train`, `ckpt`, `eval`, `log`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field, model_validator

from flap_fast.checks import require
from flap_fast.section import (
    FREE_ON_RESUME,
    NAMES_ACCOUNT,
    NAMES_FILES,
    NAMES_MODEL,
    Count,
    CountOrZero,
    Positive,
    Ratio,
    Section,
)

Recomputed = Literal["audio", "text", "decoder"]
OptimizerName = Literal[
    "adam",
    "adamw",
    "muon",
    "adafactor",
    "adadelta",
    "adagrad",
    "adamax",
    "asgd",
    "nadam",
    "radam",
    "rmsprop",
    "rprop",
    "sgd",
]


def _named(value: object) -> object:
    """Expand `true`, `false` and a single name to the names that they mean."""
    if isinstance(value, bool):
        return get_args(Recomputed) if value else ()
    return (value,) if isinstance(value, str) else value


def _one_or_more(value: object) -> object:
    return (value,) if isinstance(value, str) else value


class Optim(Section):
    name: OptimizerName = "adam"
    """Adam, AdamW with decoupled weight decay, another of PyTorch's by its name, or Muon for the
    matrices of the encoders' and the decoder's blocks with AdamW for all else, at one learning
    rate. ZeRO 1 to 3 divide no adafactor, adagrad or muon: these take train.zero_stage=0."""
    lr: Positive = 1e-4
    """Learning rate after warm-up."""
    betas: tuple[Ratio, Ratio] = (0.9, 0.999)
    """FLAP prints (0.99, 0.9), which no published script of its toolkit passes."""
    eps: Positive = 1e-8
    """Added to the root of the second moment."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """On matrices only: never on biases, norms, tokens or the logit scale."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Further arguments of the optimizer, as PyTorch names them: `{momentum: 0.9}` for sgd,
    `{ns_steps: 5}` for muon."""
    clip_norm: Annotated[float, Field(ge=0)] = 0.0
    """Largest gradient norm; 0 does not clip."""
    media_lr_factor: Positive = 1.0
    """Learning rate of the audio (or image) encoder, times optim.lr; heads and all else have
    optim.lr itself. To freeze it: audio.freeze."""
    text_lr_factor: Positive = 1.0
    """The same for the text encoder."""
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Learning rate of each block of the encoders, times that of the next one towards the output;
    the input layers count as one before the first. 0.75 is usual when fine-tuning; 1 is off."""

    @model_validator(mode="after")
    def _decays(self):
        rule = "be 0 with optim.name = adam, which would add it to the gradient"
        supported = self.name != "adam" or self.weight_decay == 0
        require(supported, "optim.weight_decay", rule, self.weight_decay, "set optim.name=adamw")
        return self


class Sched(Section):
    name: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """The learning rate after warm-up: half a cosine or a line to the last step, constant, or
    constant and then a line over the last sched.decay_steps (warm-up, stable, decay)."""
    warmup_steps: CountOrZero = 3200
    """Steps of linear warm-up."""
    decay_steps: Count | None = None
    """sched.name = wsd: steps of the decay at the end, after those of the warm-up."""
    final_factor: Annotated[float, Field(ge=0, le=1)] = 0.0
    """The learning rate to which it falls at the end, times optim.lr."""

    @model_validator(mode="after")
    def _decays(self):
        given, wsd = self.decay_steps, self.name == "wsd"
        rule = (
            "be set with sched.name = wsd" if wsd else f"be left out with sched.name = {self.name}"
        )
        remedy = "a tenth of the steps is usual" if wsd else "set sched.name=wsd"
        require((given is not None) == wsd, "sched.decay_steps", rule, given or "nothing", remedy)
        factor, rule = self.final_factor, "be 0 with sched.name = constant, which does not fall"
        require(self.name != "constant" or factor == 0, "sched.final_factor", rule, factor)
        return self


class Train(Section):
    global_batch: Count = 2304
    """Clips contrasted with one another in a step, over all ranks."""
    micro_batch: Count | None = None
    """Clips that a rank's encoders process at a time; all of its clips if not given. A step takes
    the memory of one micro-batch, and one more forward. BatchNorm normalises within each."""
    micro_tokens: Count | None = None
    """With audio.length = variable: the most tokens of the audio encoder (patches that masking
    keeps, and [CLS]) in a micro-batch. As few micro-batches as hold a step's clips, so that their
    number differs from step to step; train.micro_batch is then the most clips of one."""
    accumulation: Literal["exact", "local"] = "exact"
    """How micro-batches are contrasted: over the whole global batch, with cached gradients
    (GradCache: two passes, the gradients of one), or within each (one pass, fewer negatives)."""
    replay: Annotated[Literal["auto", "keep", "decode"], FREE_ON_RESUME] = "auto"
    """Inputs of GradCache's second pass: log-mels cached on the device (`keep`, 0.5 MB for 10 s of
    sound), or decoded again. `auto` caches on a GPU and decodes on a CPU."""
    epochs: Count | None = 45
    """Passes over the data; the last incomplete batch of each is dropped."""
    steps: CountOrZero | None = None
    """Optimizer steps, instead of epochs; one of the two is given, the other left out or null. 0
    saves and scores the first weights: a random tower, or those of train.init_from."""
    init_from: Annotated[Path | None, NAMES_FILES, NAMES_MODEL] = None
    """A model folder, a run or `hf://OWNER/NAME`, whose weights initialise a new run (`flap import`
    writes folders); a decoder that it lacks is initialised at random."""
    init_audio_from: Annotated[Path | None, NAMES_FILES, NAMES_MODEL] = None
    """The same for only the audio encoder: an imported AudioMAE, or any of these; feature fusion
    that it lacks is initialised at random."""
    engine: Annotated[Literal["auto", "plain", "deepspeed"], FREE_ON_RESUME] = "auto"
    """`auto`: DeepSpeed under a launcher, plain PyTorch in a single process."""
    zero_stage: Annotated[Literal[0, 1, 2, 3], FREE_ON_RESUME] = 1
    """What DeepSpeed shards: nothing, optimizer states, gradients too, parameters too."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Precision of the encoders: bf16 autocast on a GPU and fp32 on a CPU (`auto`), or one of them
    on both. Parameters, embeddings and losses stay in fp32."""
    offload: Annotated[Literal["none", "optimizer", "all"], FREE_ON_RESUME] = "none"
    """What DeepSpeed keeps in the CPU's memory: Adam's states and gradients (ZeRO 1 to 3), or the
    parameters too (ZeRO 3). PyTorch's fused Adam then updates them on the CPU."""
    ema_decay: Ratio = 0.0
    """Decay of a moving average of the weights, which evaluation and checkpoints then take in their
    place; 0 takes the weights themselves, 0.999 averages over about 1,000 steps. Its first steps
    count for less. 4 bytes a weight on every rank (ZeRO 3: of its part)."""
    checkpoint_activations: Annotated[
        tuple[Recomputed, ...], BeforeValidator(_named), FREE_ON_RESUME
    ] = ()
    """Activation checkpointing: the blocks of these are recomputed in the backward pass; some
    of `audio`, `text` and `decoder`, or `true` for all of them."""
    compile: bool = False
    """torch.compile the audio encoder's blocks (and the decoder's), whose shapes never change in
    training; with audio.length = variable all of them but attention, once for any number of
    tokens. The text encoder is not compiled: its lengths change with each batch."""

    def run_steps(self, per_epoch: int) -> int:
        """Steps of the whole run, with so many in an epoch."""
        return (self.epochs or 0) * per_epoch if self.steps is None else self.steps

    def micro_batches(self, world: int) -> int:
        """Micro-batches of a rank in a step over `world` ranks, without train.micro_tokens."""
        clips = self.global_batch // world
        return clips // (self.micro_batch or clips)

    def micro_clips(self, world: int) -> int:
        """The most clips of a micro-batch."""
        if self.micro_tokens:
            return min(self.micro_batch or self.global_batch, self.global_batch // world)
        return self.global_batch // world // self.micro_batches(world)

    @model_validator(mode="after")
    def _one_length(self):
        if self.steps is not None:
            given = self.epochs if "epochs" in self.model_fields_set else None
            rule = f"be left out with train.steps = {self.steps}"
            remedy = "set train.steps=null, or train.epochs=null to train by steps"
            require(given is None, "train.epochs", rule, given, remedy)
            object.__setattr__(self, "epochs", None)
        some = self.epochs or self.steps is not None
        require(bool(some), "train.epochs", "be set when train.steps is not", None)
        rule, audio = "be left out with train.init_from", self.init_audio_from
        require(not (audio and self.init_from), "train.init_audio_from", rule, audio)
        rule = "be off with train.zero_stage = 3, whose hooks gather weights inside of each block"
        require(not (self.compile and self.zero_stage == 3), "train.compile", rule, self.compile)
        rule = "be 'exact' with train.micro_tokens, whose micro-batches differ in their clips"
        exact = self.accumulation == "exact" or self.micro_tokens is None
        remedy = "set train.micro_batch instead of train.micro_tokens"
        require(exact, "train.accumulation", rule, self.accumulation, remedy)
        return self

    @model_validator(mode="after")
    def _offloads(self):
        lowest = {"none": 0, "optimizer": 1, "all": 3}[self.offload]
        rule = f"be at least {lowest} with train.offload = {self.offload}"
        supported = self.zero_stage >= lowest
        require(
            supported, "train.zero_stage", rule, self.zero_stage, f"set train.zero_stage={lowest}"
        )
        return self


class Ckpt(Section):
    every_steps: CountOrZero = 1000
    """Steps between checkpoints; the last step and an interruption always save. 0: only those."""
    keep_last: Count = 2
    """Checkpoints to keep; older ones are deleted, except the best."""
    keep_best: bool = True
    """Keep the checkpoint with the best score on data.val, as eval.tasks says."""
    verify: bool = True
    """Compare a checkpoint's files with its SHA256SUMS, if it has one, when training resumes or
    begins from it."""


class Eval(Section):
    every_steps: CountOrZero = 0
    """Steps between evaluations on data.val. 0: at the end only."""
    tasks: Annotated[tuple[str, ...], BeforeValidator(_one_or_more), Field(min_length=1)] = (
        "retrieval",
    )
    """Evaluations of data.val in training, some of `retrieval`, `relevance`, `zero_shot` (of the
    clips' labels) and `geometry`. The first chooses the best checkpoint: retrieval by the mean of
    both directions' mAP@10, relevance by mAP@10, zero_shot by top-1; geometry cannot."""
    patience: CountOrZero = 0
    """Early stopping: end the run when so many evaluations in a row were no better than the best
    before them; 0 never."""
    batch: Count = 64
    """Clips a rank embeds at a time."""
    crop: str = Field(default="random", pattern=r"^(random|center|whole|multi:[1-9]\d*)$")
    """Crop of clips longer than audio.duration_s: `random` (fixed by the clip, not by the run),
    `center`, or the mean embedding of several at equal steps from start to end: of K (`multi:K`),
    or of as many as cover the clip (`whole`, the default with audio.length = variable)."""
    templates: Annotated[str, NAMES_FILES] = "This is a sound of {label}."
    """Prompt of zero-shot classes; or `audio29` or `imagenet80`, or a text file with one a line."""
    equal_captions: bool = False
    """Retrieval: a caption finds each clip that has it or an equal caption, a clip each caption
    equal to one of its own. Equal whatever their case, punctuation and white space."""
    relevance: Annotated[str, NAMES_FILES] = ""
    """Relevance: a table of queries and the files that are right, as of DCASE 2025 Task 6."""
    sentences: Literal["joint", "tower"] = "joint"
    """Sentence embeddings for STS and SentEval: in the joint space, or the text encoder's own."""

    @model_validator(mode="after")
    def _stops(self):
        rule = "be above 0 with eval.patience, which counts evaluations"
        counted = self.every_steps > 0 or self.patience == 0
        require(counted, "eval.every_steps", rule, self.every_steps)
        return self

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
    """Report to Weights & Biases too (`pip install wandb`). Where that fails, training goes on."""
    wandb_project: str = Field(default="flap_fast", min_length=1)
    """Weights & Biases: the project."""
    wandb_entity: Annotated[str | None, NAMES_ACCOUNT] = None
    """Weights & Biases: the user or team; null: what wandb takes (`WANDB_ENTITY`, your default)."""
    wandb_group: str | None = None
    """Weights & Biases: the group of runs; null: what wandb takes (`WANDB_RUN_GROUP`, none)."""
    wandb_timeout_s: Positive = 60.0
    """Seconds that a call of Weights & Biases may hold training up; half is its init_timeout."""
