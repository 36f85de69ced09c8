"""Recorded completions in place of an engine: training on fixed responses, and repeating a run bit for bit."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rlxf.core.errors import ConfigError, SyncError
from rlxf.core.types import PromptBatch, Rollouts, Sequences, Tokens
from rlxf.observe.record import RecordedRollouts
from rlxf.rollout.engine import ProbeResult, Sampling
from rlxf.rollout.session import WholeSession
from rlxf.sync.checksums import Checksums
from rlxf.sync.plan import Bucket
from rlxf.sync.transports.transport import Address, Message, Transport

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplaySettings:
    """What a recording must hold."""

    path: Path
    batch_size: int  # prompts per step
    num_steps: int  # of the run
    seq_length: int  # longest row, tokens
    vocab_size: int | None = None  # the model's; None: not known


class ReplayEngine:
    """Prompts and completions of a `rollouts.jsonl`, in file order. A source of prompts and a rollout engine in one.

    A step is ``global_batch_size`` rows, a prompt's id is its row number. Nothing is sampled: `Sampling` is ignored, a
    row has as many completions as were recorded, and the policy version is the recorded one. There are no weights: an
    update is accepted and changes nothing, and a probe is refused.
    """

    def __init__(self, settings: ReplaySettings, tokenizer: PreTrainedTokenizerBase) -> None:
        path, steps = settings.path, settings.num_steps
        self._rows = RecordedRollouts(path, vocab_size=settings.vocab_size, seq_length=settings.seq_length)
        self._tokenizer = tokenizer
        self._batch_size = settings.batch_size
        possible = len(self._rows) // self._batch_size
        if possible < steps:
            raise ConfigError(
                f"rollout.replay_path={path}: holds {len(self._rows)} prompts, enough for {possible} steps of "
                f"training.global_batch_size={self._batch_size}, but training.train_iters={steps}; "
                f"set training.train_iters={possible} or record more"
            )

    def __len__(self) -> int:
        """Prompts in the file."""
        return len(self._rows)

    def row_ids(self, step: int) -> list[int]:
        """The rows of the file that a step is made of."""
        return list(range(step * self._batch_size, (step + 1) * self._batch_size))

    def epoch(self, step: int) -> float:
        """Passes over the file at the end of a step."""
        return (step + 1) * self._batch_size / len(self._rows)

    @property
    def num_dropped(self) -> int:
        """No row of a recording is left out."""
        return 0

    def next_batch(self, step: int) -> PromptBatch:
        """The prompts of a step. A recording holds no texts: they are the decoded tokens, and there are no columns."""
        numbers = self.row_ids(step)
        if numbers[-1] >= len(self._rows):
            raise ConfigError(f"step {step} needs prompts up to {numbers[-1] + 1}, but only {len(self)} are recorded")
        prompts = [self._rows[number].prompt for number in numbers]
        return PromptBatch(
            prompts=Tokens.from_rows(prompts),
            row_ids=torch.tensor(numbers, dtype=torch.int64),
            positions=torch.tensor(numbers, dtype=torch.int64),
            texts=tuple(self._tokenizer.decode(prompt, skip_special_tokens=True) for prompt in prompts),
            columns={},
        )

    def generate(self, prompts: PromptBatch, sampling: Sampling) -> Rollouts:
        """The recorded completions of prompts that `next_batch` gave, row after row; their engine log-probs are NaN."""
        rows, completions, prompt_index, sample_index, versions = [], list[list[int]](), [], [], []
        for index, (number, prompt) in enumerate(zip(prompts.row_ids.tolist(), prompts.prompts.rows(), strict=True)):
            recorded = self._rows[number] if 0 <= number < len(self._rows) else None
            if recorded is None or recorded.prompt != prompt:
                raise ConfigError(
                    f"rollout.engine=replay has no completions for prompt {number}: it is not the recorded one; replay "
                    "cannot sample other prompts, so training.eval_interval must be 0"
                )
            completions += recorded.completions
            for sample in range(len(recorded.completions)):
                rows.append(prompt)
                prompt_index.append(index)
                sample_index.append(sample)
                versions.append(recorded.policy_version)
        sequences = Sequences.from_rows(rows, completions)
        return Rollouts(
            prompts=prompts,
            sequences=sequences,
            prompt_index=torch.tensor(prompt_index, dtype=torch.int64),
            sample_index=torch.tensor(sample_index, dtype=torch.int64),
            engine_logps=torch.full((int(sequences.completion_lengths.sum()),), torch.nan),
            policy_version=torch.tensor(versions, dtype=torch.int64),
        )

    def session(self, sampling: Sampling) -> WholeSession:
        """Recorded completions, as `generate` gives them."""
        return WholeSession(self.generate, sampling)

    def begin_update(self) -> None:
        """Accepted; there are no weights to change."""

    def open_receivers(self, transport: Transport, address: Address, first: int, host: str) -> None:
        """It takes no weights."""

    def receive(self, bucket: Bucket, message: Message, *, check: bool = False) -> list[Checksums]:
        return []

    def load_bucket(self, bucket: Bucket, payload: Tensor) -> None:
        """Accepted; there are no weights to change."""

    def end_update(self, version: int) -> None:
        """Accepted; the recorded policy versions stay what they are."""

    def sleep(self) -> None:
        """Accepted; a recording is not on the device."""

    def wake_weights(self) -> None:
        """Accepted; there are no weights."""

    def wake_cache(self) -> None:
        """Accepted; there is no cache."""

    def probe(self, prompt: Tokens, num_tokens: int) -> ProbeResult:
        raise SyncError("rollout.engine=replay has no weights to probe; set sync.verify_first=0")
