"""What ran: recipe, model, algorithm, data, versions and machine, in words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlxf.config.stages import STAGES
from rlxf.report.read import RunData
from rlxf.report.rows import Row

Facts = list[tuple[str, str]]

_JUDGES = (("load", "model"), ("function", "function"), ("base_url", "service"))
_SHAPE = (("num_layers", "layers"), ("hidden_size", "wide"), ("vocab_size", "words"))


def name_of(run: RunData) -> str:
    """The recipe's name, else that of the folder."""
    for found in (_started(run).get("recipe"), run.command.get("config_name")):
        if isinstance(found, str) and found:
            return found
    return run.folder.absolute().name


def command_of(run: RunData) -> str:
    """The command as it was typed; empty if no file says."""
    found = _started(run).get("command") or run.command.get("command")
    return " ".join(map(str, found)) if isinstance(found, list) else str(found or "")


def is_online(run: RunData) -> bool:
    """Whether the policy sampled what it trained on."""
    stage = _section(run.config, "training").get("stage")
    facts = STAGES.get(stage) if isinstance(stage, str) else None  # type: ignore[call-overload]  # any text
    return facts.online if facts is not None else "pair/kept" in run.metrics.values


def has_penalty(run: RunData) -> bool:
    """Whether completions can lose some of their score: then scores before penalties are rows of their own."""
    actor = _section(run.config, "actor_rollout")
    return any(actor.get(key) for key in ("missing_eos_penalty", "length_penalty", "overlong_penalty"))


def is_scaled(run: RunData) -> bool:
    """Whether the scores of training steps are scaled, and so have other units than those of evaluations."""
    sources = _section(run.config, "reward").get("sources")
    found = [source.get("scale") for source in sources if isinstance(source, Mapping)] if sources else []
    return any(scale == "running" for scale in found)


def what_ran(run: RunData) -> Facts:
    """Labels and values; what the recipe does not say is left out."""
    config = run.config
    training, actor = _section(config, "training"), _section(config, "actor_rollout")
    rows = [
        ("Task", _task(training, actor)),
        ("Loss", _loss(actor) if training.get("stage") in ("ray_online_dpo", "dpo") else ""),
        ("Model", _model(config, actor)),
        ("Data", _joined(actor.get("data_path"))),
        ("Reward", ", ".join(_rewards(_section(config, "reward")))),
        ("Judge", _judge(_section(config, "judge"))),
        ("Step", _step(training, actor, online=is_online(run))),
        ("Learning rate", _rate(actor)),
        ("Sampling", _sampling(config, actor) if is_online(run) else ""),
        ("Evaluation", _evaluation(training, _section(config, "eval"))),
        ("Seed", _text(training.get("seed"))),
    ]
    return [(label, value) for label, value in rows if value]


def where_it_ran(run: RunData) -> Facts:
    """Machine and versions; runs of earlier revisions did not record them."""
    started = _started(run)
    machine, versions = _section(started, "machine"), _section(started, "versions")
    size = [f"{machine['cpus']} CPU cores" if "cpus" in machine else ""]
    size += [f"{_text(machine['memory_gib'])} GiB of memory" if "memory_gib" in machine else ""]
    rows = [
        ("Machine", _joined([machine.get("host"), machine.get("system")])),
        ("Size", ", ".join(part for part in size if part)),
        ("Devices", _devices(machine.get("devices") or machine.get("device"))),
        ("Runtime", _text(run.config.get("runtime"))),
        ("Versions", ", ".join(f"{name} {version}" for name, version in versions.items() if version)),
    ]
    return [(label, value) for label, value in rows if value]


def _started(run: RunData) -> Row:
    return next((row for row in reversed(run.journal) if row.get("what") == "started"), {})


def _section(values: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = values.get(name)
    return found if isinstance(found, Mapping) else {}


def _text(value: object) -> str:
    if value is None or value is False:
        return ""
    return f"{value:g}" if isinstance(value, float) else str(value)


def _joined(value: object) -> str:
    items = value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    return ", ".join(text for item in items if (text := _text(item)))


def _task(training: Mapping[str, Any], actor: Mapping[str, Any]) -> str:
    stage = training.get("stage")
    facts = STAGES.get(stage) if isinstance(stage, str) else None  # type: ignore[call-overload]  # any text
    title = facts.title if facts else _text(stage)
    tuned = f"LoRA, rank {actor['lora_r']}" if actor.get("lora_r") else "all weights"
    if actor.get("qlora"):
        tuned = f"Q{tuned}"
    return f"{title}, {tuned}" if title else ""


def _loss(actor: Mapping[str, Any]) -> str:
    names = _joined(actor.get("dpo_loss_type"))
    parts = [names, f"beta {_text(actor.get('dpo_beta'))}" if "dpo_beta" in actor else ""]
    divergence = actor.get("f_divergence_type")
    if divergence not in (None, "reverse_kl"):
        parts.append(f"divergence {divergence}")
    if actor.get("dpo_weighting") not in (None, "none"):
        parts.append(f"weighting {actor['dpo_weighting']}")
    return ", ".join(part for part in parts if part)


def _model(config: Mapping[str, Any], actor: Mapping[str, Any]) -> str:
    name, folder = _text(actor.get("model")), _text(actor.get("load"))
    shape = _section(_section(config, "model"), name)
    sizes = [f"{shape[key]} {unit}" for key, unit in _SHAPE if key in shape]
    kind = next((word for word in ("bf16", "fp16") if actor.get(word)), "fp32") if actor else ""
    shown = f"{name} ({', '.join(sizes)})" if sizes else name
    return ", ".join(part for part in (shown, kind, f"from {folder}" if folder else "") if part)


def _rewards(reward: Mapping[str, Any]) -> Iterator[str]:
    sources = reward.get("sources")
    for source in sources if isinstance(sources, list) and sources else [reward]:
        if isinstance(source, Mapping):
            given = next((_text(source[key]) for key in ("load", "function", "url", "rule") if source.get(key)), "")
            name, weight = _text(source.get("name")), source.get("weight", 1.0)
            shown = f"{name}: {given}" if name and given else name or given
            if shown:
                yield shown if weight == 1.0 else f"{shown} (weight {_text(weight)})"


def _judge(judge: Mapping[str, Any]) -> str:
    found = [f"{word} {judge[key]}" for key, word in _JUDGES if judge.get(key)]
    return ", ".join([*found, f"model {judge['model']}"] if found and judge.get("model") else found)


def _step(training: Mapping[str, Any], actor: Mapping[str, Any], *, online: bool) -> str:
    size, samples = training.get("global_batch_size"), actor.get("n_samples_per_prompt")
    parts = [f"{size} {'prompts' if online else 'rows'}" if size else ""]
    if online and samples:
        parts.append(f"{samples} samples each")
    if actor.get("ppo_mini_batch_size"):
        parts.append(f"mini-batches of {actor['ppo_mini_batch_size']}")
    if actor.get("ppo_epochs") not in (None, 1):
        parts.append(f"{actor['ppo_epochs']} passes")
    return ", ".join(part for part in parts if part)


def _rate(actor: Mapping[str, Any]) -> str:
    rate = actor.get("lr")
    style, least = _text(actor.get("lr_decay_style")), actor.get("min_lr")
    return ", ".join(
        part for part in (_text(rate), style, f"down to {_text(least)}" if rate and least is not None else "") if part
    )


def _sampling(config: Mapping[str, Any], actor: Mapping[str, Any]) -> str:
    rollout = _section(config, "rollout")
    parts = [f"engine {rollout['engine']}" if rollout.get("engine") else ""]
    parts.append(f"temperature {_text(rollout['temperature'])}" if "temperature" in rollout else "")
    parts.append(f"at most {actor['max_new_tokens']} tokens" if actor.get("max_new_tokens") else "")
    parts.append(f"lookahead {rollout['lookahead']}" if rollout.get("lookahead") else "")
    return ", ".join(part for part in parts if part)


def _evaluation(training: Mapping[str, Any], evaluation: Mapping[str, Any]) -> str:
    interval, prompts = training.get("eval_interval"), evaluation.get("num_prompts")
    if not interval:
        return ""
    return f"every {interval} steps" + (f", {prompts} prompts" if prompts else "")


def _devices(devices: object) -> str:
    if isinstance(devices, Mapping):
        return ", ".join(f"{count} x {name}" for name, count in devices.items())
    return _joined(devices)


def shown_path(path: Path) -> str:
    """A run folder as people name it: its last two parts."""
    return "/".join(path.absolute().parts[-2:])
