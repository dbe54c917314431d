"""Rules between sections: dependent defaults, and values that exclude each other."""

from __future__ import annotations

import glob
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flap_fast.checks import require
from flap_fast.encoders import ENCODERS
from flap_fast.encoders.settings import Ability, Encoder, MediaEncoder
from flap_fast.hub import on_hub
from flap_fast.places import Place, Url, expanded, is_glob, is_pattern

if TYPE_CHECKING:
    from flap_fast.config import Config


def encoder_class(section: str, tree: object) -> type[Encoder] | None:
    """The encoder class that a section's tree names; None if unknown, which pydantic refuses."""
    arms = ENCODERS[section]
    named = tree.get("encoder") if isinstance(tree, dict) else getattr(tree, "encoder", None)
    return arms.get(str(named)) if named is not None else next(iter(arms.values()))


def with_defaults(tree: dict[str, Any] | None) -> dict[str, Any]:
    """The tree with the defaults that the encoder and fusion set in other sections."""
    tree = dict(tree or {})
    for section in ENCODERS:
        tree |= _without_idle_nulls(section, tree.get(section))
    section = "audio" if tree.get("image") is None else "image"
    encoder = encoder_class(section, tree.get(section))
    if encoder is not None and issubclass(encoder, MediaEncoder):
        for name, defaults in encoder.defaults.items():
            _fill(tree, name, defaults)
    audio = tree.get("audio") if section == "audio" else None
    length = audio.get("length") if isinstance(audio, dict) else getattr(audio, "length", None)
    if length == "variable":
        _fill(tree, "eval", {"crop": "whole"})
    fusion = tree.get("fusion") if section == "audio" else None
    kind = fusion.get("type") if isinstance(fusion, dict) else getattr(fusion, "type", None)
    if kind not in (None, "none"):
        _fill(tree, "audio", {"mel_variant": "htk_none"})
    return tree


def _without_idle_nulls(section: str, tree: object) -> dict[str, Any]:
    """The section without the settings of other encoders that are null: so they are left out."""
    encoder = encoder_class(section, tree)
    if encoder is None or not isinstance(tree, dict):
        return {}
    known = {name for arm in ENCODERS[section].values() for name in arm.model_fields}
    idle = {n for n in known - encoder.model_fields.keys() if tree.get(n, n) is None}
    return {section: {name: value for name, value in tree.items() if name not in idle}}


def _fill(tree: dict[str, Any], section: str, defaults: dict[str, Any]) -> None:
    """Fill in missing settings of a section, unless it has been checked already."""
    if tree.get(section) is None or isinstance(tree[section], dict):
        tree[section] = {**defaults, **(tree.get(section) or {})}


def check_encoder(config: Config) -> None:
    """Raise `ConfigError` with the encoder's message for settings that it does not support."""
    encoder = config.encoder
    if encoder is not config.audio:
        # Of the default encoder: another one is a setting, too.
        standard = next(iter(ENCODERS["audio"].values()))()
        given = [n for n, value in config.audio if value != getattr(standard, n, None)]
        rule = f"be left out where {encoder.modality} is set, which replaces the audio encoder"
        require(not given, "audio", rule, ", ".join(given))
        rule, backend = f"not be dali_mel with {encoder.named}", config.frontend.backend
        require(backend != "dali_mel", "frontend.backend", rule, backend)
        rule, crop = f"be center with {encoder.named}", config.eval.crop
        require(crop == "center", "eval.crop", rule, crop, "leave it out")
    _require_ability(config, "mask", "mask.kind", config.mask.kind, "none")
    _require_ability(config, "reconstruct", "loss.recon.weight", config.loss.recon.weight, 0)
    if encoder is config.audio:
        _require_ability(config, "variable", "audio.length", config.audio.length, "fixed")
    _require_ability(config, "fusion", "fusion.type", config.fusion.type, "none")
    _require_ability(config, "compile", "train.compile", config.train.compile, False)
    _require_ability(config, "classes", "joint.class_names", config.joint.class_names, 0)
    again = config.train.checkpoint_activations
    if "audio" in again and "recompute" not in encoder.can:
        rule = f"not name audio with {encoder.named}{_reason(encoder, 'recompute')}"
        require(False, "train.checkpoint_activations", rule, ", ".join(again))
    if encoder.specaug == "none":
        for name in ("time_frames", "freq_bins"):
            value, rule = getattr(config.specaug, name), f"be 0 with {encoder.named}"
            require(value == 0, f"specaug.{name}", rule, value, "leave it out")


def _require_ability(
    config: Config, ability: Ability, name: str, value: object, off: object
) -> None:
    encoder = config.encoder
    idle = "off" if off is False else repr(off)
    rule = f"be {idle} with {encoder.named}{_reason(encoder, ability)}"
    remedy = f"set {name}={str(off).lower()}"
    require(ability in encoder.can or value == off, name, rule, value, remedy)


def _reason(encoder: MediaEncoder, ability: Ability) -> str:
    verb = {
        "variable": "take clips of any length",
        "fusion": "fuse",
        "compile": "be compiled",
        "recompute": "be recomputed",
        "classes": "classify",
    }
    reason = encoder.why_not.get(ability, f"which cannot {verb.get(ability, ability)}")
    return f", {reason}"


def check_sections(config: Config) -> None:
    """Raise `ConfigError` for values of different sections that exclude each other."""
    recon = config.loss.recon.weight
    rule, remedy = "be 0 where nothing is masked", "set mask.kind=2d"
    require(recon == 0 or config.mask.kind != "none", "loss.recon.weight", rule, recon, remedy)
    rule, tail = "be 0 where reconstruction is the only loss", config.mask.unmasked_tail_epochs
    require(tail == 0 or config.loss.reads_text, "mask.unmasked_tail_epochs", rule, tail)
    if config.fusion.on:
        rule, length = "be fixed with fusion, whose channels have one length", config.audio.length
        remedy = "set fusion.type=none: longer clips are then encoded whole"
        require(length == "fixed", "audio.length", rule, length, remedy)
        require(
            config.fusion.max_duration_s >= config.audio.duration_s,
            "fusion.max_duration_s",
            f"be at least audio.duration_s = {config.audio.duration_s:g}",
            config.fusion.max_duration_s,
        )
        require(
            config.fusion.force_one or config.train.zero_stage < 3,
            "fusion.force_one",
            "be true with train.zero_stage = 3, whose ranks gather weights in step",
            config.fusion.force_one,
        )
    micro_tokens, rule = config.train.micro_tokens, "be left out where all clips have one length"
    variable = config.encoder is config.audio and config.audio.variable
    remedy = "set train.micro_batch, or audio.length=variable"
    require(micro_tokens is None or variable, "train.micro_tokens", rule, micro_tokens, remedy)
    prefixes, width = config.loss.contrastive.prefixes, config.joint.width
    require(
        not prefixes or prefixes[-1] == width,
        "loss.contrastive.prefixes",
        f"end with joint.width = {width}, as what evaluation takes is trained",
        list(prefixes),
    )
    rule = "be 0 unless joint.text_head = none, in whose space names have embeddings from the start"
    named, own_space = config.joint.class_names, config.joint.text_head == "none"
    require(named == 0 or own_space, "joint.class_names", rule, named, "set joint.class_names=0")
    weights = config.loss.contrastive.prefix_weights
    rule, got = "end above 0, as what evaluation takes is trained", list(weights or ())
    require(not weights or weights[-1] > 0, "loss.contrastive.prefix_weights", rule, got)
    rule = "name data to evaluate on with eval.patience"
    require(bool(config.data.val) or not config.eval.patience, "data.val", rule, "nothing")
    if config.loss.simcse.weight:
        rule = "be {} with loss.simcse, whose two views of a sentence differ by dropout alone"
        require(not config.text.freeze, "text.freeze", rule.format("off"), config.text.freeze)
        dropout = config.text.dropout
        require(dropout > 0, "text.dropout", rule.format("above 0"), dropout, "0.1 is usual")


def check_before_loading(config: Config, world: int) -> None:
    """Raise `ConfigError` for faults that a run of `world` ranks would only meet later."""
    batch = config.train.global_batch
    require(
        batch % world == 0,
        "train.global_batch",
        f"be a multiple of the {world} ranks",
        batch,
        f"for example {max(world, batch // world * world)}",
    )
    check_micro_batch(config, world)
    _check_sizes(config)
    for name in ("init_from", "init_audio_from"):
        folder, rule = getattr(config.train, name), "be an existing folder of weights"
        found = folder is None or on_hub(folder) or os.path.isdir(folder)  # may be too long
        require(found, f"train.{name}", rule, folder, "see flap import")
    require(bool(config.data.train), "data.train", "name at least one folder of shards", "nothing")
    rule = "name files of sentences for loss.nli, and for loss.simcse.on = nli"
    found = bool(config.data.nli) or "premise" not in config.loss.sentences
    require(found, "data.nli", rule, "nothing")
    for file in config.data.nli:
        require(os.path.exists(file), "data.nli", "be existing files or folders of them", file)
    places = config.data.train_places
    for name, some in (("train", places), ("val", config.data.val)):
        for place in some:
            _check_place(f"data.{name}", place)
    first = places[0]
    require(
        config.data.captions == "original" or any(map(_may_have_captions, places)),
        "data.captions",
        "be 'original' where no folder of data.train has a captions.jsonl",
        config.data.captions,
        f"write it with: flap enrich {first} {first} --model none, or name a model",
    )


def check_effects(config: Config, steps: int | None, epochs: int | None) -> None:
    """Raise `ConfigError` for settings of a new run that the others leave without effect.

    Not when a config is read: those of older runs and models may have them.

    Args:
        steps: of the whole run; None where they are not known yet.
        epochs: likewise.
    """
    for name, encoder in ((config.encoder.modality, config.encoder), ("text", config.text)):
        scale = type(encoder).model_fields["lora_alpha"].default
        idle = encoder.lora_rank == 0 and encoder.lora_alpha != scale
        frozen = {"freeze": "false", "freeze_blocks": "0"}
        off = [f" {name}.{one}={off}" for one, off in frozen.items() if getattr(encoder, one)]
        rule, remedy = f"be left out with {name}.lora_rank = 0", f"set {name}.lora_rank=8"
        remedy += "".join(off)
        require(not idle, f"{name}.lora_alpha", rule, encoder.lora_alpha, remedy)
    warm, decay = config.sched.warmup_steps, config.sched.decay_steps
    if steps and decay:
        rule = f"be at most the run's {steps} steps less sched.warmup_steps = {warm}"
        require(decay + warm <= steps, "sched.decay_steps", rule, decay)
    tail, masked = config.mask.unmasked_tail_epochs, config.mask.kind != "none"
    if epochs and masked:
        rule = f"be below the run's {epochs} epochs, all of which it would leave unmasked"
        remedy = "set mask.kind=none to train without masking"
        require(tail < epochs, "mask.unmasked_tail_epochs", rule, tail, remedy)


def _check_place(name: str, place: Place) -> None:
    """Raise `ConfigError` where a path leads to no shards; a URL is asked for when it is read."""
    if isinstance(place, Url):
        return
    made = "write them with: flap prepare MANIFEST OUT (the demo's: make data)"
    text = str(place)
    if is_pattern(place) and not os.path.lexists(text):
        rule = "match existing .tar files"
        for one in expanded(text):
            exists = bool(glob.glob(one)) if is_glob(Path(one)) else os.path.isfile(one)
            got = text if one == text else f"{text}' without '{one}"
            require(exists, name, rule, got, made)
        return
    tar = text.lower().endswith(".tar")
    rule = "be existing .tar files" if tar else "be existing folders of shards"
    remedy = f"write several as [{place}]" if "," in text else made
    found = os.path.isdir(text) or (tar and os.path.isfile(text))  # a name may be too long to ask
    require(found, name, rule, place, remedy)


def _may_have_captions(place: Place) -> bool:
    """Whether enriched captions lie beside shards, or may: a URL is not asked yet.

    A folder without shards is refused as such, when it is opened.
    """
    if isinstance(place, Url) or is_pattern(place):
        return True
    folder = place if place.is_dir() else place.parent
    return (folder / "captions.jsonl").is_file() or not any(folder.glob("*.tar"))


def _check_sizes(config: Config) -> None:
    """Raise `ConfigError` for sizes whose weights are larger than this machine's memory.

    Counted are 8 width^2 numbers a layer, fewer than those of its attention or convolutions and its
    MLP; of `joint`, one matrix.
    """
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    sections = {config.encoder.modality: config.encoder, "joint": config.joint}
    if getattr(config.text, "folder", None) is None:  # whose sizes count otherwise
        sections["text"] = config.text
    if config.loss.recon.weight > 0:
        sections["decoder"] = config.decoder
    for section, settings in sections.items():
        sizes = {n: getattr(settings, n, None) for n in ("width", "depth", "depths", "layers")}
        sizes = {name: size for name, size in sizes.items() if size is not None}
        width = sizes.get("width", 64)  # no preset is smaller
        layers = sum(
            sum(size) if isinstance(size, tuple) else size
            for name, size in sizes.items()
            if name != "width"
        )
        rule = f"give weights that fit in this machine's {memory / 2**30:.0f} GiB of memory"
        got = ", ".join(map(str, sizes.values()))
        names = " and ".join(f"{section}.{name}" for name in sizes)
        require(4 * width**2 * max(1, 8 * layers) <= memory, names, rule, got, "take smaller ones")


def check_micro_batch(config: Config, world: int) -> None:
    """Raise `ConfigError` for a train.micro_batch that does not divide a rank's clips."""
    clips, micro = config.train.global_batch // world, config.train.micro_batch
    most = min(micro or 1, 2**16)  # an example is looked for among so many
    require(
        micro is None or clips % micro == 0 or config.train.micro_tokens is not None,
        "train.micro_batch",
        f"divide the {clips} clips of train.global_batch that a rank of {world} has",
        micro,
        f"for example {next((m for m in range(most, 0, -1) if clips % m == 0), 1)}",
    )
