"""Random models of two sizes and prompts for them, for benchmarks of speed, in which nothing has to be learned."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PAD, EOS = 0, 1
PROMPT_LENGTHS = (16, 64)  # tokens, smallest and largest


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """A Llama with tied embeddings."""

    hidden: int
    layers: int
    ffn: int
    heads: int
    kv_heads: int
    vocab: int
    positions: int = 1024

    @property
    def body(self) -> int:
        """Parameters of all matrices but the embedding: one multiplication each per token."""
        head_size = self.hidden // self.heads
        attention = 2 * self.hidden * self.hidden + 2 * self.hidden * self.kv_heads * head_size
        return self.layers * (attention + 3 * self.hidden * self.ffn)

    @property
    def head(self) -> int:
        return self.vocab * self.hidden

    def section(self) -> dict[str, Any]:
        """The recipe's ``model`` section."""
        return {
            "num_layers": self.layers,
            "hidden_size": self.hidden,
            "ffn_hidden_size": self.ffn,
            "num_attention_heads": self.heads,
            "num_query_groups": self.kv_heads,
            "vocab_size": self.vocab,
            "max_position_embeddings": self.positions,
        }


SIZES = {
    "2.5M": Shape(hidden=256, layers=4, ffn=512, heads=8, kv_heads=4, vocab=512),
    "26M": Shape(hidden=512, layers=7, ffn=1536, heads=8, kv_heads=4, vocab=8192),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class World:
    """Folders that both a recipe and ``transformers`` load."""

    shape: Shape
    policy: Path
    reward: Path
    prompts: Path  # jsonl

    def texts(self) -> list[str]:
        return [json.loads(line)["prompt"] for line in self.prompts.read_text().splitlines()]


def build(
    folder: Path, size: str | Shape, *, num_prompts: int = 512, seed: int = 0, dtype: Any = None, device: Any = "cpu"
) -> World:
    """A random policy, a random reward model of its shape with the same tokenizer, and prompts of 16 to 64 tokens."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

    shape = SIZES[size] if isinstance(size, str) else size
    config = LlamaConfig(
        vocab_size=shape.vocab, hidden_size=shape.hidden, intermediate_size=shape.ffn, num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads, max_position_embeddings=shape.positions,
        tie_word_embeddings=True, pad_token_id=PAD, bos_token_id=None, eos_token_id=EOS, num_labels=1,
    )  # fmt: skip
    world = World(shape=shape, policy=folder / "policy", reward=folder / "reward", prompts=folder / "prompts.jsonl")
    torch.manual_seed(seed)
    for path, kind in ((world.policy, LlamaForCausalLM), (world.reward, LlamaForSequenceClassification)):
        with torch.device(device):  # where they are drawn
            kind(config).to(dtype or torch.float32).save_pretrained(path)
        word_tokenizer(shape.vocab).save_pretrained(path)
    draw = random.Random(seed)
    with world.prompts.open("w") as file:
        for _ in range(num_prompts):
            words = (f"w{draw.randrange(2, shape.vocab)}" for _ in range(draw.randint(*PROMPT_LENGTHS)))
            # The space at the end keeps prompt and completion apart when a trainer joins their texts.
            file.write(json.dumps({"prompt": " ".join(words) + " "}) + "\n")
    return world


def word_tokenizer(size: int) -> Any:
    """A token per word ``w<id>``, so that decoding and encoding again gives the same tokens; 0 pads, 1 ends."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {"<pad>": PAD, "</s>": EOS} | {f"w{token}": token for token in range(2, size)}
    tokenizer = Tokenizer(models.WordLevel(vocab=vocab, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>")
