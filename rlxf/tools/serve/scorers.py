"""What a reward service scores with: a reward model, or a reward function."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rlxf.config.kinds import ReadAt
from rlxf.config.problems import lines
from rlxf.config.roles import RewardConfig
from rlxf.config.rules import rule_problems
from rlxf.core.errors import ConfigError
from rlxf.core.read_position import READ_AT, stored_position
from rlxf.core.stop import Stop
from rlxf.models.backend import LoadSettings, load_model
from rlxf.models.batching import MicroBatchLimits
from rlxf.models.tokenizer import load_tokenizer
from rlxf.platform import Process, get_platform
from rlxf.score.functions import FunctionSource
from rlxf.score.processes import ProcessSource
from rlxf.score.reward_model import RewardModelScorer
from rlxf.score.rules import rule_source
from rlxf.score.scorer import SampledBy
from rlxf.tools.model_shape import model_shape
from rlxf.tools.serve.forms import Scores, Wanted

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSettings:
    """A reward model, and how it computes."""

    load: Path  # Hugging Face folder
    read_at: ReadAt = "auto"
    batch_size: int = 64  # texts of one forward pass
    seq_length: int | None = None  # tokens of prompt and completion; None: as many as the model has positions
    device: str = "auto"
    bf16: bool = False
    trust_remote_code: bool = False


class ModelScores:
    """Scores of a reward model, as a run with ``reward.load`` gives them to texts of another tokenizer.

    Raises:
        ModelError: the folder holds no reward model.
    """

    def __init__(self, settings: ModelSettings) -> None:
        folder = settings.load.absolute()
        shape = model_shape(folder, trust_remote_code=settings.trust_remote_code)
        if settings.read_at == "auto" and stored_position(folder) is None:
            log.warning(
                "%s: its config.json has no %s, so the score is read at the last token of the text; --read-at says so "
                "without this warning, or names another place", folder, READ_AT,
            )  # fmt: skip
        config = RewardConfig(
            model="reward",
            load=str(folder),
            read_at=settings.read_at,
            seq_length=settings.seq_length or shape.max_position_embeddings,
            micro_batch_size=max(1, settings.batch_size // 2),  # of pairs
            bf16=settings.bf16,
        )
        loading = LoadSettings(
            role="reward",
            shape=shape,
            seed=1,
            timeout_s=600,
            trust_remote_code=settings.trust_remote_code,
            reward=True,
        )
        model = load_model(config, loading, get_platform(settings.device), Process())
        tokenizer = load_tokenizer(folder, trust_remote_code=settings.trust_remote_code)
        limits = MicroBatchLimits.of(config)
        self._scorer = RewardModelScorer(model, config, limits, tokenizer, SampledBy(tokenizer, set()))

    def __call__(self, requests: Sequence[Wanted]) -> Scores:
        """The scores of all completions, None for a text that is too long."""
        prompts = [prompt for request in requests for prompt in request.asked.prompts]
        completions = [completion for request in requests for completion in request.asked.completions]
        answers = [text if isinstance(text, str) else text[0]["content"] for text in completions]
        ended = [end for request in requests for end in request.ended]
        scores = self._scorer.score_texts(prompts, answers, ended).tolist()
        return [None if math.isnan(score) else score for score in scores]


class FunctionScores:
    """Scores of a reward function or a rule, called once for each request: two runs may have other columns.

    It runs in a process of its own, which is ended when a request takes too long.

    Raises:
        ConfigError: the function or the rule is wrong.
    """

    def __init__(self, make: Callable[[], FunctionSource], name: str, *, timeout_s: float) -> None:
        self._source = ProcessSource(make, name, workers=1, timeout_s=timeout_s, stop=Stop(), limit="--timeout-s")

    @staticmethod
    def from_file(path: Path, *, timeout_s: float) -> FunctionScores:
        """``reward`` of a Python file."""
        make = partial(FunctionSource.from_file, path, "--function")
        return FunctionScores(make, f"--function={path}", timeout_s=timeout_s)

    @staticmethod
    def from_rule(rule: str, options: dict[str, Any] | None, *, timeout_s: float) -> FunctionScores:
        """A rule that comes with the program."""
        if problems := list(rule_problems("--options", rule, options)):
            raise ConfigError(*lines(problems))
        name = f"--rule={rule}"
        return FunctionScores(partial(rule_source, rule, options, name), name, timeout_s=timeout_s)

    def close(self) -> None:
        """End the process."""
        self._source.close()

    def __call__(self, requests: Sequence[Wanted]) -> Scores:
        """The scores of the requests' completions."""
        return [score for request in requests for score in self._source.ask(request.asked).scores]
