"""Pydantic's faults -> sentences that name the setting, the rule, the value and the remedy."""

from __future__ import annotations

import difflib
import re
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from datetime import date
from typing import Any

from flap_fast.checks import ConfigError
from flap_fast.config import Config
from flap_fast.encoders import ENCODERS
from flap_fast.section import Section

# What other trainers call a setting.
_ELSEWHERE = {
    "batch": "train.global_batch",
    "batch_size": "train.global_batch",
    "train_batch_size": "train.global_batch",
    "per_device_train_batch_size": "train.micro_batch",
    "micro_batch_size": "train.micro_batch",
    "grad_accum": "train.micro_batch",
    "gradient_accumulation_steps": "train.micro_batch",
    "learning_rate": "optim.lr",
    "wd": "optim.weight_decay",
    "max_grad_norm": "optim.clip_norm",
    "grad_clip": "optim.clip_norm",
    "beta1": "optim.betas",
    "beta2": "optim.betas",
    "optimizer": "optim.name",
    "warmup": "sched.warmup_steps",
    "max_steps": "train.steps",
    "num_steps": "train.steps",
    "max_epochs": "train.epochs",
    "num_epochs": "train.epochs",
    "num_train_epochs": "train.epochs",
    "workers": "frontend.threads",
    "num_workers": "frontend.threads",
    "sample_rate": "audio.sample_rate_hz",
    "sampling_rate": "audio.sample_rate_hz",
    "duration": "audio.duration_s",
    "n_mels": "audio.mel_bins",
    "mask_ratio": "mask.ratio",
    "fp16": "train.precision",
    "bf16": "train.precision",
    "amp": "train.precision",
    "output_dir": "run.folder",
    "train_data": "data.train",
    "val_data": "data.val",
    "embed_dim": "joint.width",
}

# Whole up to a point: an alias can make a value of a few lines exponentially long.
_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother, _SHORT.maxlong = 4, 200, 200, 60
_SHORT.maxlist = _SHORT.maxtuple = _SHORT.maxdict = _SHORT.maxset = 12


def sentence(fault: Mapping[str, Any], tree: Mapping[str, Any]) -> str:
    """One of pydantic's faults as "NAME must RULE, got VALUE"; `tree` is what was checked."""
    path = [str(part) for part in fault["loc"]]
    arms = ENCODERS.get(path[0], {}) if path else {}
    unknown_arm = fault["type"] == "union_tag_invalid"
    if unknown_arm or (arms and path[-1] == "encoder"):
        *others, last = (f"'{name}'" for name in arms)
        names = f"{', '.join(others)} or {last}" if others else last
        got = fault["input"].get("encoder") if unknown_arm else fault["input"]
        return f"{path[0]}.encoder must be {names}, got {_SHORT.repr(got)}"
    # Pydantic names the arm of a union in the path, unless it is the only one.
    first = next(iter(arms.values()), None)
    arm = arms[path.pop(1)] if len(path) > 1 and path[1] in arms else None
    name = ".".join(path)
    if fault["type"] == "extra_forbidden":
        *sections, last = path
        if others := [n for n, other in arms.items() if last in other.model_fields]:
            encoder, mine = f"{path[0]}.encoder", arm or next(iter(arms.values()))
            return (
                f"{name} must be left out with {encoder} = {mine.name()}, "
                f"got {_SHORT.repr(fault['input'])}; it is a setting of {encoder} = "
                f"{' or '.join(others)} ({name}=null leaves it out)"
            )
        known = list(_section(sections, arm or first).model_fields)
        section = isinstance(fault["input"], dict) and last.lower() in Config.model_fields
        meant = [last.lower()] if section else _meant(sections, last, known)
        hint = f": did you mean {' or '.join(meant)}" if meant else ""
        if ":" in last:
            hint = f": in a file write {last.replace(':', ': ')}, with a space"
        elif "." in last:
            hint = f": in a file write {last.replace('.', ': {')}: ...{'}' * last.count('.')}"
        if empty := _empty_among(meant or (), tree) if not sections else "":
            hint += f"? Indent it below {empty}:"
        return f"{name or repr(name)} is not a setting{hint}. Known here: {', '.join(known)}"
    cause = fault.get("ctx", {}).get("error")
    if isinstance(cause, ConfigError):
        return str(cause)
    rule = fault["msg"] if fault["type"] != "model_type" else "must be a section of settings"
    for theirs, ours in _WORDS.items():
        rule = rule.replace(theirs, ours)
    value, remedy = fault["input"], fault.get("ctx", {}).get("remedy", "")
    remedy = remedy and f"; {remedy}"
    if fault["type"] == "model_type" and (empty := _empty_among(_meant([], name, ()), tree)):
        remedy = f"; indent it below {empty}:"
    is_text, item = fault["type"] in ("string_type", "path_type"), path[-1].isdigit()
    mistaken = isinstance(value, dict if item else (int, float, date, dict, list))
    if is_text and mistaken and not (isinstance(value, dict) and "path" in value):
        remedy = f"; in quotes it is a text: '{'.'.join(path[:-1] if item else path)}=\"...\"'"
    # Commas where a list belongs: `8,16`, or the only item of a list of names.
    several = fault["type"] == "tuple_type" or path[-1].isdigit()
    if several and isinstance(value, str):
        items = re.split(r"\s*,\s*|\s+", value.strip(" ()[]"))
        remedy = f"; write [{','.join(items)}]" if items[1:] else ""
    got = value if isinstance(value, float) else _SHORT.repr(value)
    return f"{name} {rule}, got {got}{remedy}"


# How pydantic's sentences begin, and how ours do.
_WORDS = {
    "Input should be": "must be",
    "String should": "must",
    "Tuple should": "must",
    "Value should": "must",
    ", not 0": "",
    " after validation": "",
    "Keys should": "must",
    "Field required": "must be given",
    "a valid tuple": "a list",
    "Input is not a valid path for <class 'pathlib.Path'>": "must be a path",
}


def _meant(sections: Sequence[str], last: str, known: Sequence[str]) -> list[str]:
    """The settings that an unknown name may mean, at most three."""
    everywhere = list(dict.fromkeys(_settings(Config)))
    last = last.lower().replace("-", "_")
    same = [name for name in everywhere if name.split(".")[-1] == last]
    if same:
        return same[:3]
    if last in _ELSEWHERE:
        return [_ELSEWHERE[last]]
    close = difflib.get_close_matches(last, known, n=1)
    if close:
        return [".".join([*sections, close[0]])]
    ends = {name.split(".")[-1]: name for name in reversed(everywhere)}
    return [ends[end] for end in difflib.get_close_matches(last, ends, n=1, cutoff=0.8)]


def _empty_among(meant: Sequence[str], tree: Mapping[str, Any]) -> str:
    """The first section that has one of these settings and nothing below it in the file."""
    sections = (name.split(".")[0] for name in meant)
    return next((name for name in sections if tree.get(name, name) is None), "")


def _settings(section: type[Section], above: str = "") -> Iterator[str]:
    """The dotted names of all settings, those of every encoder too."""
    for name, field in section.model_fields.items():
        if not above and name in ENCODERS:
            for arm in ENCODERS[name].values():
                yield from _settings(arm, f"{name}.")
        elif isinstance(field.default, Section):
            if above:
                yield f"{above}{name}"
            yield from _settings(type(field.default), f"{above}{name}.")
        else:
            yield f"{above}{name}"


def _section(names: Sequence[str], encoder: Any) -> Any:
    """The class of a section; of an encoder's section, the class that `encoder` selects."""
    section: Any = Config
    for number, name in enumerate(names):
        field = section.model_fields[name].annotation
        section = encoder if number == 0 and encoder is not None else field
    return section
