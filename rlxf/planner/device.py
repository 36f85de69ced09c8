"""What one device can do: figures from a file of ``configs/rlxf/device``, each with its source and date."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import date
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BeforeValidator, Field, ValidationError

from rlxf.config.fields import finite
from rlxf.config.kinds import Positive, Strict
from rlxf.config.problems import expectation, show
from rlxf.core.errors import ConfigError
from rlxf.core.memory import GIB
from rlxf.core.places import RECIPES
from rlxf.core.words import nearest

FOLDER = "device"  # in the folder of recipes
DEFAULTS = {"npu": "910b-64", "cuda": "h100-80", "cpu": "cpu"}  # by ``training.device``


class Figure(Strict):
    """One number, and where it comes from."""

    value: Annotated[float, BeforeValidator(finite), Field(ge=0)] | None
    """The number; null: it is measured where the plan is made (only on a CPU)."""
    source: str
    """Data sheet, measurement or assumption."""
    date: str
    """Day on which it was read or measured."""


class DeviceFile(Strict):
    """A file of ``configs/rlxf/device``. Figures are of one device; of a CPU, of one core."""

    kind: Literal["npu", "cuda", "cpu"]
    """What ``training.device`` calls it."""
    title: str
    """Its name for people."""
    per_node: Positive
    """Devices of one machine."""
    link_mesh: bool = False
    """Each two devices of a machine have a link of their own, so that a group of n devices uses n - 1 links of each.
    If false, a device reaches all others through a switch at its full bandwidth."""
    memory_gib: Figure
    """Memory that programs can have. CPU: of the whole machine."""
    fp32_tflops: Figure
    """Peak of dense matrix products in fp32, TFLOP/s."""
    bf16_tflops: Figure
    """The same in bf16 and fp16."""
    train_share: Figure
    """Share of the peak that forward and backward passes reach."""
    forward_share: Figure
    """Share of the peak that passes without gradient reach, and the prefill of an engine."""
    decode_share: Figure
    """Share of the peak that the products of a decoding step reach where they, and not memory, decide."""
    memory_gb_per_s: Figure
    """Bandwidth of the memory, GB/s."""
    memory_share: Figure
    """Share of it that decoding and the optimizer reach."""
    link_gb_per_s: Figure
    """Bandwidth of one device to all others of a machine, one way, GB/s: what collective calls reach."""
    network_gb_per_s: Figure
    """Bandwidth of one device to other machines, one way, GB/s."""
    host_gb_per_s: Figure
    """Bandwidth to the memory of the host, GB/s."""
    latency_us: Figure
    """Time of a small all-reduce inside a machine, microseconds."""
    token_ms: Figure
    """Time of a decoding step besides its products: launches and the host, milliseconds."""
    pass_ms: Figure
    """Time that a layer of a forward pass takes besides its products, whatever its tokens: launches and the host,
    milliseconds. A backward pass takes twice as much."""
    push_s: Figure
    """Time of a push of weights besides the bytes, seconds."""
    context_gib: Figure
    """Memory that a process takes before its model: runtime, kernels, communicators."""
    engine_slots: Figure
    """Sequences that a vLLM engine decodes at a time unless the recipe says so."""
    price_per_hour: Figure | None = None
    """Dollars for an hour of one device."""


@dataclass(frozen=True, kw_only=True)
class Device:
    """The figures of a device in plain units: bytes, FLOP/s, bytes/s, seconds."""

    name: str
    file: DeviceFile

    @classmethod
    def load(cls, name: str) -> Device:
        """The device of a name in ``configs/rlxf/device``, or of a file.

        Raises:
            ConfigError: there is none, or its figures are wrong.
        """
        path = _path(name)
        try:
            raw = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ConfigError(f"plan.device = {show(name)}: {path} cannot be read: {_first_line(error)}") from error
        return cls(name=path.stem, file=_checked(raw, path, name))

    def with_figures(self, source: str, day: str, **values: float) -> Device:
        """The same device with other numbers: ``with_figures("measured here", "2026-11-26", push_s=0.2)``."""
        figures = {key: Figure(value=value, source=source, date=day) for key, value in values.items()}
        return replace(self, file=self.file.model_copy(update=figures))

    def with_probe(self, found: Mapping[str, float]) -> Device:
        """The same device, with measured numbers where its file has none."""
        empty = {key: value for key, value in found.items() if getattr(self.file, key).value is None}
        return self.with_figures("measured here", date.today().isoformat(), **empty)

    @property
    def lacks_figures(self) -> bool:
        """Whether some are null, and must be measured."""
        figures = (getattr(self.file, key) for key in DeviceFile.model_fields)
        return any(isinstance(figure, Figure) and figure.value is None for figure in figures)

    def with_memory(self, size: float) -> Device:
        """The same device with so many bytes of memory."""
        return self.with_figures("as the device reports it", date.today().isoformat(), memory_gib=size / GIB)

    def with_cores(self, count: int) -> Device:
        """The same device in machines of so many; of a CPU, the cores that its roles share."""
        return replace(self, file=self.file.model_copy(update={"per_node": count}))

    def _value(self, key: str) -> float:
        figure: Figure = getattr(self.file, key)
        if figure.value is None:
            raise ConfigError(f"plan.device = {show(self.name)}: {key} has no value; only a file of kind cpu may do so")
        return figure.value

    @property
    def kind(self) -> str:
        return self.file.kind

    @property
    def is_cpu(self) -> bool:
        return self.file.kind == "cpu"

    @property
    def sleeps_on_host(self) -> bool:
        """Whether an engine that sleeps keeps its weights in host memory, and copies them there and back."""
        return self.file.kind == "npu"

    @property
    def per_node(self) -> int:
        """Devices of one machine; of a CPU its cores."""
        return self.file.per_node

    @property
    def cores(self) -> int | None:
        """Cores that all processes of a CPU share; None: every device works by itself."""
        return self.file.per_node if self.is_cpu else None

    @cached_property
    def memory(self) -> float:
        return self._value("memory_gib") * GIB

    def peak(self, precision: str) -> float:
        """FLOP/s of dense matrix products."""
        return self._value("fp32_tflops" if precision == "fp32" else "bf16_tflops") * 1e12

    @cached_property
    def train_share(self) -> float:
        return self._value("train_share")

    @cached_property
    def forward_share(self) -> float:
        return self._value("forward_share")

    @cached_property
    def decode_share(self) -> float:
        return self._value("decode_share")

    @cached_property
    def bandwidth(self) -> float:
        """Bytes per second of memory that are reached."""
        return self._value("memory_gb_per_s") * 1e9 * self._value("memory_share")

    @cached_property
    def link(self) -> float:
        return self._value("link_gb_per_s") * 1e9

    def speed(self, span: int) -> float:
        """Bytes per second, one way, that each of ``span`` neighbouring devices reaches among them."""
        if span > self.per_node and not self.is_cpu:
            return self.network
        return self.link * (span - 1) / (self.per_node - 1) if self.file.link_mesh and span > 1 else self.link

    @cached_property
    def network(self) -> float:
        return self._value("network_gb_per_s") * 1e9

    @cached_property
    def host(self) -> float:
        return self._value("host_gb_per_s") * 1e9

    @cached_property
    def latency(self) -> float:
        return self._value("latency_us") * 1e-6

    @cached_property
    def token_s(self) -> float:
        return self._value("token_ms") * 1e-3

    @cached_property
    def pass_s(self) -> float:
        return self._value("pass_ms") * 1e-3

    @cached_property
    def push_s(self) -> float:
        return self._value("push_s")

    @cached_property
    def context(self) -> float:
        return self._value("context_gib") * GIB

    @cached_property
    def engine_slots(self) -> int:
        return int(self._value("engine_slots"))

    @property
    def price(self) -> float | None:
        """Dollars for an hour."""
        return self.file.price_per_hour.value if self.file.price_per_hour is not None else None


def device_names() -> list[str]:
    """Those that come with the program."""
    return sorted(path.stem for path in (RECIPES / FOLDER).glob("*.yaml"))


def _path(name: str) -> Path:
    known = RECIPES / FOLDER / f"{name}.yaml"
    if known.is_file():
        return known
    path = Path(name).expanduser()
    if path.suffix in (".yaml", ".yml") and path.is_file():
        return path
    near = nearest(name, device_names())
    hint = f'did you mean "{near}"? ' if near else ""
    raise ConfigError(
        f"plan.device = {show(name)}: no such device; {hint}expected one of {', '.join(device_names())}, or a .yaml "
        "file like those of configs/rlxf/device"
    )


def _checked(raw: Any, path: Path, name: str) -> DeviceFile:
    if not isinstance(raw, dict):
        raise ConfigError(f"plan.device = {show(name)}: {path} is not a mapping of figures")
    try:
        return DeviceFile.model_validate(raw)
    except ValidationError as error:
        lines = []
        for found in error.errors(include_url=False):
            key = ".".join(str(part) for part in found["loc"])
            unknown = found["type"] == "extra_forbidden"
            said = "unknown key" if unknown else f"{show(found['input'])}: {expectation(found)}"
            if found["type"] == "missing":
                said = "is required: a mapping of value, source and date"
            lines.append(
                f"{path}: {key} {'=' if not unknown and found['type'] != 'missing' else ''} {said}".replace("  ", " ")
            )
        raise ConfigError(*lines) from error


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
