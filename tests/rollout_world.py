"""What tests of engines and weight sync share: a recipe for a tiny model, a batch of prompts, a Hugging Face actor."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from rlxf.config.schema import RunConfig
from rlxf.core.types import PromptBatch, Sequences, Tokens
from rlxf.sync.plan import Bucket, TensorSpec, plan_buckets
from tests.tiny_models import VOCAB


def run_config(folder: Path, **rollout: Any) -> RunConfig:
    """A recipe around the model in ``folder``, as the schema takes it."""
    model = {
        "num_layers": 2,
        "hidden_size": 128,
        "ffn_hidden_size": 192,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "vocab_size": VOCAB,
        "max_position_embeddings": 512,
    }
    role = {"model": "tiny", "load": str(folder)}
    return RunConfig.model_validate(
        {
            "training": {"stage": "ray_online_dpo", "device": "cpu"},
            "model": {"tiny": model},
            "actor_rollout": {**role, "seq_length": 64, "max_prompt_length": 40},
            "ref": role,
            "reward": role,
            "rollout": {"max_num_seqs": 64, **rollout},
        }
    )


def prompt_batch(rows: Sequence[Sequence[int]], first_id: int = 0) -> PromptBatch:
    return PromptBatch(
        prompts=Tokens.from_rows(rows),
        row_ids=torch.arange(first_id, first_id + len(rows)),
        positions=torch.arange(first_id, first_id + len(rows)),
        texts=("",) * len(rows),
        columns={},
    )


def random_prompts(lengths: Sequence[int], seed: int = 0) -> list[list[int]]:
    draw = random.Random(seed)
    return [draw.choices(range(3, VOCAB), k=length) for length in lengths]


def load_model(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def greedy(model: Any, prompt: Sequence[int], num_tokens: int, stop: Sequence[int] = ()) -> list[int]:
    """Greedy continuation by whole forward passes: no cache, no padding, no batch."""
    tokens = list(prompt)
    for _ in range(num_tokens):
        tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
        if tokens[-1] in stop:
            break
    return tokens[len(prompt) :]


class HfActor:
    """A weight source around a Hugging Face model: what weight sync asks of the actor, and what tests ask of both."""

    def __init__(self, model: Any, bucket_bytes: int = 200_000) -> None:
        self.model = model
        specs = [
            TensorSpec(name, tuple(parameter.shape), str(parameter.dtype).removeprefix("torch."))
            for name, parameter in model.named_parameters()  # a tied head is not in it
        ]
        self._plan = plan_buckets(specs, bucket_bytes)
        self._payload = torch.empty(max(bucket.num_bytes for bucket in self._plan), dtype=torch.uint8)

    def sync_plan(self) -> tuple[Bucket, ...]:
        return self._plan

    def bucket_tensors(self, index: int, *, everywhere: bool = False) -> Iterator[tuple[str, Tensor]]:
        parameters = dict(self.model.named_parameters())
        for spec in self._plan[index].tensors:
            yield spec.name, parameters[spec.name].detach()

    def packed_bucket(self, index: int) -> Tensor:
        """The same memory for every bucket, so an engine that kept a view of an earlier payload would be found out."""
        bucket = self._plan[index]
        payload = self._payload[: bucket.num_bytes]
        bucket.fill(payload, self.bucket_tensors(index))
        return payload

    @torch.no_grad()
    def token_logps(self, sequences: Sequences) -> Tensor:
        rows = []
        for row, start in zip(sequences.rows(), sequences.prompt_lengths.tolist(), strict=True):
            logps = self.model(torch.tensor([row])).logits[0].float().log_softmax(dim=-1)
            rows.append(logps[start - 1 : -1].gather(1, torch.tensor(row[start:])[:, None])[:, 0])
        return torch.cat(rows)
