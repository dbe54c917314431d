"""`flap import` and `flap export`: which layout a checkpoint has, and what is written of it.

import  LAION-CLAP's .pt, OpenAI's or CyCLIP's, a ClapModel's or a FLAP's folder -> a model folder
        AudioMAE's .pth, HTSAT's .ckpt -> an audio tower's folder
export  a model folder -> a ClapModel's folder, or a FLAP's in that form; LAION-CLAP's or OpenAI's
        .pt

A folder appears whole or not at all. What a foreign file holds and this project has no use for goes
into `unused.safetensors`, so that it comes out again as it went in.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import nn

from flap_fast.checks import require
from flap_fast.config import Config
from flap_fast.config.file import dump_config, load_config
from flap_fast.data.tokenize import tokenizer
from flap_fast.interchange import audiomae, clap_hf, clip_openai, flap_hf, laion
from flap_fast.interchange.tensors import (
    Tensors,
    fitted_tensors,
    read_saved,
    read_tensors,
    strip_prefixes,
)
from flap_fast.model.decoder import Decoder
from flap_fast.model.model_folder import (
    TOWER,
    load_model,
    model_folder,
    save_model,
    save_tensors,
    with_text,
)
from flap_fast.model.two_towers import TwoTowers

UNUSED = "unused.safetensors"
# What DistributedDataParallel puts before names, of LAION's and CyCLIP's files.
_MODULE = "module."
_TOKENIZER = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt"),
)


def import_checkpoint(
    path: Path,
    out: Path,
    overrides: Sequence[str] = (),
    *,
    strip: Sequence[str] = (),
    partial: bool = False,
    decoder: bool = False,
) -> str:
    """Write a foreign checkpoint as a folder of this project; gives what to do with it.

    Args:
        overrides: settings that the checkpoint does not tell, such as `text.folder=...`.
        strip: prefixes that its names are to lose.
        partial: take what fits; the rest begins at random.
        decoder: AudioMAE's too.

    Raises:
        ConfigError: another layout, or tensors that do not fit, each of them named.
    """
    require(path.exists(), "the checkpoint", "exist", path)
    with _appearing(out) as folder:
        if path.is_dir():
            return _import_folder(path, folder, out, overrides, strip, partial)
        saved = read_saved(path)
        tensors = strip_prefixes(saved.tensors, (_MODULE, *strip))
        if laion.is_laion(tensors):
            config = _laion_config(tensors, overrides)
            found, unused = laion.from_laion(tensors)
            unused = {_prefix(saved.tensors) + name: value for name, value in unused.items()}
            return _write_model(path, folder, out, config, found, unused, partial)
        if clip_openai.is_openai(tensors):
            config = load_config(None, [*clip_openai.openai_settings(tensors), *overrides])
            if not partial:
                clip_openai.check_tokenizer(tensors, config)
            clip_openai.keep_origin(folder, saved, _prefix(saved.tensors))
            found, unused = clip_openai.from_openai(tensors)
            return _write_model(path, folder, out, config, found, unused, partial)
        if htsat := laion.of_htsat(tensors):
            config = load_config(None, [*laion.htsat_settings(htsat), *overrides])
            laion.check_mel(htsat, config)
            found, _ = laion.from_laion(htsat)
            return _write_tower(path, folder, out, config, found, partial)
        known = (
            "LAION-CLAP's (audio_branch...), OpenAI's CLIP's (visual..., token_embedding), "
            "HTSAT's (bn0, patch_embed.proj) or AudioMAE's (patch_embed.proj, pos_embed)"
        )
        first = ", ".join(list(tensors)[:3])
        remedy = "--strip PREFIX shortens names"
        require(audiomae.is_audiomae(tensors), str(path), f"have {known} names", first, remedy)
        found = audiomae.from_audiomae(tensors, decoder=decoder)
        config = _audiomae_config(tensors, found, list(overrides))
        return _write_tower(path, folder, out, config, found, partial, decoder)


def _import_folder(
    path: Path,
    folder: Path,
    out: Path,
    overrides: Sequence[str],
    strip: Sequence[str],
    partial: bool,
) -> str:
    rule = "be another project's folder: this one's opens as it is, or with train.init_from"
    require(not (path / "config.yaml").is_file(), "the checkpoint", rule, path)
    kind = clap_hf.read_json(path / "config.json").get("model_type")
    if kind == flap_hf.MODEL_TYPE:
        found, config = flap_hf.read_flap(path)
        require(not overrides, "NAME=VALUE", "be left out for a FLAP's folder", " ".join(overrides))
        return _write_model(path, folder, out, config, found, {}, partial)
    require(kind == "clap", f"{path}/config.json: model_type", "be clap or flap", kind)
    tensors, settings, text = clap_hf.read_clap(path)
    found, unused = clap_hf.from_clap(strip_prefixes(tensors, strip))
    files = [path / name for name in _TOKENIZER if (path / name).is_file()]
    require(bool(files), str(path), f"hold a tokenizer's files ({', '.join(_TOKENIZER)})", "none")
    with TemporaryDirectory() as words:
        text.save_pretrained(words)
        for file in files:
            shutil.copy(file, words)
        config = load_config(None, [*settings, f"text.folder={words}", *overrides])
        clap_hf.check_spec_size(path, config)
        return _write_model(path, folder, out, config, found, unused, partial)


def _laion_config(tensors: Tensors, overrides: Sequence[str]) -> Config:
    config = load_config(None, [*laion.laion_settings(tensors), *overrides])
    rule = "name a RoBERTa's folder, for its tokenizer and its settings"
    remedy = "hf download FacebookAI/roberta-base --local-dir models/roberta-base"
    require(config.text.folder is not None, "text.folder", rule, config.text.folder, remedy)
    laion.check_mel(tensors, config)
    return config


def _write_model(
    path: Path,
    folder: Path,
    out: Path,
    config: Config,
    found: Tensors,
    unused: Tensors,
    partial: bool,
) -> str:
    torch.manual_seed(config.run.seed)
    model = TwoTowers(config, weights=False)
    save_model(
        folder, config, model, fitted_tensors(found, model.state_dict(), path, partial=partial)
    )
    if unused:
        save_tensors(folder / UNUSED, unused)
    _write_config(folder, with_text(config, out / "text"), "init_from", out)
    return f"open it with flap_fast.load('{out}'), train on with train.init_from={out}"


def _audiomae_config(tensors: Tensors, found: Tensors, overrides: list[str]) -> Config:
    settings = audiomae.audiomae_settings(tensors, found, overrides)
    config = load_config(None, [*settings, *overrides])
    grid = audiomae.grid_of(found["audio.pos_embed"], config.audio.grid) or config.audio.pos_grid
    audio = config.audio.model_copy(update={"pos_grid": grid})
    return config.model_copy(update={"audio": audio})


def _write_tower(
    path: Path,
    folder: Path,
    out: Path,
    config: Config,
    found: Tensors,
    partial: bool,
    decoder: bool = False,
) -> str:
    torch.manual_seed(config.run.seed)
    tower = config.encoder.build(config)
    parts: dict[str, nn.Module] = {"audio": tower}
    if decoder:
        parts["decoder"] = Decoder(config, config.encoder, tower.width)  # type: ignore[arg-type]
    wanted = nn.ModuleDict(parts).state_dict()
    save_tensors(folder / TOWER, fitted_tensors(found, wanted, path, partial=partial))
    _write_config(folder, config, "init_audio_from", out)
    return f"an audio tower; train from it with train.init_audio_from={out}"


def _write_config(folder: Path, config: Config, begin: str, out: Path) -> None:
    """A config that begins a training where the folder will lie."""
    begins = config.train.model_copy(update={begin: out})
    config = config.model_copy(update={"train": begins})
    (folder / "config.yaml").write_text(dump_config(config))


def export_checkpoint(path: Path, out: Path) -> str:
    """Write a model folder, or a run's last checkpoint, for others; gives what was written."""
    folder = model_folder(path)
    model, config = load_model(folder)
    weights, (prefix, unused) = model.state_dict(), _unused(folder)
    if out.suffix in (".pt", ".pth"):
        if config.image is None:
            file, whose = _laion_file(folder, out, weights, prefix, unused), "LAION-CLAP"
        else:
            file = clip_openai.laid_out(folder, clip_openai.to_openai(weights) | unused)
            whose = "OpenAI"
        require(not out.exists(), "OUT", "be new", out)
        out.parent.mkdir(parents=True, exist_ok=True)
        torch.save(file, out)
        return f"{whose}'s layout"
    encoder = getattr(model.text.inner, "config", None)  # CLIP's tower has none
    why_not = clap_hf.why_not_clap(config, encoder)
    with _appearing(out) as place:
        if why_not:
            no_text = flap_hf.write_flap(place, config, model, weights)
            text = f"no clap_text/: {no_text}" if no_text else "clap_text/ is its text side"
            return f"a FLAP's folder ({why_not}); {text}"
        indices = {n: b for n, b in model.named_buffers() if n.endswith("relative_position_index")}
        clap_hf.write_clap_settings(place, config, encoder)
        save_tensors(place / "model.safetensors", clap_hf.to_clap(weights | indices, unused))
        tokenizer(config.text).inner.save_pretrained(place)
        return "a folder for transformers.ClapModel"


def _laion_file(
    folder: Path, out: Path, weights: Tensors, prefix: str, unused: Tensors
) -> dict[str, Tensors]:
    rule = f"be a folder where {folder} was not imported from a .pt, whose unused layers that holds"
    remedy = "export to a folder, for transformers"
    require(any("tscam_conv" in name for name in unused), "OUT", rule, out, remedy)
    theirs = laion.to_laion(weights, unused)
    return {"state_dict": {prefix + name: value for name, value in theirs.items()}}


def _unused(folder: Path) -> tuple[str, Tensors]:
    """What stood before each name in the file imported, and what had no use."""
    file = folder / UNUSED
    found = read_tensors(file) if file.is_file() else {}
    prefix = _prefix(found)
    return prefix, {name.removeprefix(prefix): value for name, value in found.items()}


def _prefix(tensors: Tensors) -> str:
    """What stands before each name of a file."""
    return _MODULE if tensors and all(name.startswith(_MODULE) for name in tensors) else ""


@contextmanager
def _appearing(out: Path) -> Iterator[Path]:
    """A folder to write into, which becomes `out` if nothing is raised inside."""
    require(not out.exists() or (out.is_dir() and not any(out.iterdir())), "OUT", "be new", out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as place:
        inside = Path(place) / "whole"
        inside.mkdir()
        yield inside
        inside.replace(out)
