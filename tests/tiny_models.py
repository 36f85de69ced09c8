"""Small real Hugging Face models and a byte tokenizer, made in a folder on request."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

VOCAB = 259  # 3 specials + 256 bytes
PAD, BOS, EOS = 0, 1, 2

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte; <pad>=0, <s>=1, </s>=2."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<pad>", "<s>", "</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def config(kind: str = "llama", *, tied: bool = False, **changes: Any) -> Any:
    """A 2-layer config of family ``kind`` (llama, qwen2, qwen3) with head size 32, 4 heads, 2 key/value heads."""
    values: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 128,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": tied,
        "rms_norm_eps": 1e-5,
        "pad_token_id": PAD,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
    }
    if kind == "llama":
        values["rope_parameters"] = dict(LLAMA3_ROPE)
    if kind == "qwen3":
        values["head_dim"] = 32
    values |= changes
    classes = {
        "llama": transformers.LlamaConfig,
        "qwen2": transformers.Qwen2Config,
        "qwen3": transformers.Qwen3Config,
    }
    return classes[kind](**values)


def randomize(model: torch.nn.Module, seed: int) -> None:
    """Weights far enough from their start that no norm is 1, no bias 0 and no two logits are close."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.copy_(1 + 0.1 * torch.randn_like(parameter))
            else:
                parameter.normal_(0, 0.1 if "bias" in name else 0.06)


def save_causal_lm(folder: Path, kind: str = "llama", *, tied: bool = False, seed: int = 0, **changes: Any) -> Path:
    """A random causal LM with its tokenizer in ``folder``, fp32."""
    model = transformers.AutoModelForCausalLM.from_config(config(kind, tied=tied, **changes)).float().eval()
    randomize(model, seed)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def save_reward_model(folder: Path, kind: str = "llama", *, seed: int = 1, labels: int = 1, **changes: Any) -> Path:
    """A random ``*ForSequenceClassification`` with ``labels`` labels and its tokenizer in ``folder``, fp32."""
    settings = config(kind, num_labels=labels, **changes)
    model = transformers.AutoModelForSequenceClassification.from_config(settings).float().eval()
    randomize(model, seed)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder
