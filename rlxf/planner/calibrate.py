"""A device file of a run's own figures: with it the planner gives the seconds that the run measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import yaml

from rlxf.planner.device import Device, Figure

Seconds = Callable[[Device], Mapping[str, float]]  # of the stages of the measured steps, by the plan

_LEAST_SHARE, _MOST_SHARE = 1e-6, 10.0  # above 1: the peak that was assumed is too low
_MANY_MS = 1e7
_RATES = ("link_gb_per_s", "network_gb_per_s", "host_gb_per_s", "memory_gb_per_s")  # that a push may depend on
_FASTER = 1e4  # at most, than assumed
_TELLS = 0.01  # a rate that makes a push faster by less than this share is not used by it
_STEPS = 60  # of a bisection: far below a millionth of the figure
_DECIDES = 1.2  # halving a share makes a stage slower by this factor if it is the share that decides


def calibrated(device: Device, seconds: Seconds, measured: Mapping[str, float], *, source: str, date: str) -> Device:
    """The device with figures for which ``seconds`` gives what was ``measured``; the other figures are unchanged.

    A stage decides one figure, in an order in which no later one changes an earlier stage: ``push_s`` (if the bytes
    alone take longer: the bandwidths that they use, by one factor), ``pass_ms`` (only downwards, where launches alone
    take longer than measured), ``train_share``, ``forward_share`` (of reference and reward models together), then
    ``token_ms`` or ``decode_share``, whichever decides how long a decoding step takes.

    Args:
        device: with which the run was planned.
        seconds: of the measured steps, for any device.
        measured: seconds of each stage.
        source: of the new figures.
        date: of the measurement.
    """
    fit = _Fit(seconds, measured, source, date)
    device = fit.push(device)
    for stages, share in ((("update_actor",), "train_share"), (("ref", "adv"), "forward_share")):
        device = fit.passes(device, stages, share)
    for stages, share in ((("update_actor",), "train_share"), (("ref", "adv"), "forward_share")):
        device = fit.share(device, stages, share)
    return fit.sampling(device)


class _Fit:
    """Figures from stages, one after the other."""

    def __init__(self, seconds: Seconds, measured: Mapping[str, float], source: str, date: str) -> None:
        self._seconds, self._measured = seconds, measured
        self._source, self._date = source, date

    def push(self, device: Device) -> Device:
        wanted = self._of(("sync",), device)
        if wanted is None:
            return device
        if self._planned(wanted, self._with(device, push_s=0.0)) <= wanted[1]:
            return self._solved(device, wanted, "push_s", 0.0, _MANY_MS)
        device = self._with(device, push_s=0.0)
        before = self._planned(wanted, device)
        rates = {
            key: value
            for key in _RATES
            for value in [_value(device, key)]
            if self._planned(wanted, self._with(device, **{key: 2 * value})) < (1 - _TELLS) * before
        }
        faster = self._found(
            device, wanted, lambda factor: {key: factor * rate for key, rate in rates.items()}, 1.0, _FASTER
        )
        return self._with(device, **faster)

    def passes(self, device: Device, stages: tuple[str, ...], share: str) -> Device:
        """Launches that take no longer than the whole stage did."""
        wanted = self._of(stages, device)
        fastest = self._with(device, **{share: 1.0})
        if wanted is None or self._planned(wanted, fastest) <= wanted[1]:
            return device
        found = self._solved(fastest, wanted, "pass_ms", 0.0, _value(device, "pass_ms"))
        return self._with(device, pass_ms=_value(found, "pass_ms"))

    def share(self, device: Device, stages: tuple[str, ...], share: str) -> Device:
        wanted = self._of(stages, device)
        return device if wanted is None else self._solved(device, wanted, share, _LEAST_SHARE, _MOST_SHARE)

    def sampling(self, device: Device) -> Device:
        wanted = self._of(("gen",), device)
        if wanted is None:
            return device
        halved = self._with(device, decode_share=_value(device, "decode_share") / 2)
        if self._planned(wanted, halved) > _DECIDES * self._planned(wanted, device):
            device = self._solved(device, wanted, "decode_share", _LEAST_SHARE, _MOST_SHARE)
            knobs = [("token_ms", 0.0, _MANY_MS)]
        else:
            device = self._solved(device, wanted, "token_ms", 0.0, _MANY_MS)
            knobs = [("decode_share", _LEAST_SHARE, _MOST_SHARE)]
        for key, low, high in (*knobs, ("memory_share", _LEAST_SHARE, 1.0)):
            if not math.isclose(self._planned(wanted, device), wanted[1], rel_tol=1e-3):
                device = self._solved(device, wanted, key, low, high)
        return device

    def _of(self, stages: tuple[str, ...], device: Device) -> tuple[tuple[str, ...], float] | None:
        """Those of the stages that are both planned and measured, and the seconds of all of them; None: there are none.

        One figure cannot give each of them its own seconds.
        """
        planned = self._seconds(device)
        known = tuple(name for name in stages if name in planned and self._measured.get(name, 0.0) > 0)
        return (known, sum(self._measured[name] for name in known)) if known else None

    def _planned(self, wanted: tuple[tuple[str, ...], float], device: Device) -> float:
        planned = self._seconds(device)
        return sum(planned[name] for name in wanted[0])

    def _solved(
        self, device: Device, wanted: tuple[tuple[str, ...], float], key: str, low: float, high: float
    ) -> Device:
        """The device whose ``key``, between the two bounds, gives the seconds; at a bound if none does."""
        return self._with(device, **self._found(device, wanted, lambda value: {key: value}, low, high))

    def _found(
        self,
        device: Device,
        wanted: tuple[tuple[str, ...], float],
        figures: Callable[[float], dict[str, float]],
        low: float,
        high: float,
    ) -> dict[str, float]:
        """``figures`` of a number between the bounds that give the seconds, by bisection; none if they change nothing.

        ``figures`` of the better bound where the seconds are out of reach.
        """

        def excess(value: float) -> float:
            return self._planned(wanted, self._with(device, **figures(value))) - wanted[1]

        at_low, at_high = excess(low), excess(high)
        if at_low * at_high > 0:
            moves = not math.isclose(at_low, at_high, rel_tol=1e-9, abs_tol=1e-12)
            return figures(low if abs(at_low) < abs(at_high) else high) if moves else {}
        for _ in range(_STEPS):
            middle = math.sqrt(low * high) if low > 0 else (low + high) / 2
            if (excess(middle) > 0) == (at_low > 0):
                low = middle
            else:
                high = middle
        return figures(high if low == 0 else math.sqrt(low * high))

    def _with(self, device: Device, **values: float) -> Device:
        return device.with_figures(self._source, self._date, **values)


def _value(device: Device, key: str) -> float:
    figure: Figure = getattr(device.file, key)
    assert figure.value is not None  # a device whose figures were probed
    return figure.value


def device_text(device: Device, comment: str) -> str:
    """The device as a file like those of ``configs/rlxf/device``, every figure with its source and date."""
    lines = [f"# {line}" for line in (comment, "Figures are of one device; an estimate made of them is an estimate.")]
    for key, value in device.file.model_dump(exclude_none=True).items():
        lines.append(f"{key}: {_flow(value)}")
    return "\n".join(lines) + "\n"


def _flow(value: Any) -> str:
    """On one line."""
    if isinstance(value, Mapping):
        value = {"value": None} | {key: _short(item) for key, item in value.items()}
    return yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10**6).removesuffix("\n...\n").strip()


def _short(value: Any) -> Any:
    return float(f"{value:.6g}") if isinstance(value, float) else value
