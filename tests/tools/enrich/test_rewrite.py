"""A language model of a folder: drawn by seed and caption alone, stopped at its end mark."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from flap_fast.checks import ConfigError
from flap_fast.data.random_streams import Stream, uniforms
from flap_fast.tools.enrich.rewrite import LanguageModel, NucleusSampler
from tests.tools.enrich.models import write_model

PROMPTS = ["a dog barks", "rain falls on a roof while a dog barks", "a"]
KEYS = [3, 2**62 + 5, 11]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("llama"))


def model(folder: Path, **settings) -> LanguageModel:
    return LanguageModel(str(folder), **{"chat": "plain", "most_tokens": 12, **settings})


def test_a_caption_is_written_alike_in_any_company(folder):
    writer = model(folder)
    together = writer(PROMPTS, KEYS)
    alone = [writer([prompt], [key])[0] for prompt, key in zip(PROMPTS, KEYS, strict=True)]
    assert together == alone == model(folder)(PROMPTS, KEYS)
    assert len({written.text for written in together}) == 3


def test_another_seed_or_another_caption_is_written_otherwise(folder):
    (first,) = model(folder)(["a dog"], [1])
    assert model(folder)(["a dog"], [2]) != [first]
    assert model(folder, seed=1)(["a dog"], [1]) != [first]
    assert model(folder, temperature=0)(["a dog"], [1]) == model(folder, temperature=0)(
        ["a dog"], [2]
    )


def draw(scores, u, *, temperature=1.0, top_p=1.0):
    """The tokens drawn at the second step."""
    numbers = torch.tensor([[0.0, value] for value in u])
    out = NucleusSampler(numbers, 5, temperature, top_p)(
        torch.zeros(len(u), 6).long(), torch.tensor(scores)
    )
    assert ((out == 0).sum(1) == 1).all()
    assert (out.isinf().sum(1) == out.shape[1] - 1).all()
    return out.argmax(1).tolist()


def test_a_token_is_drawn_with_its_probability_by_hand():
    """Of 0.1, 0.6 and 0.3 the likeliest comes first: [0, 0.6) is 1, [0.6, 0.9) 2, then 0."""
    scores = torch.tensor([0.1, 0.6, 0.3]).log().tolist()
    u = [0.0, 0.59, 0.61, 0.89, 0.91, 1 - 2**-24]
    assert draw([scores] * 6, u) == [1, 1, 2, 2, 0, 0]
    # Half the temperature squares them: 1, 36 and 9 of 46.
    assert draw([[0.0, 0.0]] * 2, [0.5 - 2**-24, 0.5]) == [0, 1]
    assert draw([scores] * 3, [36 / 46 - 0.01, 36 / 46 + 0.01, 0.99], temperature=0.5) == [1, 2, 0]


@pytest.mark.parametrize(("top_p", "drawn"), [(0.5, {1}), (0.6 + 1e-6, {1, 2}), (0.95, {0, 1, 2})])
def test_the_nucleus_is_the_fewest_tokens_that_reach_top_p(top_p, drawn):
    scores = torch.tensor([0.1, 0.6, 0.3]).log().tolist()
    u = torch.linspace(0, 1 - 2**-24, 50).tolist()
    assert set(draw([scores] * 50, u, top_p=top_p)) == drawn


def test_each_step_has_a_number_of_its_own(folder):
    """By hand, a token at a time, from the model's logits."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    writer = model(folder, temperature=0.7, top_p=0.9, most_tokens=6)
    net = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("a dog", return_tensors="pt")["input_ids"]
    u = uniforms(3407, Stream.WRITE, torch.tensor([7]), 6)[0].tolist()
    length = ids.shape[1]
    for step in range(6):
        probabilities = (net(ids).logits[0, -1] / 0.7).softmax(-1)
        likely, order = probabilities.sort(descending=True)
        count = int((likely.cumsum(0) < 0.9).sum()) + 1
        at = u[step] * likely[:count].sum().item()
        token = order[int((likely[:count].cumsum(0) <= at).sum())]
        ids = torch.cat([ids, token.view(1, 1)], 1)
        if token == tokenizer.eos_token_id:
            break
    (written,) = writer(["a dog"], [7])
    assert written.text == tokenizer.decode(ids[0, length:], skip_special_tokens=True)


def test_an_answer_that_ends_is_not_cut_off(folder, tmp_path):
    """A model that ends at once, and one that never does."""
    ends = write_model(tmp_path / "ends", always="</s>")
    (written,) = model(ends)(["a dog"], [1])
    assert (written.text, written.cut_off) == ("", False)
    goes_on = write_model(tmp_path / "goes_on", always="a")
    (written,) = model(goes_on, most_tokens=3)(["a dog"], [1])
    assert (written.text, written.cut_off) == ("aaa", True)
    # New lines alone are no sentences, so it writes on.
    (written,) = model(write_model(tmp_path / "lines", always="Ċ"), most_tokens=9)(["a"], [1])
    assert (written.text.strip(), written.cut_off) == ("", True)


def _by_its_first_letter(text: str) -> bool:
    return len(text) > 3 + ord(text[:1] or "a") % 7


def test_writing_stops_after_the_sentences_of_a_caption(folder, monkeypatch):
    """Row by row: each of a batch as if it were alone, and none of them as if it had ended."""
    whole = model(folder, most_tokens=200)(PROMPTS, KEYS)
    monkeypatch.setattr("flap_fast.tools.enrich.rewrite.is_complete", _by_its_first_letter)
    stopped = model(folder, most_tokens=200)(PROMPTS, KEYS)
    for short, long in zip(stopped, whole, strict=True):
        assert long.text.startswith(short.text)
        assert _by_its_first_letter(short.text)
        assert not _by_its_first_letter(short.text[:-2])
        assert short.cut_off
    assert len({len(short.text) for short in stopped}) > 1


def test_the_tokenizers_own_layout_serves_where_there_is_one(folder, tmp_path, monkeypatch):
    rule = "--chat must be one of vicuna, .* for a tokenizer without a chat template, got 'own'"
    with pytest.raises(ConfigError, match=rule):
        LanguageModel(str(folder))
    own = write_model(
        tmp_path, chat="<s>{{ messages[0]['content'] }}!{% if add_generation_prompt %}?{% endif %}"
    )
    assert LanguageModel(str(own)).format_prompt("a dog") == "<s>a dog!?"
    assert LanguageModel(str(own), chat="plain").format_prompt("a dog") == "a dog"
    # Begun once: by the layout's own mark, or by the tokenizer's.
    for chat, text in (("own", "<s>a dog!?"), ("plain", "a dog")):
        writer, seen = LanguageModel(str(own), chat=chat, most_tokens=1), []
        generate = writer._model.generate
        monkeypatch.setattr(
            writer._model,
            "generate",
            lambda **k: seen.append(k["input_ids"]) or generate(**k),  # noqa: B023
        )
        writer(["a dog"], [1])
        begin = writer._tokenizer.bos_token_id
        assert (seen[0][0] == begin).sum() == 1, (chat, text)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"chat": "vicunna"}, "--chat must be one of own, vicuna, .*, got 'vicunna'"),
        ({"temperature": -1}, "--temperature must be at least 0, got -1"),
        ({"top_p": 0}, "--top-p must be in"),
        ({"most_tokens": 0}, "--most-tokens must be at least 1"),
    ],
)
def test_a_wrong_setting_is_refused_before_the_model_is_read(settings, message):
    with pytest.raises(ConfigError, match=message):
        LanguageModel("nowhere", **settings)


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(
        ConfigError, match=r"^--model must be an existing folder, got 'x'; .*vicuna"
    ):
        LanguageModel("x")
    with pytest.raises(
        ConfigError, match=r"^--model must hold a transformers model .* 0 .gguf files"
    ):
        LanguageModel(str(tmp_path))
    for name in "ab":
        (tmp_path / f"{name}.gguf").touch()
    with pytest.raises(ConfigError, match=r"with 2 .gguf files"):
        LanguageModel(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "roberta"}))
    with pytest.raises(ConfigError, match=r"^--model must hold a language model, got"):
        LanguageModel(str(tmp_path))
