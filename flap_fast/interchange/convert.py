"""`flap import` and `flap export`: checkpoints of other projects -> model folders, and back.

A folder appears complete or not at all. Tensors that this project has no use for are stored in
`unused.safetensors`, so that an export holds them again.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import nn

from flap_fast.checks import ConfigError, require
from flap_fast.checksums import write_sums
from flap_fast.config import Config
from flap_fast.config.file import dump_config
from flap_fast.data.tokenize import local_folder as package_folder
from flap_fast.encoders.audio_settings import PatchEncoder
from flap_fast.hub import local_folder
from flap_fast.interchange.audiomae import AUDIOMAE
from flap_fast.interchange.clap_hf import CLAP
from flap_fast.interchange.clip_openai import OPENAI, ORIGIN
from flap_fast.interchange.flap_hf import FLAP
from flap_fast.interchange.laion import HTSAT, LAION
from flap_fast.interchange.layout import CardFields, Export, Imported, Layout, Source
from flap_fast.interchange.tensors import (
    MODULE,
    Tensors,
    fitted_tensors,
    module_prefix,
    read_json,
    read_saved,
    read_tensors,
    strip_prefixes,
)
from flap_fast.interchange.yamnet import YAMNET, onnx_file, read_onnx
from flap_fast.model.decoder import Decoder
from flap_fast.model.model_folder import (
    CLASSES,
    TOWER,
    load_model,
    model_folder,
    save_model,
    with_text,
)
from flap_fast.model.two_towers import TwoTowers
from flap_fast.tensors import save_tensors

# The first layout that matches is read, and the first that can hold a model is written.
LAYOUTS: tuple[Layout, ...] = (
    LAION,
    OPENAI,
    HTSAT,
    AUDIOMAE,
    CLAP,
    FLAP,
    YAMNET,
    # one line for each layout
)
UNUSED = "unused.safetensors"


def import_checkpoint(
    path: Path,
    out: Path,
    overrides: Sequence[str] = (),
    *,
    strip: Sequence[str] = (),
    partial: bool = False,
    decoder: bool = False,
) -> str:
    """Write another project's checkpoint as a model folder; returns what to do with it.

    Args:
        overrides: settings that the checkpoint does not hold, such as `text.folder=...`.
        strip: prefixes to remove from its names.
        partial: take the tensors that fit; the others are random.
        decoder: import AudioMAE's decoder too.

    Raises:
        ConfigError: an unknown layout, or tensors that do not fit, each of them named.
    """
    if str(path).startswith("package:"):
        path = package_folder("the checkpoint", str(path))
    require(path.exists(), "the checkpoint", "exist", path)
    with appearing(out) as folder, TemporaryDirectory() as work:
        source = _opened(path, Path(work), overrides, strip, partial, decoder)
        imported = _layout_of(source).read(source)
        torch.manual_seed(imported.config.run.seed)
        if imported.origin is not None:
            (folder / ORIGIN).write_text(json.dumps(imported.origin, indent=2) + "\n")
        write = _write_encoder if imported.encoder_only else _write_model
        use = write(source, imported, folder, out)
        write_sums(folder)
        return use


def importable(folder: Path) -> bool:
    """Whether a folder must be imported to be opened, and can be."""
    config = folder / "config.json"
    if (folder / "config.yaml").is_file() or not config.is_file():
        return False
    model_type = read_json(config).get("model_type")
    return model_type in [layout.names for layout in LAYOUTS if layout.form == "folder"]


def _opened(
    path: Path,
    work: Path,
    overrides: Sequence[str],
    strip: Sequence[str],
    partial: bool,
    decoder: bool,
) -> Source:
    tensors, saved, model_type = {}, None, None
    if onnx := onnx_file(path):
        saved = read_onnx(onnx, work)
        tensors = saved.tensors
    elif path.is_dir():
        rule = "be another project's folder: this one's opens as it is, or with train.init_from"
        ours = (path / "config.yaml").is_file() and not (path / "config.json").is_file()
        require(not ours, "the checkpoint", rule, path)
        model_type = read_json(path / "config.json").get("model_type")
    else:
        saved = read_saved(path)
        tensors = strip_prefixes(saved.tensors, (MODULE, *strip))
    return Source(path, work, tensors, saved, model_type, overrides, strip, partial, decoder)


def _layout_of(source: Source) -> Layout:
    form = "folder" if source.saved is None else "file"
    layouts = [layout for layout in LAYOUTS if layout.form == form]
    found = next((layout for layout in layouts if layout.matches(source)), None)
    *names, last = (layout.names for layout in layouts)
    known = f"{', '.join(names)} or {last}"
    if found is None and form == "folder":
        name = f"{source.path}/config.json: model_type"
        require(False, name, f"be {known}", source.model_type)
    first = ", ".join(list(source.tensors)[:3])
    remedy = "--strip PREFIX shortens names"
    require(found is not None, str(source.path), f"have {known} names", first, remedy)
    assert found is not None
    return found


def _write_model(source: Source, imported: Imported, folder: Path, out: Path) -> str:
    config, partial = imported.config, source.partial
    model = TwoTowers(config, weights=False)
    weights = fitted_tensors(imported.tensors, model.state_dict(), source.path, partial=partial)
    save_model(folder, config, model, weights, sums=False)
    if imported.unused:
        save_tensors(folder / UNUSED, imported.unused)
    _write_config(folder, with_text(config, out / "text"), "init_from", out)
    return f"open it with flap_fast.load('{out}'), train on with train.init_from={out}"


def _write_encoder(source: Source, imported: Imported, folder: Path, out: Path) -> str:
    config = imported.config
    encoder = config.encoder.build(config)
    parts: dict[str, nn.Module] = {"audio": encoder}
    if imported.decoder:
        assert isinstance(config.encoder, PatchEncoder)  # the config has checked it
        parts["decoder"] = Decoder(config, config.encoder, encoder.width)  # type: ignore[arg-type]
    wanted = nn.ModuleDict(parts).state_dict()
    weights = fitted_tensors(imported.tensors, wanted, source.path, partial=source.partial)
    what, why_not = "an audio encoder", imported.why_no_classifier
    if imported.class_names:
        weights |= imported.classifier
        (folder / CLASSES).write_bytes(("\n".join(imported.class_names) + "\n").encode())
        what += f" and its {len(imported.class_names)} classes"
    elif why_not:
        what += f" without a classifier ({why_not})"
    save_tensors(folder / TOWER, weights)
    _write_config(folder, config, "init_audio_from", out)
    return f"{what}; train from it with train.init_audio_from={out}"


def _write_config(folder: Path, config: Config, begin: str, out: Path) -> None:
    """Write a config that starts a training from the folder's final path."""
    begins = {"init_from": None, "init_audio_from": None, begin: out}
    begins = config.train.model_copy(update=begins)
    config = config.model_copy(update={"train": begins})
    (folder / "config.yaml").write_text(dump_config(config))


def export_checkpoint(path: str | Path, out: Path, fields: CardFields | None = None) -> str:
    """Write a model folder, or a run's last checkpoint, for other projects.

    Args:
        out: a `.pt` or `.pth` file, or a folder, which has a model card too.
        fields: what the card says that the run does not know.

    Returns:
        What was written.

    Raises:
        ConfigError: no layout can hold the model, or OUT exists.
    """
    from flap_fast.interchange.card import write_card  # with huggingface_hub

    path = local_folder(path)
    folder = model_folder(path)
    model, config = load_model(folder)
    prefix, unused = _unused(folder)
    export = Export(folder, config, model, model.state_dict(), unused, prefix)
    form = "file" if out.suffix in (".pt", ".pth") else "folder"
    layout = _writer(export, form)
    left_out = ""
    if not layout.holds_bias and export.weights.pop("logit_bias", None) is not None:
        left_out = ", without loss.sigmoid's logit_bias, which it has no place for"
    assert layout.write is not None
    if form == "file":
        require(not out.exists(), "OUT", "be new", out)
        return layout.write(export, out) + left_out
    with appearing(out) as inside:
        written = layout.write(export, inside)
        write_card(inside, export, path, fields or CardFields())
        return written + left_out


def _writer(export: Export, form: str) -> Layout:
    """The first layout that can hold the model."""
    reasons = []
    for layout in LAYOUTS:
        if layout.write is None or layout.form != form:
            continue
        if not (why_not := layout.refusal(export)):
            return layout
        reasons.append(f"not {layout.names}: {why_not}")
    raise ConfigError(f"OUT must be in a layout that holds the model, got {'; '.join(reasons)}")


def _unused(folder: Path) -> tuple[str, Tensors]:
    """Return the prefix of names in the imported file, and the tensors without a use here."""
    file = folder / UNUSED
    found = read_tensors(file) if file.is_file() else {}
    prefix = module_prefix(found)
    return prefix, {name.removeprefix(prefix): value for name, value in found.items()}


@contextmanager
def appearing(out: Path) -> Iterator[Path]:
    """Yield a folder to write into, which becomes `out` unless an exception is raised."""
    require(not out.exists() or (out.is_dir() and not any(out.iterdir())), "OUT", "be new", out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as temporary:
        inside = Path(temporary) / "whole"
        inside.mkdir()
        yield inside
        inside.replace(out)
