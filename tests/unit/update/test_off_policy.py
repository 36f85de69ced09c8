"""``offpolicy/*``: importance weights and log-ratios of the completions that are trained on."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from rlxf.assembly.roles import build_actor
from rlxf.core.types import Metrics, OnlinePairs, Pairs, ReferencedPairs
from rlxf.models.backend import sum_rows
from rlxf.platform import Process, get_platform
from rlxf.update.off_policy import HIGHEST, LOWEST, SUMS, off_policy_metrics, off_policy_sums
from tests.actors import actor, one_step
from tests.ranks import on_ranks
from tests.settings import online_pairs, random_pairs, referenced, run_config
from tests.tiny_models import save_causal_lm

RESOLUTION = 0.08  # of the percentile, relative


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_causal_lm(tmp_path_factory.mktemp("off_policy") / "model", tied=True)


def measured(rows: list[list[float]]) -> Metrics:
    ratios = torch.tensor([value for row in rows for value in row], dtype=torch.float64)
    return off_policy_metrics(off_policy_sums(ratios, torch.tensor([len(row) for row in rows])))


def test_equal_weights_are_worth_all_their_completions() -> None:
    assert measured([[0.0, 0.0], [0.0]]) == {
        "offpolicy/logratio_mean": 0.0,
        "offpolicy/logratio_p99": pytest.approx(LOWEST, rel=RESOLUTION),
        "offpolicy/ess": 1.0,
    }


def test_the_effective_sample_size_is_that_of_the_completions_weights() -> None:
    found = measured([[0.5, 0.25], [-1.0], [2.0, -1.0, 0.1]])
    weights = torch.tensor([0.75, -1.0, 1.1], dtype=torch.float64).exp()
    assert found["offpolicy/ess"] == pytest.approx(float(weights.sum() ** 2 / (3 * weights.square().sum())), rel=1e-12)
    assert found["offpolicy/logratio_mean"] == pytest.approx(0.85 / 6, rel=1e-12)


@pytest.mark.parametrize("ratio", [1e3, -1e3])
def test_a_completion_far_away_neither_overflows_nor_leaves_the_range(ratio: float) -> None:
    found = measured([[ratio], [0.0], [0.0]])
    assert found["offpolicy/ess"] == pytest.approx(1 / 3 if ratio > 0 else 2 / 3)
    assert found["offpolicy/logratio_p99"] == pytest.approx(HIGHEST, rel=RESOLUTION)


@pytest.mark.parametrize("scale", [1e-5, 0.03, 1.0, 20.0])
def test_the_percentile_is_that_of_the_tokens_to_the_histograms_resolution(scale: float) -> None:
    ratios = scale * torch.randn(20_000, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    found = off_policy_metrics(off_policy_sums(ratios, torch.tensor([20_000])))
    assert found["offpolicy/logratio_p99"] == pytest.approx(float(ratios.abs().quantile(0.99)), rel=RESOLUTION)


@pytest.mark.parametrize("value", [2e-6, 0.01, 0.0123, 1.0, 99.0])
def test_the_percentile_of_one_value_is_that_value(value: float) -> None:
    assert measured([[-value] * 5])["offpolicy/logratio_p99"] == pytest.approx(value, rel=RESOLUTION)


def test_a_rounding_error_does_not_move_the_percentile() -> None:
    edges = LOWEST * 10 ** (torch.arange(200, dtype=torch.float64) / 32)  # exactly on the histogram's points
    found = [measured([(edges * (1 + error)).tolist()]) for error in (-1e-9, 0.0, 1e-9)]
    assert found[0]["offpolicy/logratio_p99"] == pytest.approx(found[2]["offpolicy/logratio_p99"], rel=1e-6)


def test_sums_of_parts_are_the_sums_of_the_whole() -> None:
    lengths = torch.tensor([3, 1, 4, 2])
    ratios = torch.randn(10, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    parts = off_policy_sums(ratios[:4], lengths[:2]) + off_policy_sums(ratios[4:], lengths[2:])
    torch.testing.assert_close(parts, off_policy_sums(ratios, lengths))


def test_unknown_log_probs_give_no_number() -> None:
    assert measured([[math.nan, math.nan], [math.nan]]) == {}
    assert off_policy_metrics(off_policy_sums(None, torch.tensor([2, 1]))) == {}
    assert off_policy_metrics(torch.zeros(len(SUMS), dtype=torch.float64)) == {}


def test_a_completion_with_an_unknown_token_has_no_weight() -> None:
    found = measured([[0.5, math.nan], [0.3], [0.3]])
    assert found["offpolicy/ess"] == pytest.approx(1.0, rel=1e-12)
    assert found["offpolicy/logratio_mean"] == pytest.approx(1.1 / 3)


def sampled(pairs: Pairs, logps: dict[str, Tensor]) -> ReferencedPairs:
    """The pairs as an engine with these log-probs would have sampled them."""
    online = online_pairs(pairs, logps["chosen"], logps["rejected"])
    return ReferencedPairs(pairs=online, reference=referenced(pairs).reference)


def stale(folder: Path, count: int = 7) -> tuple[ReferencedPairs, list[Tensor]]:
    """Pairs of an older policy, and the log-ratios [tokens] of each side against the model in ``folder``."""
    pairs, fresh = random_pairs(count), actor(folder, "ray_online_dpo")
    generator = torch.Generator().manual_seed(5)
    own = {side: fresh.token_logps(getattr(pairs, side)) for side in ("chosen", "rejected")}
    engine = {side: logps + 0.1 * torch.randn(len(logps), generator=generator) for side, logps in own.items()}
    return sampled(pairs, engine), [(own[side] - engine[side]).double() for side in own]


def off_policy(metrics: Metrics) -> Metrics:
    return {name: value for name, value in metrics.items() if name.startswith("offpolicy/")}


def test_an_update_reports_them_of_its_first_mini_batch_before_the_optimizer_step(folder: Path) -> None:
    batch, ratios = stale(folder)
    lengths = [batch.pairs.chosen.completion_lengths, batch.pairs.rejected.completion_lengths]

    def expected(count: int) -> Metrics:
        rows = [sum_rows(ratio, length)[:count] for ratio, length in zip(ratios, lengths, strict=True)]
        tokens = torch.cat([r[: int(n[:count].sum())] for r, n in zip(ratios, lengths, strict=True)])
        weights = torch.cat(rows).exp()
        ess = float(weights.sum() ** 2 / (2 * count * weights.square().sum()))
        return {
            "offpolicy/logratio_mean": pytest.approx(float(tokens.mean()), abs=1e-5),
            "offpolicy/logratio_p99": pytest.approx(float(tokens.abs().quantile(0.99)), rel=0.15),  # of few tokens
            "offpolicy/ess": pytest.approx(ess, rel=1e-4),
        }

    assert 0.3 < one_step(folder, "ray_online_dpo", batch)[0]["offpolicy/ess"] < 0.99
    assert off_policy(one_step(folder, "ray_online_dpo", batch)[0]) == expected(7)
    assert off_policy(one_step(folder, "ray_online_dpo", batch, ppo_mini_batch_size=3)[0]) == expected(3)


@pytest.mark.parametrize("micro_batch_size", [1, 2, 5])
def test_they_do_not_depend_on_the_micro_batch(folder: Path, micro_batch_size: int) -> None:
    batch, _ = stale(folder)
    whole = off_policy(one_step(folder, "ray_online_dpo", batch, micro_batch_size=7)[0])
    cut = off_policy(one_step(folder, "ray_online_dpo", batch, micro_batch_size=micro_batch_size)[0])
    assert cut == {name: pytest.approx(value, rel=1e-4, abs=1e-6) for name, value in whole.items()}
    assert len(whole) == 3


def test_they_change_neither_loss_nor_weights(folder: Path) -> None:
    batch, _ = stale(folder)
    pairs = batch.pairs
    unknown = {side: torch.full((int(getattr(pairs, side).completion_lengths.sum()),), math.nan) for side in
               ("chosen", "rejected")}  # fmt: skip
    replayed = ReferencedPairs(pairs=sampled(pairs, unknown).pairs, reference=batch.reference)
    known, without = (one_step(folder, "ray_online_dpo", each) for each in (batch, replayed))
    assert off_policy(without[0]) == {}
    assert known[0]["loss"] == without[0]["loss"]
    assert known[0]["grad_norm"] == without[0]["grad_norm"]
    assert all(torch.equal(value, without[1][name]) for name, value in known[1].items())


def _child(rank: int, world_size: int, port: int, folder: Path, settings: dict[str, Any], out: Path) -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    config = run_config(folder, ppo_mini_batch_size=math.ceil(7 / settings.pop("dp", 1)), **settings)
    process = Process(rank=rank, world_size=world_size, master_port=port)
    trained = build_actor(config, get_platform("cpu"), process)
    pairs = random_pairs(7)
    metrics = trained.update(sampled(pairs, torch.load(out / "engine.pt", weights_only=True)), 0)
    torch.save(metrics, out / f"rank_{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


LAYOUTS: dict[str, dict[str, Any]] = {
    "dp": {"dp": 2},
    "tp": {"tensor_model_parallel_size": 2},
    "pp": {"pipeline_model_parallel_size": 2},
    "cp": {"context_parallel_size": 2},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_they_do_not_depend_on_the_layout(folder: Path, tmp_path: Path, layout: str) -> None:
    batch, _ = stale(folder)
    assert isinstance(batch.pairs, OnlinePairs)
    engine = {"chosen": batch.pairs.chosen_engine_logps, "rejected": batch.pairs.rejected_engine_logps}
    torch.save(engine, tmp_path / "engine.pt")
    on_ranks(_child, 2, folder, LAYOUTS[layout], tmp_path)
    whole = off_policy(one_step(folder, "ray_online_dpo", batch, micro_batch_size=4)[0])
    for rank in range(2):
        found = off_policy(torch.load(tmp_path / f"rank_{rank}.pt", weights_only=True))
        assert found == {name: pytest.approx(value, rel=1e-4, abs=1e-6) for name, value in whole.items()}
