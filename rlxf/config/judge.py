"""The keys of the judge, which compares two answers to a prompt."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from rlxf.config.fields import LocalPath, as_options
from rlxf.config.kinds import (
    File,
    Finite,
    Folder,
    JudgeAnswer,
    JudgeLoadAs,
    JudgeName,
    Positive,
    PythonFile,
    Rate,
    Strict,
    TournamentName,
)

PAIR_RM = "<|source|>{prompt}<|candidate1|>{first}<|candidate2|>{second}"

JUDGE_MODEL = "judge model"  # no source of rewards can have this name

# The keys that only one kind of judge reads, by the key that names the judge.
OWN_KEYS: dict[str, tuple[str, ...]] = {
    "load": ("load_as", "pair_template", "first_label", "batch_size"),
    "function": (),
    "base_url": (
        *("model", "token_env", "template", "answer", "temperature", "max_tokens", "options", "concurrency", "tries"),
        *("allow_link_local", "max_calls", "max_cost", "prompt_price", "completion_price"),
    ),
}


class JudgeConfig(Strict):
    """What compares two answers: a model (``load``), a Python function, or a language model at a ``base_url``."""

    load: Folder | None = None
    """Folder of a model that judges. `load_as` says what it is."""
    load_as: JudgeLoadAs = "reward_model"
    """`reward_model`: scores each answer by itself; the probability is the sigmoid of the scores' difference.
    `pair_classifier`: a Hugging Face classifier that reads both answers as one text, such as PairRM."""
    pair_template: str = Field(PAIR_RM, min_length=1)
    """Text that a pair classifier reads, with {prompt}, {first} and {second}."""
    first_label: int = Field(0, ge=0, le=1)
    """Label of a pair classifier with two labels that says that the first answer is better."""
    batch_size: Positive = 16
    """Questions in one forward pass of a pair classifier."""
    function: PythonFile | None = None
    """Path or module of a Python file that defines `judge(prompts, first, second, **columns)`."""
    base_url: str | None = None
    """Address of an OpenAI-compatible server, such as `http://host:8000/v1`."""
    model: str | None = None
    """Name of the model that the server is asked for."""
    token_env: str | None = None
    """Name of the environment variable that holds the server's token. The token itself is never written anywhere."""
    template: File | None = None
    """Text file with what the server is asked, with {prompt}, {first} and {second}. Unset: the one that comes with
    rlxf for `answer`."""
    answer: JudgeAnswer = "json"
    """Form of the verdict in a reply. `json`: `{"first": p}` or `{"winner": "first"}`. `arena`: `[[A>>B]]`, `[[A>B]]`,
    `[[A=B]]`, `[[B>A]]` or `[[B>>A]]`, which count 1, 0.75, 0.5, 0.25 and 0."""
    temperature: Rate = 0.0
    """Sampling temperature of the server."""
    max_tokens: Positive = 1024
    """Longest reply, in tokens."""
    options: Annotated[dict[str, Any], BeforeValidator(as_options)] = Field(default_factory=dict)
    """Further keys of a request, such as `{"top_p": 0.9}`. null leaves a key out that is there otherwise."""
    concurrency: Positive = 8
    """Requests that are under way at the same time."""
    tries: Positive = 3
    """Tries of a request that times out or gets a 5xx or 429 response."""
    timeout_s: Finite = Field(60.0, gt=0)
    """Longest time of one try, in seconds."""
    allow_link_local: bool = False
    """Let the server have a link-local address (169.254.0.0/16, fe80::/10), where clouds serve their metadata."""
    max_calls: Positive | None = None
    """Largest number of answered requests of the run, earlier ones in its file of verdicts included. Later questions
    have no verdict."""
    max_cost: Annotated[Finite, Field(gt=0)] | None = None
    """Largest cost of the run, in the unit of the prices. Later questions have no verdict."""
    prompt_price: Rate = 0.0
    """Price of a million prompt tokens, in any currency."""
    completion_price: Rate = 0.0
    """Price of a million completion tokens."""
    tournament: TournamentName = "knockout"
    """Which of n completions are compared. `knockout`: n - 1 pairs, winners meet winners. `all`: each with each other,
    n (n - 1) / 2 pairs."""
    both_orders: bool = True
    """Ask with each answer first once, and average. false asks once, and a judge that prefers the first answer is not
    noticed."""
    verdicts: Annotated[str, LocalPath("output")] | None = None
    """Folder of `verdicts.jsonl`, which several runs may share. Unset: `actor_rollout.save`, else the run's folder."""

    @property
    def kind(self) -> JudgeName | None:
        """What judges; None: nothing."""
        if self.function is not None:
            return "function"
        return "model" if self.load is not None else "llm" if self.base_url is not None else None
