"""What rules must know of a recipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

ROLES = ("train", "infer", "ref", "reward")


@dataclass(frozen=True, kw_only=True, slots=True)
class RunFacts:
    """The part of a recipe that rules read. The defaults are those of a run whose recipe is not known."""

    stage: str = "ray_online_dpo"
    num_steps: int = 0  # 0: not known
    lookahead: int = 0
    num_samples: int = 2  # of each prompt
    max_new_tokens: int = 0  # 0: not known
    num_eval_prompts: int = 0  # 0: not known
    has_judge: bool = False
    has_reward: bool = True
    on_cpu: bool = False  # the roles have no devices of their own
    local: bool = False  # all roles are in one process, which does one thing after the other
    sharing: tuple[str, ...] = ()  # roles that share devices

    @property
    def online(self) -> bool:
        """Whether the policy answers prompts while it trains; else all that is trained on comes from a file."""
        return self.stage == "ray_online_dpo"

    @property
    def pools(self) -> list[tuple[str, ...]]:
        """The roles that share devices, and each other role by itself."""
        alone: list[tuple[str, ...]] = [(role,) for role in ROLES if role not in self.sharing]
        return [self.sharing, *alone] if self.sharing else alone


def facts_of(config: Mapping[str, object]) -> RunFacts:
    """The facts of a recipe as plain data, such as ``config.yaml`` of a run folder holds it.

    A section or key that is not there, as in runs of earlier versions, counts as the default.
    """
    training, actor = _section(config, "training"), _section(config, "actor_rollout")
    reward, judge = _section(config, "reward"), _section(config, "judge")
    stage = training.get("stage")
    room = _number(actor, "seq_length") - _number(actor, "max_prompt_length")
    shared = _section(config, "resource_pool").get("colocate")
    roles = tuple(str(role) for role in shared) if isinstance(shared, Sequence) and not isinstance(shared, str) else ()
    return RunFacts(
        stage=stage if isinstance(stage, str) else "ray_online_dpo",
        num_steps=_number(training, "train_iters"),  # with `epochs`, a run writes down the steps that they make
        lookahead=_number(_section(config, "rollout"), "lookahead"),
        num_samples=_number(actor, "n_samples_per_prompt", 2),
        max_new_tokens=_number(actor, "max_new_tokens") or max(room, 0),
        num_eval_prompts=_number(_section(config, "eval"), "num_prompts"),
        has_judge=any(judge.get(key) for key in ("load", "function", "base_url")),
        has_reward=any(reward.get(key) for key in ("load", "function", "sources")),
        on_cpu=training.get("device") == "cpu",
        local=config.get("runtime") == "local",
        sharing=tuple(role for role in ROLES if role in roles) if len(roles) > 1 else (),
    )


def _section(config: Mapping[str, object], name: str) -> Mapping[str, object]:
    section = config.get(name)
    return section if isinstance(section, Mapping) else {}


def _number(section: Mapping[str, object], key: str, default: int = 0) -> int:
    value = section.get(key)
    return int(value) if isinstance(value, int | float) else default
