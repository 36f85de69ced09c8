"""Checkpoints that a run of the reference wrote: read exactly, and without running what is in their pickles."""

from __future__ import annotations

import fractions
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.enums import ModelType

from rlxf.core.errors import ModelError
from tests.tiny_models import save_causal_lm, save_reward_model
from tests.unit.tools.convert.helpers import assert_same_tensors, back, run
from tests.unit.tools.convert.reference_layout import write_checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_causal_lm(tmp_path_factory.mktemp("hf") / "model", "llama", num_hidden_layers=4)


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (1, 4), (2, 2)])
def test_a_checkpoint_of_the_reference_becomes_the_hugging_face_model(
    folder: Path, tmp_path: Path, tp: int, pp: int
) -> None:
    write_checkpoint(folder, tmp_path / "mg", tp=tp, pp=pp, rows=384)
    assert_same_tensors(back(tmp_path / "mg", tmp_path / "hf", "--hf-cfg-dir", str(folder)), folder)
    one = tmp_path / "mg" / "iter_0000120"
    assert_same_tensors(back(one, tmp_path / "one", "--hf-cfg-dir", str(folder)), folder)


def test_a_release_is_found_through_the_tracker(folder: Path, tmp_path: Path) -> None:
    root = write_checkpoint(folder, tmp_path / "mg", tp=1, pp=1, rows=259)
    (root / "iter_0000120").rename(root / "release")
    (root / "latest_checkpointed_iteration.txt").write_text("release")
    assert_same_tensors(back(root, tmp_path / "hf", "--hf-cfg-dir", str(folder)), folder)


@pytest.mark.parametrize("tp", [1, 2])
def test_a_reward_head_is_read_and_its_bias_is_not_lost_in_silence(tmp_path: Path, tp: int) -> None:
    folder = save_reward_model(tmp_path / "rm", "llama", num_hidden_layers=4)
    write_checkpoint(folder, tmp_path / "mg", tp=tp, pp=2, rows=260, reward_bias=0.25)
    said = run(tmp_path / "mg", tmp_path / "hf", "--orm", "--hf-cfg-dir", str(folder), kinds=("mg", "hf"))
    assert_same_tensors(tmp_path / "hf", folder)
    assert "rm_head.bias = [0.25]" in said[0]


def test_the_original_folder_as_save_dir_gets_mg2hg_as_in_the_reference(folder: Path, tmp_path: Path) -> None:
    write_checkpoint(folder, tmp_path / "mg", tp=2, pp=1, rows=260)
    shutil.copytree(folder, tmp_path / "hf")
    back(tmp_path / "mg", tmp_path / "hf")
    assert_same_tensors(tmp_path / "hf" / "mg2hg", folder)


class Payload:
    """Runs a command when a pickle of it is loaded without care."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.mark}",)


@pytest.mark.parametrize("flags", [(), ("--trust-pickle",)])
def test_a_pickle_that_runs_a_command_is_refused_by_name_and_runs_nothing(
    folder: Path, tmp_path: Path, flags: tuple[str, ...]
) -> None:
    mark = tmp_path / "mark"
    write_checkpoint(folder, tmp_path / "mg", tp=1, pp=1, rows=259, more=Payload(mark))
    with pytest.raises(ModelError, match=r"posix\.system"):
        back(tmp_path / "mg", tmp_path / "hf", "--hf-cfg-dir", str(folder), *flags)
    assert not mark.exists()
    assert not (tmp_path / "hf").exists()


def test_a_class_that_is_no_tensor_needs_trust(folder: Path, tmp_path: Path) -> None:
    write_checkpoint(folder, tmp_path / "mg", tp=1, pp=1, rows=259, share=fractions.Fraction(1, 3))
    flags = ("--hf-cfg-dir", str(folder))
    with pytest.raises(ModelError, match=r"asks for fractions\.Fraction.*Add --trust-pickle"):
        back(tmp_path / "mg", tmp_path / "hf", *flags)
    assert_same_tensors(back(tmp_path / "mg", tmp_path / "hf", *flags, "--trust-pickle"), folder)


def test_settings_of_the_training_program_need_no_trust_and_are_not_imported(folder: Path, tmp_path: Path) -> None:
    write_checkpoint(folder, tmp_path / "mg", tp=1, pp=1, rows=259, kind=ModelType.encoder_or_decoder)
    assert_same_tensors(back(tmp_path / "mg", tmp_path / "hf", "--hf-cfg-dir", str(folder)), folder)


def test_a_file_of_an_old_torch_is_read_with_the_same_care(folder: Path, tmp_path: Path) -> None:
    root = write_checkpoint(folder, tmp_path / "mg", tp=1, pp=1, rows=259)
    path = next(root.rglob("model_optim_rng.pt"))
    state = torch.load(path, weights_only=False)
    torch.save(state, path, _use_new_zipfile_serialization=False)
    flags = ("--hf-cfg-dir", str(folder))
    assert_same_tensors(back(root, tmp_path / "hf", *flags), folder)
    torch.save(state | {"share": fractions.Fraction(1, 3)}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(ModelError, match=r"asks for fractions\.Fraction"):
        back(root, tmp_path / "again", *flags)
    assert_same_tensors(back(root, tmp_path / "trusted", *flags, "--trust-pickle"), folder)
