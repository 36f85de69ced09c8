"""The sources of rewards: what each is, and how its scores enter the sum."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from rlxf.config.kinds import Finite, Folder, Positive, PythonFile, ReadAt, SourceKind, Strict

Scale = Literal["none", "batch", "rank", "running"]
HttpForm = Literal["rlxf", "openrlhf", "slime"]
# Names under ``rewards/`` that the implicit rewards of DPO have already.
TAKEN_NAMES = frozenset({"chosen", "rejected", "margins", "accuracies"})


class RewardSource(Strict):
    """One entry of `reward.sources`: exactly one of `load`, `function`, `url` and `rule`, and how it enters the sum."""

    name: Annotated[str, Field(min_length=1)] | None = None
    """Name in metrics (`rewards/<name>/mean`) and records. Unset: that of the folder, file, host or rule."""
    load: Folder | None = None
    """Folder of a reward model. It uses the devices and the layout of the `reward` section."""
    function: PythonFile | None = None
    """Path or module of a Python file that defines `reward(prompts, completions, completion_ids, **columns)`."""
    url: str | None = None
    """Address of a reward service, such as `http://host:8000/score`. See docs/rewards.md."""
    rule: str | None = None
    """Name of a rule that comes with rlxf, such as `math` or `regex`. See docs/rewards.md."""
    options: dict[str, Any] | None = None
    """Options of the rule."""
    weight: Finite = 1.0
    """Factor of this source's score in the sum."""
    scale: Scale = "none"
    """What happens to a score before it is weighted. `batch`: minus the mean of the step's scores, over their standard
    deviation. `rank`: its rank among them, from 0 to 1. `running`: minus the mean of all steps before, over their
    standard deviation."""
    missing: Literal["drop", "leave_out"] = "drop"
    """What a missing score means. `drop`: the completion has no score. `leave_out`: the sum is made of the others."""
    whole_step: bool = False
    """Ask for all completions of a step at once, also with `rollout.stream_prompts`: for a function whose scores depend
    on the other completions of the call."""
    tokenizer_name_or_path: Folder | None = None
    """Reward model: folder with its tokenizer. Unset: the folder in `load`."""
    read_at: ReadAt = "auto"
    """Reward model: token at which the score is read, as `reward.read_at`."""
    form: HttpForm = "rlxf"
    """Service: the JSON that it speaks."""
    label_column: str | None = None
    """Service: column of the data that the forms `openrlhf` and `slime` send as label."""
    batch_size: Positive = 64
    """Service: completions of one request."""
    concurrency: Positive = 4
    """Service: requests at the same time."""
    timeout_s: Annotated[Finite, Field(gt=0)] = 60.0
    """Service: longest time of one try, in seconds."""
    tries: Positive = 3
    """Service: how often a request is sent in all if the service is busy, fails or does not answer."""
    token_env: str | None = None
    """Service: name of the environment variable that holds a bearer token."""
    allow_link_local: bool = False
    """Service: allow link-local addresses (169.254.0.0/16), where clouds keep the credentials of a machine."""

    @property
    def given(self) -> list[str]:
        """Which of the keys that say what the source is are set."""
        return [key for key in ("load", "function", "url", "rule") if getattr(self, key) is not None]

    @property
    def kind(self) -> SourceKind:
        """What the source is, once the recipe is checked."""
        kinds: dict[str, SourceKind] = {"load": "model", "function": "function", "url": "http", "rule": "rule"}
        return kinds[self.given[0]]


def with_first_model(values: dict[str, Any]) -> dict[str, Any]:
    """The `reward` section as it is written, and the first model of its sources as `load`, too.

    Devices, layout and shape of the role are made for that one.
    """
    sources = values.get("sources")
    if values.get("load") is not None or not isinstance(sources, list | tuple):
        return values
    first = next((source for source in sources if isinstance(source, dict) and source.get("load") is not None), None)
    if first is None:
        return values
    own = {key: first[key] for key in ("load", "tokenizer_name_or_path", "read_at") if first.get(key)}
    return {**values, **own}
