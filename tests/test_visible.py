"""Control characters in names and captions act on no terminal and no document."""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

import pytest
from rich.console import Console

import flap_fast
from flap_fast.evaluation import sheet
from flap_fast.evaluation.retrieval_tables import directions
from flap_fast.evaluation.retrieval_tables import terminal as retrieval_terminal
from flap_fast.evaluation.sheet import Sheet
from flap_fast.files import say, visible
from tests.test_cli import flap

# Red; C1's CSI; turned around; an isolate; a line end of Unicode; back to the line's start.
ODD = "a\x1b[31mb\x9b2Jc\u202ed\u2066e\u2028f\rg\x7fh"
SHOWN = r"a\x1b[31mb\x9b2Jc\u202ed\u2066e\u2028f\rg\x7fh"
CONTROLS = set(ODD) - set("ab[31m2Jcdefgh")


def harmless(text: str) -> bool:
    return not CONTROLS & set(text)


def test_controls_are_escaped_and_letters_stay():
    assert visible(ODD) == SHOWN
    assert visible("\u65e5\u672c caf\u00e9 \U0001f600") == "\u65e5\u672c caf\u00e9 \U0001f600"
    assert visible("a\nb\tc") == r"a\nb\tc"
    assert visible("a\nb", keep="\n") == "a\nb"
    for code in (*range(32), *range(127, 160), *range(0x202A, 0x202F), *range(0x2066, 0x206A)):
        assert visible(chr(code)).isprintable()


def test_bytes_that_are_no_utf8_stay_for_a_terminal_unless_they_are_controls():
    assert visible("\udce9") == "\udce9"
    assert visible("\udc9b") == r"\udc9b"
    assert visible("\udce9", document=True) == r"\udce9"


def test_what_is_said_has_its_lines_and_no_controls(capsys):
    say(f"one\ttab\n{ODD}")
    say(ODD, error=True)
    said = capsys.readouterr()
    assert said.out == f"one\ttab\n{SHOWN}\n"
    assert said.err == f"{SHOWN}\n"


def test_tables_have_no_controls_and_each_row_stays_one_line():
    ours, papers = [(f"<{ODD}\n>", "1")], [(ODD, "2")]
    one = Sheet(f"{ODD}\n", (f"{ODD}\n", "R@1"), ours, papers, f"{ODD}\udce9")
    for write in (sheet.markdown, sheet.latex):
        text = write(one)
        assert harmless(text)
        text.encode()
    assert sheet.markdown(one).count("\n") == 8
    assert r"\textless a\textbackslash x1b[31m" in sheet.latex(one)
    values = {key: defaultdict(lambda: 0.5) for key in directions("audio")}
    scores = {"clips": 1, "captions": 1, **values, "chance": values}
    for table in (sheet.terminal(one), retrieval_terminal({ODD: scores})):
        console = Console(width=200)
        with console.capture() as said:
            console.print(table)
        assert harmless(said.get())
        assert "x9b2J" in said.get()


@pytest.mark.parametrize(
    "arguments",
    [
        (ODD,),
        (f"--{ODD}",),
        ("eval", "m", f"--{ODD}"),
        ("prepare", ODD, "out", "--shard-clips", ODD),
        ("prepare", ODD, "out"),
        ("prepare", "a.jsonl", "out", "--source", ODD),
        ("train", ODD),
        ("config", "show", ODD),
        ("config", "show", "configs/tiny.yaml", f"{ODD}=1"),
        ("config", "show", "configs/tiny.yaml", f"run.name='{ODD}'"),
        ("config", "show", "configs/tiny.yaml", f"data.train=[{ODD}"),
        ("rank", ODD, "a.wav", "a"),
        ("eval", ODD, ODD),
        ("search", "a", "--audio", ODD, "--model", ODD),
        ("classify", ODD, "--labels", "a,b", "--model", ODD),
        ("embed", ODD, "--out", "out", "--model", ODD),
        ("report", ODD),
        ("import", ODD, "out"),
        ("export", ODD, "out"),
        ("plan", "configs/tiny.yaml", "--lengths", ODD),
        ("plan", "configs/tiny.yaml", "--link", ODD),
    ],
)
def test_no_error_has_controls(arguments, monkeypatch, capsys, tmp_path: Path):
    assert flap(*arguments, monkeypatch=monkeypatch) != 0
    said = capsys.readouterr()
    assert harmless(said.out + said.err)
    assert "Traceback" not in said.err
    assert said.err


# Numbers and settings for programs, what prints for all others, and a program that leaves alone.
PRINTS = {
    *("__main__.py", "files.py", "config/reference.py", "tools/profile/search.py"),
    "interchange/to_onnx/embed.py",
}


def test_lines_are_printed_by_the_function_that_escapes_them():
    package = Path(flap_fast.__file__).parent
    found = {
        file.relative_to(package).as_posix()
        for file in package.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "print"
    }
    assert found == PRINTS
