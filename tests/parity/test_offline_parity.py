"""Offline DPO on a preference file: this project against TRL's live ``DPOTrainer``, step by step, in fp32."""

from __future__ import annotations

import inspect
import re
from dataclasses import replace
from pathlib import Path

import pytest
from trl import DPOTrainer

from tests.parity import ours, trl_offline, trl_online
from tests.parity.compare import assert_parity, excess
from tests.parity.fixed_data import FixedPrompt, Settings
from tests.parity.oracle import Metrics

Folders = tuple[Path, Path]

# Every loss that TRL has, each with the settings that it reads; sigmoid, hinge and ipo are below.
LOSSES = {
    "exo_pair": Settings(loss_type="exo_pair", label_smoothing=0.1),
    "nca_pair": Settings(loss_type="nca_pair"),
    "robust": Settings(loss_type="robust", label_smoothing=0.1),
    "bco_pair": Settings(loss_type="bco_pair"),
    "sppo_hard": Settings(loss_type="sppo_hard"),
    "aot": Settings(loss_type="aot"),
    "aot_unpaired": Settings(loss_type="aot_unpaired"),
    "aot-smoothed": Settings(loss_type="aot", label_smoothing=0.1),
    "aot_unpaired-smoothed": Settings(loss_type="aot_unpaired", label_smoothing=0.1),
    "apo_zero": Settings(loss_type="apo_zero"),
    "apo_down": Settings(loss_type="apo_down"),
    "discopop": Settings(loss_type="discopop"),
    "sigmoid_norm": Settings(loss_type="sigmoid_norm"),
    "sigmoid-and-sft": Settings(loss_type=("sigmoid", "sft"), loss_weights=(1.0, 0.2)),
    "three-losses": Settings(loss_type=("hinge", "ipo", "sft"), loss_weights=(0.5, 0.01, 1.0)),
    # Its score has the exponential of a log-ratio, which magnifies what fp32 rounds away: both sides are within 1e-5 of
    # TRL in float64, but in a sixth step not of each other.
    "forward_kl": Settings(divergence="forward_kl", num_steps=5),
    "js_divergence": Settings(divergence="js_divergence"),
    "alpha_divergence": Settings(divergence="alpha_divergence"),
    "alpha_divergence-hinge": Settings(loss_type="hinge", divergence="alpha_divergence", alpha=0.8),
    "js_divergence-and-sft": Settings(loss_type=("sigmoid", "sft"), divergence="js_divergence"),
    "js_divergence-ipo": Settings(loss_type="ipo", divergence="js_divergence"),
    "ld_alpha": Settings(ld_alpha=0.3),
    "ld_alpha-none-of-the-tail": Settings(ld_alpha=0.0, micro_batch_size=2),
    "ld_alpha-ipo": Settings(loss_type="ipo", ld_alpha=0.5),
    "ld_alpha-aot": Settings(loss_type="aot", ld_alpha=0.5),
    "ld_alpha-and-wpo": Settings(loss_type="sigmoid_norm", ld_alpha=0.5, weighting="wpo"),
    "wpo": Settings(weighting="wpo", micro_batch_size=4),
    "wpo-two-losses": Settings(loss_type=("sigmoid", "ipo"), loss_weights=(0.5, 0.01), weighting="wpo"),
}
# One per way in which a loss reads the batch: ratios, length, sorted batch, token mean, divergence.
EVERY_TIME = (
    *("exo_pair", "sigmoid_norm", "aot", "aot_unpaired", "sigmoid-and-sft", "js_divergence"),
    *("ld_alpha", "ld_alpha-aot", "wpo"),
)
PARAMETERS = [
    pytest.param(settings, id=name, marks=[] if name in EVERY_TIME else pytest.mark.slow)
    for name, settings in LOSSES.items()
]


def as_list(loss_type: str | tuple[str, ...]) -> tuple[str, ...]:
    return (loss_type,) if isinstance(loss_type, str) else loss_type


def named(*settings: Settings) -> list[tuple[str, Settings]]:
    """Each with the name of a folder for it."""
    return [(str(number), item) for number, item in enumerate(settings)]


def train_here(rows: list[FixedPrompt], folders: Folders, settings: Settings, folder: Path) -> list[Metrics]:
    folder.mkdir(exist_ok=True)
    return ours.train(ours.offline_recipe(rows, *folders, settings, folder), folder / "run")


def assert_equal_to_trl(rows: list[FixedPrompt], folders: Folders, settings: Settings, folder: Path) -> None:
    mine = train_here(rows, folders, settings, folder)
    theirs = trl_offline.train(rows, *folders, settings, folder)
    assert_parity(mine, theirs, steps=settings.num_steps)
    assert [step["num_tokens"] for step in mine] == [step["num_tokens"] for step in theirs]


@pytest.mark.parametrize("micro_batch_size", [8, 4])
@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge", "ipo"])
def test_every_step_equals_trl(
    loss_type: str, micro_batch_size: int, rows: list[FixedPrompt], folders: Folders, tmp_path: Path
) -> None:
    assert_equal_to_trl(rows, folders, Settings(loss_type=loss_type, micro_batch_size=micro_batch_size), tmp_path)


@pytest.mark.parametrize("settings", PARAMETERS)
def test_every_step_of_every_loss_equals_trl(
    settings: Settings, rows: list[FixedPrompt], folders: Folders, tmp_path: Path
) -> None:
    assert_equal_to_trl(rows, folders, settings, tmp_path)


def test_no_loss_of_trl_is_left_out() -> None:
    """Read from its code, so that a release with another loss is noticed."""
    known = set(re.findall(r'loss_type == "(\w+)"', inspect.getsource(DPOTrainer)))
    compared = {name for settings in LOSSES.values() for name in as_list(settings.loss_type)}
    assert len(known) >= 15
    assert known == compared | {"sigmoid", "hinge", "ipo"}


@pytest.mark.parametrize("loss_type", ["aot", "aot_unpaired"])
def test_sorted_losses_do_not_depend_on_the_micro_batch_as_those_of_trl_do(
    loss_type: str, rows: list[FixedPrompt], folders: Folders, tmp_path: Path
) -> None:
    """TRL sorts within a micro-batch of one device, so accumulation changes what is minimised; here it does not."""
    whole = Settings(loss_type=loss_type, num_steps=2)
    cut = replace(whole, micro_batch_size=2)
    mine, mine_cut = (train_here(rows, folders, settings, tmp_path / name) for name, settings in named(whole, cut))
    theirs, theirs_cut = (
        trl_offline.train(rows, *folders, settings, tmp_path / name) for name, settings in named(whole, cut)
    )
    assert_parity(mine, theirs, steps=2)
    assert_parity(mine_cut, theirs, steps=2)
    assert excess(theirs_cut[0]["loss"], theirs[0]["loss"]) > 10
    assert excess(theirs_cut[0]["grad_norm"], theirs[0]["grad_norm"]) > 100


def test_label_smoothing_of_the_sigmoid_loss_is_heard_here_and_ignored_by_trl(
    rows: list[FixedPrompt], folders: Folders, tmp_path: Path
) -> None:
    plain = Settings(num_steps=1)
    smoothed = replace(plain, label_smoothing=0.2)
    mine, mine_smoothed = (train_here(rows, folders, s, tmp_path / name)[0] for name, s in named(plain, smoothed))
    theirs = trl_offline.train(rows, *folders, smoothed, tmp_path)[0]
    assert excess(mine["grad_norm"], theirs["grad_norm"]) <= 1
    # With nearly equal models the gradient is (1 - 2 * 0.2) of the plain one.
    assert mine_smoothed["grad_norm"] == pytest.approx(0.6 * mine["grad_norm"], rel=0.02)


def test_a_beta_for_each_epoch_equals_trl(rows: list[FixedPrompt], folders: Folders, tmp_path: Path) -> None:
    """Three steps an epoch. TRL has the list in its online trainer only, so its offline one is lent the rule."""
    few, settings = rows[:24], Settings(beta=(0.1, 0.04))
    mine = train_here(few, folders, settings, tmp_path)
    theirs = trl_offline.train(few, *folders, settings, tmp_path, trainer_class=trl_offline.BetaOfEpoch)
    assert [step["beta"] for step in mine] == [0.1] * 3 + [0.04] * 3
    assert_parity(mine, theirs, steps=settings.num_steps)


def test_trl_does_not_get_beyond_the_first_step_with_a_list_of_betas(
    rows: list[FixedPrompt], folders: Folders, tmp_path: Path
) -> None:
    """Its epoch is a fraction, with which no list can be indexed."""
    with pytest.raises(TypeError, match="list indices must be integers"):
        trl_online.train(rows, *folders, Settings(beta=(0.3, 0.1)), tmp_path)


def test_the_entry_point_on_a_preference_file_equals_trl(
    rows: list[FixedPrompt], folders: Folders, tmp_path: Path
) -> None:
    settings = Settings(loss_type="ipo")
    recipe = ours.offline_recipe(rows, *folders, settings, tmp_path)
    theirs = trl_offline.train(rows, *folders, settings, tmp_path)
    assert_parity(ours.run_entry_point(recipe, tmp_path / "run"), theirs, steps=settings.num_steps)
