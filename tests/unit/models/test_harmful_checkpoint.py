"""A checkpoint from somebody else runs no code: neither on a resume, nor as a model to start from, nor converted."""

from __future__ import annotations

import io
import os
import pickle
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rlxf.assembly.roles import build_actor
from rlxf.checkpointing.manifest import find_problems, write_manifest
from rlxf.checkpointing.resume import find_resume
from rlxf.config.load import load_config
from rlxf.config.schema import RunConfig
from rlxf.core.errors import CheckpointError, ModelError, RlxfError
from rlxf.models.hf_folder import load_hf_config
from rlxf.models.megatron.dist_folder import open_weights
from rlxf.platform import Process, get_platform
from rlxf.update.actor import MegatronActor
from tests.stored import StoredRun, unpack
from tests.unit.tools.convert.helpers import back

FILES = [".metadata", "common.pt", "__0_0.distcp", "__0_1.distcp", "metadata.json", "layout.json", "driver.json"]


class Harm:
    """Makes a file when it is unpickled without care."""

    def __init__(self, canary: Path) -> None:
        self._canary = canary

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self._canary}",)


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    return tmp_path / "canary"


@pytest.fixture
def stored(tmp_path: Path) -> StoredRun:
    return unpack(tmp_path / "stored")


def recipe(stored: StoredRun) -> RunConfig:
    return load_config({"runtime": "local", **stored.recipe})


@pytest.fixture(scope="module")
def actor(tmp_path_factory: pytest.TempPathFactory) -> MegatronActor:
    """Only its shape matters."""
    config = recipe(unpack(tmp_path_factory.mktemp("actor") / "stored"))
    return build_actor(config, get_platform("cpu", cpu_linear="mkl"), Process())


def resume(stored: StoredRun, actor: MegatronActor) -> None:
    found = find_resume(recipe(stored), stored.folder / "run")
    assert found is not None
    actor.load_checkpoint(found.folder)


def zipped(content: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def fit_manifest(checkpoint: Path) -> None:
    """The damage check passes again."""
    write_manifest(checkpoint)
    assert find_problems(checkpoint) == []


def index_of(checkpoint: Path) -> Any:
    return pickle.loads((checkpoint / ".metadata").read_bytes())


def plant_entry(checkpoint: Path, name: str, content: bytes) -> str:
    """Put ``content`` where the checkpoint's index finds its entry ``name``; the file that holds it."""
    metadata = index_of(checkpoint)
    place, found = next((place, found) for place, found in metadata.storage_data.items() if place.fqn == name)
    path = checkpoint / found.relative_path
    offset = path.stat().st_size
    with path.open("ab") as file:
        file.write(content)
    metadata.storage_data[place] = replace(found, offset=offset, length=len(content))
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))
    return path.name


def test_the_canary_of_these_tests_sings(canary: Path) -> None:
    pickle.loads(pickle.dumps(Harm(canary)))
    assert canary.exists()


def test_an_untouched_checkpoint_is_loaded(stored: StoredRun, actor: MegatronActor) -> None:
    fit_manifest(stored.checkpoint)
    resume(stored, actor)


@pytest.mark.parametrize("form", [pickle.dumps, zipped], ids=["pickle", "torch.save"])
@pytest.mark.parametrize("name", FILES)
def test_a_harmful_pickle_in_place_of_a_file_is_refused_by_name(
    stored: StoredRun, actor: MegatronActor, canary: Path, name: str, form: Callable[[Any], bytes]
) -> None:
    (stored.checkpoint / name).write_bytes(form(Harm(canary)))
    fit_manifest(stored.checkpoint)
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        resume(stored, actor)
    assert not canary.exists()


def test_a_harmful_manifest_is_refused_by_name(stored: StoredRun, actor: MegatronActor, canary: Path) -> None:
    (stored.checkpoint / "manifest.json").write_bytes(pickle.dumps(Harm(canary)))
    with pytest.raises(CheckpointError, match=r"manifest\.json"):
        resume(stored, actor)
    assert not canary.exists()


@pytest.mark.parametrize("field", ["planner_data", "storage_meta", "state_dict_metadata"])
def test_harm_inside_an_index_is_refused(stored: StoredRun, actor: MegatronActor, canary: Path, field: str) -> None:
    metadata = index_of(stored.checkpoint)
    setattr(metadata, field, {"x": Harm(canary)})
    (stored.checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))
    fit_manifest(stored.checkpoint)
    with pytest.raises(CheckpointError, match=r"\.metadata.*asks for posix\.system"):
        resume(stored, actor)
    assert not canary.exists()


def test_harm_among_the_common_values_is_refused(stored: StoredRun, actor: MegatronActor, canary: Path) -> None:
    path = stored.checkpoint / "common.pt"
    torch.save({**torch.load(path, weights_only=True), "more": [Harm(canary)]}, path)
    fit_manifest(stored.checkpoint)
    with pytest.raises(CheckpointError, match=r"common\.pt.*asks for posix\.system"):
        resume(stored, actor)
    assert not canary.exists()


def entries(checkpoint: Path) -> list[str]:
    """One entry of each kind: random states, an empty extra state, parameters and optimizer state."""
    names = sorted(index_of(checkpoint).state_dict_metadata)
    kinds = ("rng", "_extra_state", "embedding", "exp_avg_sq")
    return [next(name for name in names if kind in name) for kind in kinds]


@pytest.mark.parametrize("form", [pickle.dumps, zipped], ids=["pickle", "torch.save"])
@pytest.mark.parametrize("number", range(4))
def test_harm_in_an_entry_of_a_file_is_refused_by_name(
    stored: StoredRun, actor: MegatronActor, canary: Path, number: int, form: Callable[[Any], bytes]
) -> None:
    """The rest of the file is whole, and the index fits it."""
    name = entries(stored.checkpoint)[number]
    file = plant_entry(stored.checkpoint, name, form([Harm(canary)]))
    fit_manifest(stored.checkpoint)
    with pytest.raises(CheckpointError, match=rf"{file}: {name}"):
        resume(stored, actor)
    assert not canary.exists()


def test_a_second_index_for_this_rank_is_not_read(stored: StoredRun, actor: MegatronActor, canary: Path) -> None:
    """torch falls back to it where the first cannot be read; this first one is a valid object with a wrong field."""
    metadata = index_of(stored.checkpoint)
    metadata.storage_meta = "neither None nor an object"
    (stored.checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))
    (stored.checkpoint / "__0.metadata").write_bytes(pickle.dumps(Harm(canary)))
    fit_manifest(stored.checkpoint)
    with suppress(CheckpointError):
        resume(stored, actor)
    assert not canary.exists()


@pytest.mark.parametrize("place", ["../outside.distcp", "/outside.distcp"])
def test_an_index_leads_to_no_file_outside(stored: StoredRun, actor: MegatronActor, place: str) -> None:
    metadata = index_of(stored.checkpoint)
    shutil.copy(stored.checkpoint / "__0_0.distcp", stored.checkpoint.parent / "outside.distcp")
    for index, found in metadata.storage_data.items():
        if found.relative_path == "__0_0.distcp":
            metadata.storage_data[index] = replace(found, relative_path=place)
    (stored.checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))
    fit_manifest(stored.checkpoint)
    with pytest.raises(CheckpointError, match=rf"\.metadata.*{place}.*outside"):
        resume(stored, actor)


def test_another_format_is_refused_by_name(stored: StoredRun, actor: MegatronActor) -> None:
    """Megatron would import the reader of the format that the file names."""
    path = stored.checkpoint / "metadata.json"
    path.write_text(path.read_text().replace("torch_dist", "zarr"))
    fit_manifest(stored.checkpoint)
    with pytest.raises(CheckpointError, match=r"metadata\.json.*zarr.*torch_dist"):
        resume(stored, actor)


@pytest.mark.parametrize("form", [pickle.dumps, zipped], ids=["pickle", "torch.save"])
@pytest.mark.parametrize("name", [*FILES, "manifest.json"])
def test_no_file_of_a_checkpoint_runs_code_when_it_is_a_model_to_start_from(
    stored: StoredRun, canary: Path, name: str, form: Callable[[Any], bytes]
) -> None:
    (stored.checkpoint / name).write_bytes(form(Harm(canary)))
    if name != "manifest.json":
        fit_manifest(stored.checkpoint)
    for read in (_as_model, _converted):
        said = _refusal(read, stored)
        assert said is None or name in said
        assert not canary.exists()


def _refusal(read: Callable[[StoredRun], None], stored: StoredRun) -> str | None:
    """What it says when it refuses; None when the file is not needed, and all is read."""
    try:
        read(stored)
    except RlxfError as error:
        return str(error)
    return None


def _as_model(stored: StoredRun) -> None:
    weights = open_weights(stored.checkpoint, load_hf_config(stored.folder / "policy"))
    for name in weights.names():
        weights.read(name)


def _converted(stored: StoredRun) -> None:
    back(stored.checkpoint, stored.folder / "converted", "--hf-cfg-dir", str(stored.folder / "policy"))


def test_harm_in_a_tensor_is_refused_when_it_is_a_model_to_start_from(stored: StoredRun, canary: Path) -> None:
    file = plant_entry(stored.checkpoint, "embedding.word_embeddings.weight", zipped([Harm(canary)]))
    fit_manifest(stored.checkpoint)
    for read in (_as_model, _converted):
        with pytest.raises(ModelError, match=rf"{file}: embedding\.word_embeddings\.weight"):
            read(stored)
        assert not canary.exists()
