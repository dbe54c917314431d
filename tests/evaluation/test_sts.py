"""STS: correlations beside SciPy's, and files as published."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from flap_fast.checks import ConfigError
from flap_fast.evaluation.sts import SINGLE, YEARS, similarity, spearman


def at_angle(sentences: Sequence[str]) -> Tensor:
    """A sentence `30 degrees` points there, twice as long as a unit; the cosine must not care."""
    angles = torch.deg2rad(torch.tensor([float(s.split()[0]) for s in sentences]))
    return 2 * torch.stack([angles.cos(), angles.sin()], 1)


def test_spearman_is_scipys_also_with_ties():
    stats = pytest.importorskip("scipy.stats")
    draws = np.random.default_rng(0)
    for _ in range(5):
        a, b = draws.integers(0, 6, 40), draws.standard_normal(40).round(1)
        assert spearman(a, b) == pytest.approx(stats.spearmanr(a, b).statistic)


def write(file: Path, *lines: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def test_sts_benchmark_of_a_file_with_quotes_and_a_licence_column(tmp_path: Path):
    file = tmp_path / "sts-test.csv"
    write(
        file,
        'main\tMSRvid\t2012\t1\t5.0\t0 degrees "\t10   degrees',
        "main\tMSRvid\t2012\t2\t1.0\t0 degrees\t50 degrees\tCC-BY",
        "main\tMSRvid\t2012\t3\t2.0\t0 degrees\t90 degrees",
    )
    assert similarity(at_angle, file)["sts-test"] == {"spearman": pytest.approx(0.5), "pairs": 3}


def noisy(sentences: Sequence[str]) -> Tensor:
    """As an encoder's rows, whose last bits depend on the sentences beside them."""
    rows = at_angle(sentences).float()
    return rows * (1 + 1e-7 * torch.randn(rows.shape, generator=torch.Generator().manual_seed(0)))


def test_pairs_of_one_sentence_twice_are_ties_whatever_the_last_bits(tmp_path: Path):
    file = tmp_path / "sts-test.csv"
    same = [f"g\tf\ty\t1\t{5 - n % 3}\t{7 * n} x\t{7 * n} x" for n in range(30)]
    turned = [
        f"g\tf\ty\t1\t{n % 4}\t{a} x\t{b} x" for n, (a, b) in enumerate(6 * [(3, 40), (40, 3)])
    ]
    write(file, *same, *turned)
    judged = [float(line.split("\t")[4]) for line in (*same, *turned)]
    exact = spearman(np.repeat([1.0, 0.5], (30, 12)), np.array(judged))
    for texts in (at_angle, noisy):
        assert similarity(texts, file)["sts-test"]["spearman"] == pytest.approx(exact, abs=1e-12)


def test_each_sentence_is_embedded_once(tmp_path: Path):
    seen: list[str] = []

    def texts(sentences: Sequence[str]) -> Tensor:
        seen.extend(sentences)
        return at_angle(sentences)

    similarity(texts, senteval(tmp_path) / SINGLE["SICKRelatedness"])
    assert seen == ["0 x", "9 x", "2 x", "5 x"]


def senteval(folder: Path) -> Path:
    """Each subset is ordered as people have it, from a level of its own."""
    for year, subsets in YEARS.items():
        for n, subset in enumerate(subsets):
            inside = folder / "STS" / f"{year}-en-test"
            write(inside / f"STS.input.{subset}.txt", "0 x\t80 x", "0 x\t20 x", "0 x\t1 x")
            # The last pair was not judged.
            write(inside / f"STS.gs.{subset}.txt", f"{1 + (year == 'STS12') * n}", "4.5", "")
    write(folder / SINGLE["STSBenchmark"], "g\tf\ty\t1\t0\t0 x\t9 x", "g\tf\ty\t1\t5\t0 x\t2 x")
    header = "pair_ID\tsentence_A\tsentence_B\trelatedness_score\tentailment_judgment"
    rows = ("1\t0 x\t9 x\t1.5\tNEUTRAL", "2\t0 x\t2 x\t4\tENTAILMENT", "3\t0 x\t5 x\t3\tNEUTRAL")
    write(folder / SINGLE["SICKRelatedness"], header, *rows)
    return folder


def test_all_pairs_of_a_year_are_ranked_together(tmp_path: Path):
    found = similarity(at_angle, senteval(tmp_path))
    assert [found[year]["pairs"] for year in YEARS] == [10, 6, 12, 10, 10]
    assert found["STS13"]["spearman"] == pytest.approx(1)
    # STS12's subsets rank their own two pairs right, but for the last: 5 is above 4.5 there.
    assert found["STS12"]["spearman"] < 0.99
    assert found["SICKRelatedness"] == {"spearman": pytest.approx(1), "pairs": 3}
    seven = [found[name]["spearman"] for name in (*YEARS, *SINGLE)]
    assert found["average"] == pytest.approx(sum(seven) / 7)


def test_there_is_no_average_of_fewer_than_seven(tmp_path: Path):
    file = senteval(tmp_path) / SINGLE["SICKRelatedness"]
    file.unlink()
    assert "average" not in similarity(at_angle, tmp_path)


@pytest.mark.parametrize(("judged", "got"), [((), 0), ((3,), 1), ((3, 3, 3), 1)])
def test_judgements_that_order_nothing_are_refused(judged, got, tmp_path: Path):
    file = tmp_path / "sts-dev.csv"
    write(file, *(f"g\tf\ty\t1\t{score}\t0 x\t{n} x" for n, score in enumerate(judged)))
    rule = r"sts-dev\.csv, sts-dev, must hold pairs of two judgements at least"
    with pytest.raises(ConfigError, match=f"{rule}, got {got}"):
        similarity(lambda _: pytest.fail("it embedded"), file)


def test_values_without_an_order_have_no_correlation(tmp_path: Path):
    rising = np.arange(3.0)
    for values in (np.array([0.5, np.nan, 0.1]), np.ones(3)):
        with pytest.raises(ArithmeticError, match="must be finite and differ"):
            spearman(values, rising)
        with pytest.raises(ArithmeticError, match="must be finite and differ"):
            spearman(rising, values)
    file = tmp_path / "sts-dev.csv"
    write(file, "g\tf\ty\t1\t1\t0 x\t9 x", "g\tf\ty\t1\tnan\t0 x\t9 x")
    with pytest.raises(ConfigError, match=r"sts-dev\.csv:2 must be a scored pair"):
        similarity(at_angle, file)


def test_what_is_not_as_published_is_named(tmp_path: Path):
    with pytest.raises(ConfigError, match="SentEval's folder with STS/"):
        similarity(at_angle, tmp_path)
    file = senteval(tmp_path) / SINGLE["STSBenchmark"]
    file.write_text("g\tf\ty\t1\tgood\t0 x\t9 x\n")
    with pytest.raises(ConfigError, match=r"sts-test.csv:1 must be a scored pair"):
        similarity(at_angle, tmp_path)
    file.write_text("sentence1,sentence2,score\na,b,5\n")
    with pytest.raises(ConfigError, match=r":1 must be a .* at least 7 columns, .*got '1 columns'"):
        similarity(at_angle, tmp_path)
    file.write_bytes("g\tf\ty\t1\t5\tcaf\u00e9\tb\n".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"an STS file must be a UTF-8 .*iconv -f CHARSET"):
        similarity(at_angle, tmp_path)
    (tmp_path / "STS/STS12-en-test/STS.gs.MSRvid.txt").write_text("1\n")
    with pytest.raises(
        ConfigError, match=r"STS.gs.MSRvid.txt must have 3 lines, one a pair, got 1"
    ):
        similarity(at_angle, tmp_path)
    (tmp_path / "STS/STS12-en-test/STS.gs.MSRpar.txt").unlink()
    with pytest.raises(ConfigError, match=r"^an STS file must name an .*STS.gs.MSRpar.txt'"):
        similarity(at_angle, tmp_path)
