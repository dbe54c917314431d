"""Captions -> tokens: cut at the limit, padded to the batch's longest, never fetched from a hub."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest
import torch

from flap_fast.checks import ConfigError
from flap_fast.config.file import load_config
from flap_fast.data.tokenize import Tokenizer, local_folder, portable_tokenizer, tokenizer
from flap_fast.encoders.roberta.settings import RobertaSettings


def test_bytes_need_no_file_and_end_with_a_mark():
    """ByT5: byte + 3, then 1; 0 is padding."""
    ids, mask = tokenizer(RobertaSettings())(["ab", "é"])
    assert ids.dtype == mask.dtype == torch.int64
    assert ids.tolist() == [[100, 101, 1, 0, 0, 0, 0, 0], [198, 172, 1, 0, 0, 0, 0, 0]]
    assert mask.tolist() == [[1, 1, 1, 0, 0, 0, 0, 0]] * 2


@pytest.mark.parametrize(
    ("longest", "length"),
    [(0, 8), (6, 8), (7, 8), (8, 16), (20, 24), (76, 80), (77, 80), (500, 80)],
)
@pytest.mark.parametrize("kind", ["bytes", "roberta"])
def test_a_batch_is_as_long_as_its_longest_caption_in_eights(roberta_folder, kind, longest, length):
    """77 tokens at most; padding goes to 80 then, which no tokenizer asked for both may refuse."""
    text = RobertaSettings(tokenizer=kind if kind == "bytes" else str(roberta_folder))
    ids, mask = tokenizer(text)(["", "q" * longest])
    end = 1 if kind == "bytes" else 2
    extra = 0 if kind == "bytes" else 1  # <s>
    tokens = min(77, longest + 1 + extra)
    assert ids.shape == mask.shape == (2, -(-tokens // 8) * 8)
    if kind == "bytes":
        assert ids.shape[1] == length
    assert mask.sum(1).tolist() == [1 + extra, tokens]
    # A caption that was cut still ends with its mark.
    assert [row[keep == 1][-1].item() for row, keep in zip(ids, mask, strict=True)] == [end, end]


def test_robertas_tokens_begin_and_end_with_its_marks(roberta_folder):
    ids, mask = tokenizer(RobertaSettings(tokenizer=str(roberta_folder)))(["a dog barks", "a"])
    assert ids[:, 0].tolist() == [0, 0]
    assert (ids[mask == 0] == 1).all()
    assert (mask.diff(dim=1) <= 0).all()


def test_a_caption_has_the_same_tokens_in_any_company(roberta_folder):
    tokens = tokenizer(RobertaSettings(tokenizer=str(roberta_folder)))
    captions = ["a dog barks", "rain falls on a roof while a dog barks", "a"]
    ids, mask = tokens(captions)
    for caption, row, keep in zip(captions, ids, mask, strict=True):
        alone, alone_mask = tokens([caption])
        assert row[keep == 1].tolist() == alone[alone_mask == 1].tolist()


def test_a_limit_of_ones_own(roberta_folder):
    ids, mask = tokenizer(RobertaSettings(tokenizer=str(roberta_folder), max_tokens=5))(
        ["dog " * 50]
    )
    assert (ids.shape, mask.sum().item()) == ((1, 8), 5)


def test_a_missing_folder_is_named_with_the_command_that_fetches_it():
    with pytest.raises(ConfigError) as error:
        tokenizer(RobertaSettings(folder="models/none"))
    assert str(error.value) == (
        "text.folder must be an existing folder, got 'models/none'; for example: "
        "hf download FacebookAI/roberta-base --local-dir models/roberta-base"
    )
    with pytest.raises(ConfigError, match=r"^text.tokenizer must be an existing folder, got 'x'"):
        tokenizer(RobertaSettings(tokenizer="x"))


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(
        ConfigError, match=f"^text.tokenizer must hold a tokenizer, got '{tmp_path}'"
    ):
        tokenizer(RobertaSettings(tokenizer=str(tmp_path)))


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """An installed package with a model folder inside."""
    (tmp_path / "some_model/deep/down").mkdir(parents=True)
    (tmp_path / "some_model/__init__.py").write_text("raise RuntimeError('imported')")
    (tmp_path / "one_file.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def test_a_folder_may_lie_in_an_installed_package_which_is_not_imported(installed):
    found = local_folder("text.folder", "package:some_model/deep/down")
    assert found == installed / "some_model/deep/down"
    assert local_folder("text.folder", "package:some_model") == installed / "some_model"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("package:no_such_model/x", "name an installed package, .*; pip install no-such-model"),
        ("package:one_file", "name an installed package, got 'package:one_file'"),
        ("package:some_model/up", "be a folder inside the package, got 'package:some_model/up'"),
        ("package:", "name an installed package, got 'package:'"),
        ("package:no.such/x", "name an installed package, got 'package:no.such/x'"),
    ],
)
def test_a_wrong_package_is_refused(installed, value, message):
    with pytest.raises(ConfigError, match=f"^text.folder must {message}"):
        local_folder("text.folder", value)


def test_a_package_that_the_index_calls_otherwise_is_called_so(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"; pip install --no-deps open_clip_torch$"):
        local_folder("text.tokenizer", "package:open_clip")


def write_merges(folder: Path) -> None:
    """CLIP's file of byte pairs in miniature: `dog` and `do` become one piece each."""
    lines = ["a line of no use", "d o", "do g</w>", "d o</w>"]
    (folder / "bpe_simple_vocab_16e6.txt.gz").write_bytes(gzip.compress("\n".join(lines).encode()))


def test_clips_byte_pairs_are_read_from_the_file_that_openai_ships(tmp_path):
    write_merges(tmp_path)
    text = load_config(None, ["text.encoder=clip", f"text.tokenizer={tmp_path}"]).text
    tokens = tokenizer(text)
    start, end = 515, 516
    assert len(tokens.inner) == 517
    letter = {c: ord(c) - ord("!") for c in "abcdefghijklmnopqrstuvwxyz"}
    ids, mask = tokens(["A dog  do", "cat"])
    dog = [letter["a"] + 256, 513, 514]  # 512 is `do` inside of a word
    cat = [letter["c"], letter["a"], letter["t"] + 256]
    assert ids.tolist() == [[start, *words, end, end, end, end] for words in (dog, cat)]
    assert mask.tolist() == [[1, 1, 1, 1, 1, 0, 0, 0]] * 2


def test_a_cut_caption_still_ends_with_clips_mark(tmp_path):
    write_merges(tmp_path)
    settings = ["text.encoder=clip", "text.max_tokens=4", f"text.tokenizer={tmp_path}"]
    ids, mask = tokenizer(load_config(None, settings).text)(["dog dog dog dog"])
    assert ids[0, :4].tolist() == [515, 513, 513, 516]
    assert mask.sum() == 4


@pytest.mark.parametrize("kind", ["bytes", "roberta"])
def test_a_portable_tokenizer_gives_the_same_ids_padded_to_the_longest(kind, roberta_folder):
    text = RobertaSettings(max_tokens=12, folder=None if kind == "bytes" else str(roberta_folder))
    ours = tokenizer(text)
    captions = ["a dog barks", "\u00e9\u96e8 </s>  <pad>x", "", "rain falls on a tin roof " * 5]
    ids, mask = ours(captions)
    found = portable_tokenizer(ours).encode_batch(captions)
    assert [row.ids for row in found] == ids[:, :12].tolist()
    assert [row.attention_mask for row in found] == mask[:, :12].tolist()


def test_a_tokenizer_that_nothing_portable_equals_is_refused(roberta_folder):
    ours = tokenizer(RobertaSettings(folder=str(roberta_folder)))
    with pytest.raises(ConfigError, match=r"must have a tokenizer\.json, got 'a object'"):
        portable_tokenizer(Tokenizer(object(), 8))

    class Lower(type(ours.inner)):
        def __call__(self, text, **options):
            return super().__call__([t.lower() for t in text], **options)

    ours.inner.__class__ = Lower
    with pytest.raises(
        ConfigError, match=r"give the ids of its tokenizer\.json, a Lower, got 'A d"
    ):
        portable_tokenizer(ours)
