"""Reward models of several kinds of text, and the parts that read a score: for tests that hold them to one position."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from rlxf.core.types import Messages, Rollouts, Text
from tests.data_world import make_rollouts, prompt_batch
from tests.tiny_models import save_causal_lm

# As the tokenizers of the instruct models have it: a line break follows every turn, the last one included.
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "<s>{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
# Ends a turn, and the whole conversation once more.
TWO_ENDS = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}</s>{% endif %}"
)


@dataclass(frozen=True)
class Kind:
    """A kind of text that a reward model is trained on."""

    template: str | None  # None: plain text
    specials: tuple[str, ...]  # besides <pad>, <s> and </s>
    end: str  # what an answer ends with
    eos: str = "</s>"  # the tokenizer's
    tail: str = ""  # what the template writes behind the end of the last turn

    @property
    def declares_end(self) -> bool:
        """Whether the end is the tokenizer's EOS; else ``generation_config.json`` names it."""
        return self.end == self.eos


KINDS = {
    "chatml": Kind(CHATML, ("<|im_start|>", "<|im_end|>"), "<|im_end|>", eos="<|im_end|>", tail="\n"),
    "llama3": Kind(LLAMA3, ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), "<|eot_id|>"),
    "two ends": Kind(TWO_ENDS, ("<|user|>", "<|assistant|>", "<|end|>"), "<|end|>", tail="\n</s>"),
    "text": Kind(None, (), "</s>"),
}
QUESTION, GOOD, BAD = "is it good ?", "yes , it is", "no"


def tokenizer_of(kind: Kind, *, reverse: bool = False) -> PreTrainedTokenizerFast:
    """A byte tokenizer with the kind's special tokens and template; ``reverse``: other ids for the same tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet(), reverse=reverse)
    specials = ["<pad>", "<s>", "</s>", *(reversed(kind.specials) if reverse else kind.specials)]
    made = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate([*specials, *alphabet])}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(specials)
    fast = PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token=kind.eos)
    fast.chat_template = kind.template
    return fast


def save_policy(folder: Path, kind: Kind, *, reverse: bool = False, **changes: Any) -> Path:
    """A random language model of that kind; its EOS ids are those that the instruct models declare."""
    tokenizer = tokenizer_of(kind, reverse=reverse)
    save_causal_lm(folder, vocab_size=len(tokenizer), **changes)
    tokenizer.save_pretrained(folder)
    ends = sorted({tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(kind.end)})
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    return folder


def texts_of(kind: Kind) -> tuple[Text, Text, Text]:
    """A prompt and two answers, as a data file has them."""
    if kind.template is None:
        return QUESTION, f" {GOOD}", f" {BAD}"
    question: Messages = [{"role": "user", "content": QUESTION}]
    good, bad = ([{"role": "assistant", "content": text}] for text in (GOOD, BAD))
    return question, good, bad


def sampled(kind: Kind, tokenizer: PreTrainedTokenizerFast, *, ended: bool = True) -> Rollouts:
    """Both answers as a policy with that tokenizer samples them; not ``ended``: cut at the length limit."""
    prompt, *_ = texts_of(kind)
    text = prompt if isinstance(prompt, str) else tokenizer.apply_chat_template(
        prompt, tokenize=False, add_generation_prompt=True
    )  # fmt: skip
    space, end = (" " if kind.template is None else ""), (kind.end if ended else "")
    encode = lambda part: tokenizer(part, add_special_tokens=False)["input_ids"]  # noqa: E731
    answers = [encode(f"{space}{answer}{end}") for answer in (GOOD, BAD)]
    return make_rollouts(prompt_batch([encode(text)], texts=[prompt]), [answers])


@torch.no_grad()
def hf_scores(folder: Path, rows: list[list[int]]) -> Tensor:
    """[rows] scores of Hugging Face's own model, which reads them at a row's last token."""
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    return torch.cat([model(torch.tensor([row])).logits[:, 0] for row in rows])
