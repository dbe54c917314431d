"""YAML -> a tree of settings; what is wrong with the text is a sentence with line and setting."""

from __future__ import annotations

import json
import math
import re
from typing import Any

import yaml

from flap_fast.checks import ConfigError


def parse_yaml(text: str | bytes, what: str) -> Any:
    """The tree of a YAML text.

    Raises:
        ConfigError: "WHAT must be YAML: ...", of a file with the line and the setting.
    """
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        size = _expanded(node, {})
        if (
            size <= _MOST_VALUES or size == math.inf
        ):  # the loader names a value that contains itself
            return loader.construct_document(node) if node is not None else None
        reason = f"at most {_MOST_VALUES} values, aliases written out, got {size}"
    except (yaml.YAMLError, UnicodeError) as error:
        reason = _reason(error, text)
    except RecursionError:
        reason = "nested too deeply"
    raise ConfigError(f"{what} must be YAML: {reason}")


def comment_after(text: str) -> str:
    """The comment that ends a YAML text."""
    *_, last, _ = yaml.scan(text)
    return text[last.end_mark.index :].strip()


def quoted(text: str) -> str:
    """YAML of a text that may hold any signs; of a long one only how it is written."""
    return json.dumps(text, ensure_ascii=False) if len(text) <= _LONG else '"..."'


def with_quotes(text: str) -> str:
    """YAML of a text that was not understood; of a list or a section with quotes inside of it.

    Empty where it is not clear what belongs in quotes.
    """
    found = _WORD.sub(lambda w: quoted(w[0]) if re.match(r"[*&!%@`]|.*\{", w[0]) else w[0], text)
    inside = (text[:1], text[-1:]) in (("[", "]"), ("{", "}"))
    try:
        parse_yaml(found, "")
    except ConfigError:
        return "" if inside else quoted(text)
    return found if inside and found != text else quoted(text)


# Of a list or a section, with braces as bash has them.
_WORD = re.compile(r"""(?:[^\s,\[\]{}"']|\{[^{}:]*\})+""")

# More of a text is not repeated in a sentence about it.
_LONG = 200

# All settings together are a few hundred.
_MOST_VALUES = 100_000


def _expanded(node: yaml.Node | None, sizes: dict[int, float]) -> float:
    """The number of values below a node, with its aliases written out; infinite for a cycle."""
    if not isinstance(node, yaml.CollectionNode):
        return 1
    if id(node) not in sizes:
        sizes[id(node)] = math.inf  # while it is being counted
        below = [n for pair in node.value for n in (pair if isinstance(pair, tuple) else (pair,))]
        sizes[id(node)] = 1 + sum(_expanded(n, sizes) for n in below)
    return sizes[id(node)]


def _reason(error: Exception, text: str | bytes) -> str:
    if isinstance(error, yaml.reader.ReaderError):
        reason = f"{error.reason}, got {error.character!r}"
        whole = text if isinstance(text, bytes) else text.encode(errors="replace")
        before = whole[: error.position].count(b"\n")
        setting = re.match(rb"\s*([\w.]+)\s*:", whole.split(b"\n")[before])
        name = f", setting {setting[1].decode()}" if setting else ""
        return f"{reason}, in line {before + 1}{name}" if isinstance(text, bytes) else reason
    if not isinstance(error, yaml.MarkedYAMLError):
        return " ".join(str(error).split())
    reason = ", ".join(filter(None, (error.context, error.problem)))
    mark = error.problem_mark or error.context_mark
    if mark is None or not isinstance(text, bytes):
        return reason
    setting = _setting_at(mark, text)
    line = text.split(b"\n")[mark.line].decode(errors="replace")
    return f"{reason}, in line {mark.line + 1}" + (
        f", setting {setting}" if setting else _in_quotes(line)
    )


def _in_quotes(line: str) -> str:
    """The remedy for a line whose value has a meaning in YAML that was hardly meant; or nothing."""
    found = re.fullmatch(r"\s*((?:- +)*(?:[\w.]+: +)?)([\[{&*!|>%@`].*|.*: .*?)\s*", line)
    right = with_quotes(found[2]) if found and found[1] else ""
    return f"; in quotes it is a text: {found[1]}{right}" if found and right else ""


def _setting_at(mark: yaml.Mark, text: bytes) -> str:
    """The dotted name of the value that begins at a mark; empty where the text has no structure."""
    try:
        node = yaml.compose(text, yaml.SafeLoader)
    except (yaml.YAMLError, RecursionError):
        return ""
    names: list[str] = []
    while isinstance(node, yaml.MappingNode) and len(names) < 9:  # it may contain itself
        inside = (
            (name, value) for name, value in node.value if name.start_mark.index <= mark.index
        )
        name, node = max(inside, key=lambda pair: pair[0].start_mark.index, default=(None, None))
        if not isinstance(name, yaml.ScalarNode):
            break
        names.append(name.value)
    return ".".join(names)


class _Loader(yaml.SafeLoader):
    """Refuses duplicate names in a section, of which PyYAML silently drops the first.

    Reads `on` as a name, which YAML 1.1 reads as `true`. Errors of Python in a value, as of a date
    that there is not, become YAML's; so do a value that contains itself and half of a surrogate
    pair.
    """

    def construct_document(self, node):
        return self.construct_object(node, deep=True)  # finds a value that contains itself

    def construct_object(self, node, deep=False):
        if node.tag.endswith(":int") and re.match(r"[-+]?0[\d_]", node.value):
            reason = f"a number must not begin with 0, which YAML takes for octal, got {node.value}"
            raise yaml.constructor.ConstructorError(None, None, reason, node.start_mark)
        try:
            value = super().construct_object(node, deep)
        except (ValueError, TypeError, AttributeError, LookupError, ArithmeticError) as error:
            reason = f"not a value of {node.tag.rpartition(':')[2]}"
            reason += f": {error}" if isinstance(error, ValueError) else ""
            raise yaml.constructor.ConstructorError(None, None, reason, node.start_mark) from None
        if isinstance(value, str) and any("\ud800" <= sign <= "\udfff" for sign in value):
            reason = f"a text must be valid Unicode, got {value!r}"
            raise yaml.constructor.ConstructorError(None, None, reason, node.start_mark)
        return value

    def construct_mapping(self, node, deep=False):
        seen: set[str] = set()
        for key, _ in node.value:
            if str(key.value) in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"'{key.value}' must stand once", key.start_mark
                )
            seen.add(str(key.value))
            if key.tag == "tag:yaml.org,2002:bool":
                key.tag = "tag:yaml.org,2002:str"
        return super().construct_mapping(node, deep)
