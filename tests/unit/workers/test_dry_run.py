"""What a dry run says of a cluster, without one."""

from __future__ import annotations

import pytest

from rlxf.config.load import load_config
from rlxf.placement.plan import NodeResources
from tests.unit.config.recipes import recipe
from workers import dry_run as module


@pytest.mark.parametrize(("free", "crosses"), [((1, 1, 2), False), ((1, 1, 1, 1), True)])
def test_a_dry_run_says_whether_weights_travel_between_machines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], free: tuple[int, ...], crosses: bool
) -> None:
    nodes = [NodeResources(name=f"n{i}", total={"CPU": 2}, free={"CPU": count}) for i, count in enumerate(free)]
    monkeypatch.setattr(module, "running_cluster", lambda: "10.0.0.1:6344")
    monkeypatch.setattr(module, "_nodes_of", lambda address: nodes)
    module.dry_run(load_config(recipe(runtime="ray", resource_pool={"actor_rollout": [1, 1]})))
    text = capsys.readouterr().out
    assert "it has room for this recipe" in text
    assert ("new weights travel between machines: train on n0; infer on n1" in text) == crosses
