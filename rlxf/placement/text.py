"""A placement plan as people read it: the table of a dry run, and the cluster that the recipe needs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

from rlxf.config.devices import DEVICES, DeviceFacts, device_facts, find_device
from rlxf.config.folders import missing_paths, shown
from rlxf.config.judge import JUDGE_MODEL
from rlxf.config.roles import ActorConfig, RoleConfig
from rlxf.config.schema import ModelConfig, RunConfig
from rlxf.placement.plan import NodeResources, Plan, RolePlan, assign

_NF4_BYTES = 0.5 + 4 / 64  # of one weight: 4 bits, and its share of a scale in fp32
_USUAL_NODE = 8  # devices of one accelerator machine
_HEAD = "ray start --head --port 6344 {option}"
_OTHER = 'ray start --address="IP_ADDRESS:6344" {option}'


def num_parameters(shape: ModelConfig, *, output_head: bool = True) -> int:
    """Parameters of a Llama- or Qwen-shaped model (biases left out); a reward model has no output head."""
    norms = shape.num_layers * 2 * shape.hidden_size
    matrices = 2 if output_head and shape.untie_embeddings_and_output_weights else 1
    return _linear_parameters(shape) + norms + matrices * shape.vocab_size * shape.hidden_size + shape.hidden_size


def _linear_parameters(shape: ModelConfig) -> int:
    """Those of the linears in the layers."""
    attention = shape.hidden_size * shape.head_size * 2 * (shape.num_attention_heads + shape.kv_heads)
    return shape.num_layers * (attention + 3 * shape.hidden_size * shape.ffn_hidden_size)


def describe(config: RunConfig, plan: Plan) -> str:
    """Each role's devices, what is missing on disk, and the cluster that can hold it."""
    kind = "offline, data from a file" if config.offline else f"online, rollout engine {config.engine}"
    place = "one process, without Ray" if config.runtime == "local" else f"{plan.num_devices} x {plan.resource}"
    found = f" (training.device=auto finds {find_device()} here)" if config.training.device == "auto" else ""
    lines = [f"plan: {config.training.stage} ({kind}) on {place}{found}", "", *aligned(_rows(config, plan)), ""]
    lines += [*_turns(config), *_streaming(config)]
    missing = missing_paths(config)
    if missing:
        lines += ["missing here:", *aligned([(f"  {named.key}", shown(named.path)) for named in missing]), ""]
    if config.runtime == "ray":
        lines += list(_needs(config, plan))
    return "\n".join(lines).rstrip() + "\n"


def _rows(config: RunConfig, plan: Plan) -> Iterator[tuple[str, ...]]:
    yield ("role", "model", "pool", "devices", "per node", "layout", "weights per device")
    sections: dict[str, RoleConfig] = {
        "train": config.actor_rollout,
        "infer": config.actor_rollout,
        "ref": config.ref,
        "reward": config.reward,
    }
    for role in plan.roles:
        group = plan.group(role.group)
        nodes = [group.node_of(bundle) for bundle in role.bundles]
        per_node = [nodes.count(node) for node in sorted(set(nodes))]
        others = [other.role for other in plan.roles if other is not role and _share(role, other)]
        devices = str(len(role.bundles)) + (f" (shared with {', '.join(others)})" if others else "")
        memory = _weights(config.model[role.model], role, sections[role.role])
        yield (role.role, role.model, role.group, devices, str(per_node), _layout(role), memory)
    if config.reference_is_base:
        yield ("ref", config.ref.model, "actor_rollout", "0", "[]", "", "none: the actor with its adapters off")
    judge = config.judge
    if config.judges and JUDGE_MODEL not in config.reward_models:
        what = Path(judge.function or judge.load or "").name or f"{judge.model} at {judge.base_url}"
        yield ("judge", judge.kind or "", "none", "0", "[]", "", what)
    for source in config.reward.listed if not config.offline else ():
        if source.load is None:
            what = Path(source.function).name if source.function else source.url or source.rule or ""
            yield ("reward", source.kind, "none", "0", "[]", "", what)


def _turns(config: RunConfig) -> Iterator[str]:
    """Who has the memory of the devices that trainer and engines share; nothing if they share none."""
    if not config.takes_turns:
        return
    yield "turns: train and infer share devices. The engines sleep while the trainer has its optimizer there"
    frozen = [role for role in ("ref", "reward") if role in config.sharing]
    if frozen:
        yield f"  on the same devices, always with their memory: {' and '.join(frozen)}"
    if config.engine == "vllm" and not device_facts(config.training.device).vllm_sleeps:
        yield "  vLLM has no sleep on a CPU: it keeps its memory"
    yield ""


def _streaming(config: RunConfig) -> Iterator[str]:
    """What of a step moves on before the step is sampled; nothing without chunks."""
    if not config.streams:
        return
    late = [source for source in config.reward.listed if source.whole_step or source.scale != "none"]
    yield f"streaming: chunks of {config.rollout.stream_prompts} prompts are scored while others are being sampled"
    for source in late:
        why = "it is asked about the whole step" if source.whole_step else f"its scale is {source.scale}"
        yield f"  pairs and reference wait for the whole step: reward source {source.name} ({why})"
    if config.runtime == "local" or ("reward" in config.sharing and config.sharing != {"ref", "reward"}):
        yield "  here one after the other: no chunk is scored before all are sampled"
    yield ""


def _layout(role: RolePlan) -> str:
    """``TP4 DP2``: the sizes above 1, data parallel last."""
    sizes = {**role.axes, "DP": len(role.bundles) // math.prod(role.axes.values())}
    return " ".join(f"{axis}{size}" for axis, size in sizes.items() if size > 1) or "-"


def _share(first: RolePlan, second: RolePlan) -> bool:
    return first.group == second.group and bool(set(first.bundles) & set(second.bundles))


def _weights(shape: ModelConfig, role: RolePlan, section: RoleConfig) -> str:
    each = 4 if section.precision == "fp32" else 2  # bytes
    size: float = num_parameters(shape, output_head=role.role != "reward") * each
    kind: str = section.precision
    if role.role == "train" and isinstance(section, ActorConfig) and section.qlora:
        size -= _linear_parameters(shape) * (each - _NF4_BYTES)
        kind = f"nf4 and {kind}"
    size /= role.axes.get("TP", 1) * role.axes.get("PP", 1)
    amount = f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
    return f"{amount} {kind}"


def aligned(rows: Iterator[tuple[str, ...]] | Sequence[tuple[str, ...]]) -> list[str]:
    """Rows of cells as lines with columns of one width."""
    cells = list(rows)
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]


def node_sizes(plan: Plan, capacity: int) -> list[int]:
    """Devices that the plan takes on each node when a node has ``capacity`` of them; largest entries first."""
    nodes: list[int] = []
    for size in sorted((size for group in plan.groups for size in group.nodes), reverse=True):
        open_nodes = [i for i, taken in enumerate(nodes) if taken + size <= capacity]
        if open_nodes:
            nodes[open_nodes[0]] += size
        else:
            nodes.append(size)
    return nodes


def _needs(config: RunConfig, plan: Plan) -> Iterator[str]:
    largest = max(size for group in plan.groups for size in group.nodes)
    nodes = node_sizes(plan, max(_USUAL_NODE, largest))
    if len(nodes) == 1:
        devices = f"{nodes[0]} device{'' if nodes[0] == 1 else 's'}"
        yield f"needs: one machine with {devices}; without a running cluster, the run starts Ray there. Or:"
    else:
        yield f"needs: {len(nodes)} machines with {max(nodes)} devices each in one Ray cluster:"
    commands = []
    for facts in _kinds(config):
        option = facts.ray_start_option.format(count=max(nodes))
        commands.append((f"  {_HEAD.format(option=option)}", f"# {facts.ray_resource}, first machine"))
        if len(nodes) > 1:
            commands.append((f"  {_OTHER.format(option=option)}", f"# {facts.ray_resource}, each other machine"))
    yield from aligned(commands)
    yield "scripts/cluster_up.sh does this the safe way: with a token, and a dashboard only for the first machine."


def _kinds(config: RunConfig) -> list[DeviceFacts]:
    """The kinds of devices to print `ray start` lines for: the recipe's, or all when it leaves that open."""
    custom, device = config.resource_pool.resource_name, config.training.device
    if custom is not None:
        known = [facts for facts in DEVICES.values() if facts.ray_resource == custom]
        return known or [DeviceFacts(custom, (), f"""--resources='{{{{"{custom}": {{count}}}}}}'""")]
    if device != "auto":
        return [DEVICES[device]]
    found = DEVICES[find_device()]
    return [found] if found.device_files else list(DEVICES.values())


def describe_nodes(plan: Plan, nodes: Sequence[NodeResources]) -> str:
    """The running cluster, as a table of has and free."""
    rows = [("node", f"has {plan.resource}", "free")]
    rows += [(n.name, f"{n.total.get(plan.resource, 0):g}", f"{n.free.get(plan.resource, 0):g}") for n in nodes]
    return "\n".join(aligned(rows)) + "\n"


def describe_crossing(plan: Plan, nodes: Sequence[NodeResources]) -> str:
    """A line if engines are on other nodes than the trainer, so that new weights travel between machines; else empty.

    The nodes are those on which the run would start now.
    """
    train, infer, places = plan.role("train"), plan.role("infer"), assign(plan, nodes)
    if train is None or infer is None or places is None:
        return ""
    group = plan.group(train.group)
    on_train, on_infer = (
        {places[group.name, group.node_of(bundle)] for bundle in role.bundles} for role in (train, infer)
    )
    if on_infer <= on_train:
        return ""
    return f"new weights travel between machines: train on {_names(on_train)}; infer on {_names(on_infer)}\n"


def _names(nodes: set[str]) -> str:
    return ", ".join(sorted(nodes))
