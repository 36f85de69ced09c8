"""What the rows of a run say about speed, and how the plan compares with them. Numbers in, numbers out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median

from rlxf.config.kinds import Role
from rlxf.core.errors import ConfigError
from rlxf.planner.device import Device
from rlxf.planner.jobs import Jobs, Precision, Work
from rlxf.planner.time import Stage, stages_of

Row = Mapping[str, float]  # metrics of a driver step

STAGES = ("gen", "adv", "ref", "update_actor", "sync")
OF_PAIRS = ("ref", "update_actor")  # stages that see only what is trained on


@dataclass(frozen=True, kw_only=True, slots=True)
class StepWork:
    """What one driver step worked on."""

    sampled: Work  # all completions: what sampling and reward models work on
    trained: Work | None  # what reference and update work on; None: the step made no update
    tokens: Mapping[str, float]  # that each stage works on, prompts counted with every completion

    def stages(self, jobs: Jobs, device: Device) -> dict[str, Stage]:
        """The plan of this very step."""
        found = stages_of(jobs, device, self.sampled)
        of_pairs = stages_of(jobs, device, self.trained) if self.trained is not None else {}
        return {
            name: of_pairs[name] if name in OF_PAIRS else stage
            for name, stage in found.items()
            if name not in OF_PAIRS or name in of_pairs
        }


def work_of_row(jobs: Jobs, row: Row, new_tokens: float) -> StepWork | None:
    """The work of a step, from its own row; None: the row is of no step of this process.

    Args:
        jobs: of the recipe.
        row: its metrics.
        new_tokens: by which ``num_tokens`` grew: trained tokens, prompts counted on both sides of a pair, all passes.
    """
    if "timing/update_actor" not in row and "timing/gen" not in row:
        return None
    once = new_tokens / jobs.train.epochs
    if "response_length/mean" not in row:
        trained = _from_file(jobs, once)
        return StepWork(sampled=trained, trained=trained if once else None, tokens=_tokens(jobs, 0.0, 0.0, once))
    prompt, completion = row["prompt_length/mean"], row["response_length/mean"]
    sampled = row.get("rollout/tokens_per_s", 0.0) * row.get("timing/gen", 0.0)
    completions = sampled / completion if completion > 0 else jobs.work.completions
    work = replace(
        jobs.work,
        samples=max(round(completions / jobs.work.prompts), 1),
        prompt_tokens=prompt,
        completion_tokens=completion,
        longest=max(row.get("rollout/longest_over_mean", 1.0), 1.0),
        pairs=row.get("pair/kept", 0.0),
    )
    return StepWork(
        sampled=work,
        trained=_of_pairs(work, once),
        tokens=_tokens(jobs, sampled, sampled + completions * prompt, once),
    )


def _of_pairs(work: Work, tokens: float) -> Work | None:
    """The same prompts with completions as long as those of the pairs: chosen ones may be longer than the others."""
    if not tokens or not work.pairs:
        return None
    side = tokens / (work.pairs * work.sides)
    completion = side - work.prompt_tokens
    return replace(work, completion_tokens=completion if completion > 0 else work.completion_tokens)


def _from_file(jobs: Jobs, tokens: float) -> Work:
    """Rows of a file: a row has no lengths of prompt and completion, so they share its tokens as in the plan."""
    work = jobs.work
    side = tokens / max(work.pairs * work.sides, 1)
    share = work.prompt_tokens / (work.prompt_tokens + work.completion_tokens)
    return replace(work, prompt_tokens=side * share, completion_tokens=side * (1 - share)) if tokens else work


def _tokens(jobs: Jobs, sampled: float, scored: float, trained: float) -> dict[str, float]:
    refers = jobs.reference is not None or jobs.train.refers
    found = {
        "gen": sampled if jobs.engine is not None else 0.0,
        "adv": scored if jobs.rewards else 0.0,
        "ref": trained if refers else 0.0,
        "update_actor": trained * jobs.train.epochs,
    }
    return {name: tokens for name, tokens in found.items() if tokens > 0}


def speeds(
    jobs: Jobs, row: Row, work: StepWork, stages: Mapping[str, Stage], device: Device | None, *, cores: int = 1
) -> dict[str, float]:
    """``speed/<stage>_tokens_per_s`` and ``speed/<stage>_mfu`` of a row.

    Args:
        jobs: of the recipe.
        row: metrics of the step.
        work: of the step.
        stages: the plan of that work, for its FLOPs.
        device: whose peak is known; None: it is not, and no MFU is reported.
        cores: of a CPU that one process computes on; 1 on other devices.
    """
    found = {}
    for name, tokens in work.tokens.items():
        seconds = row.get(f"timing/{name}", 0.0)
        if seconds <= 0:
            continue
        found[f"speed/{name}_tokens_per_s"] = tokens / seconds
        peak = _peak(device, _precision(jobs, name)) if device is not None else 0.0
        if name in stages and peak:
            found[f"speed/{name}_mfu"] = stages[name].flops / (seconds * stages[name].devices * cores * peak)
    return found


def _precision(jobs: Jobs, stage: str) -> Precision:
    if stage == "gen" and jobs.engine is not None:
        return jobs.engine.precision
    if stage == "adv" and jobs.rewards:
        return jobs.rewards[0].precision
    if stage == "ref" and jobs.reference is not None:
        return jobs.reference.precision
    return jobs.train.precision


def _peak(device: Device, precision: Precision) -> float:
    """0: not known."""
    try:
        return device.peak(precision)
    except ConfigError:
        return 0.0


def busy(jobs: Jobs, row: Row) -> dict[str, float]:
    """``speed/busy`` and ``speed/busy_<pool>``: device-seconds at work over all device-seconds, 0 to 1.

    Roles on the same devices take turns, so their shares add up. A run in one process has one device.
    """
    if jobs.local:
        found = _at_work([name.removeprefix("timing/idle_") for name in row if name.startswith("timing/idle_")], row)
        return {} if found is None else {"speed/busy": found}
    devices: dict[str, int] = {}
    worked: dict[str, float] = {}
    for place in jobs.places:
        share = _at_work(place.roles, row) if place.roles else 0.0
        if share is None:
            return {}
        devices[place.name] = devices.get(place.name, 0) + place.devices
        worked[place.name] = worked.get(place.name, 0.0) + place.devices * share
    pools = {f"speed/busy_{name.replace('+', '_')}": worked[name] / devices[name] for name in devices}
    return {"speed/busy": sum(worked.values()) / sum(devices.values())} | pools


def _at_work(roles: Sequence[Role | str], row: Row) -> float | None:
    """Of devices that hold these roles; None: the row does not know."""
    shares = [1.0 - row[f"timing/idle_{role}"] for role in roles if f"timing/idle_{role}" in row]
    return min(sum(shares), 1.0) if shares else None


@dataclass(frozen=True, kw_only=True, slots=True)
class Compared:
    """A planned number against the measured one."""

    planned: float
    measured: float

    @property
    def ratio(self) -> float:
        """Above 1: the run needs less than planned."""
        return self.planned / self.measured


def median_seconds(rows: Sequence[Row]) -> dict[str, float]:
    """Of each stage that took time in one of the rows."""
    found = {name: [row[f"timing/{name}"] for row in rows if row.get(f"timing/{name}", 0.0) > 0] for name in STAGES}
    return {name: median(seconds) for name, seconds in found.items() if seconds}


def planned_seconds(jobs: Jobs, device: Device, works: Sequence[StepWork]) -> dict[str, float]:
    """The same by the plan, for steps with this work."""
    planned = [work.stages(jobs, device) for work in works]
    found = {name: [stages[name].seconds for stages in planned if name in stages] for name in STAGES}
    return {name: median(seconds) for name, seconds in found.items() if seconds}


def compare(planned: Mapping[str, float], measured: Mapping[str, float]) -> dict[str, Compared]:
    """By name; only what both know, in the order of ``planned``."""
    return {
        name: Compared(planned=value, measured=measured[name])
        for name, value in planned.items()
        if measured.get(name, 0.0) > 0
    }
