"""What README and docs point to exists: files, headings, recipes, scripts, and the numbers that a run can report."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

from rlxf.assembly.roles import objective_settings
from rlxf.config.schema import RunConfig
from rlxf.update import OBJECTIVES
from rlxf.update.objective import ObjectiveContext
from tests.runs.test_artefacts import EVAL_NAMES, STEP_NAMES  # what a whole online run is held to
from workers import cli

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), ROOT / "benchmarks" / "README.md"]
# Of scripts that are thin: convert_ckpt.py, report.py, watch.py.
OPTIONS = ("rlxf/tools/convert/command.py", "rlxf/report/command.py", "rlxf/report/watch.py")
COMMANDS = "".join((ROOT / path).read_text(encoding="utf-8") for path in OPTIONS)
USERS_OWN = re.compile(r"_mine(\.yaml)?$")  # recipes that a reader is told to write


def prose(text: str) -> str:
    """Without fenced code, in which brackets are no links and # is no heading."""
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """Of the headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", prose(page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def broken_links(page: Path, text: str) -> list[str]:
    found = []
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(text)):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            found.append(link)
    return found


def missing_recipes(text: str) -> list[str]:
    folder = ROOT / "configs" / "rlxf"
    names = re.findall(r"--config-name[ =](\w+)", text) + re.findall(r"\b((?:\w+_)?trainer_[a-z]\w*)", text)
    return [name for name in names if not USERS_OWN.search(name) and not (folder / f"{name}.yaml").is_file()]


def written_out(name: str) -> list[str]:
    """``a_{b,c}.sh`` as ``a_b.sh`` and ``a_c.sh``."""
    head, _, rest = name.partition("{")
    inner, _, tail = rest.partition("}")
    return [f"{head}{part}{tail}" for part in inner.split(",")]


def missing_files(text: str) -> list[str]:
    """Scripts, benchmarks, sources and tests that a page names from the repository's root."""
    pattern = (
        r"(?<![\w/.-])(?:\./)?((?:scripts|benchmarks|rlxf|workers|tests|configs|examples)/(?:[\w./-]|{[\w,]+})*\w)"
    )
    names = [name for found in re.findall(pattern, text) for name in written_out(found)]
    return [name for name in names if not USERS_OWN.search(name) and not (ROOT / name).exists()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_names_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert broken_links(page, text) == []
    assert missing_recipes(text) == []
    assert missing_files(text) == []


def test_what_does_not_exist_is_found() -> None:
    page = ROOT / "docs" / "data.md"
    assert broken_links(page, "[a](gone.md) [b](#no-such-heading) [c](lora.md#nowhere)") == [
        "gone.md",
        "#no-such-heading",
        "lora.md#nowhere",
    ]
    assert missing_recipes("python ray_gpt.py --config-name sft_trainer_gone") == ["sft_trainer_gone"] * 2
    assert missing_files("`scripts/{test,gone}.sh`, ./benchmarks/no.py") == [
        "scripts/gone.sh",
        "benchmarks/no.py",
    ]


def commands(text: str, program: str) -> list[list[str]]:
    """The arguments of every call of ``program`` in the shell blocks of a page."""
    found = []
    for block in re.findall(r"^```bash\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            _, called, arguments = line.partition(f"{program} ")
            if called and not line.startswith("#"):
                found.append([word for word in shlex.split(arguments, comments=True) if word not in ("&&", "...")])
    return found


def test_a_command_is_read_over_its_lines() -> None:
    page = "```bash\n# python ray_gpt.py no=1\nA=1 python ray_gpt.py -cn x \\\n    'a.b=[1, 2]'   # why\n```\n"
    assert commands(page, "ray_gpt.py") == [["-cn", "x", "a.b=[1, 2]"]]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_tells_to_type_is_understood(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for arguments in commands(text, "ray_gpt.py") + commands(text, "rlxf train"):
        assert cli.read_command(arguments).problems == []
    for script in (ROOT / "scripts").glob("*.py"):
        source = script.read_text(encoding="utf-8") + COMMANDS
        flags = {word for words in commands(text, script.name) for word in words if word.startswith("--")}
        assert [flag for flag in sorted(flags) if f'"{flag}"' not in source] == []


def metric_names() -> set[str]:
    """Every name of the first column of docs/metrics.md, with ``{a,b}`` written out."""
    names: set[str] = set()
    for line in (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8").splitlines():
        if line.startswith("| "):
            for name in re.findall(r"`([^`]+)`", line.split("|")[1]):
                names |= set(written_out(name))
    return names


def recipe(stage: str) -> RunConfig:
    model = {"num_layers": 1, "hidden_size": 8, "ffn_hidden_size": 8, "num_attention_heads": 1, "vocab_size": 8}
    values: dict[str, Any] = {
        "training": {"stage": stage},
        "model": {"tiny": {**model, "max_position_embeddings": 8}},
        "actor_rollout": {"model": "tiny"},
        "ref": {"model": "tiny"},
        "reward": {"model": "tiny"},
    }
    return RunConfig.model_validate(values)


@pytest.mark.parametrize("stage", ["sft", "rm", "dpo", "ray_online_dpo"])
def test_every_number_of_an_objective_is_explained(stage: str) -> None:
    context = ObjectiveContext(model=None, limits=None)  # type: ignore[arg-type]  # names need no model
    config = recipe(stage)
    objective = OBJECTIVES[config.objective](objective_settings(config), context)
    sums, maxima = torch.ones(len(objective.sums), dtype=torch.float64), torch.ones(len(objective.maxima))
    reported = set(objective.metrics(sums, maxima))
    assert reported
    assert reported <= metric_names()


def test_every_number_of_a_run_is_explained() -> None:
    of_sources = {
        name: name.replace("/reward/", "/<name>/") for name in STEP_NAMES if name.startswith("rewards/reward/")
    }
    assert len(of_sources) == 3
    assert metric_names() >= {of_sources.get(name, name) for name in STEP_NAMES} | EVAL_NAMES


def test_the_findings_name_tests_that_exist() -> None:
    """A row says which test holds it: the file, then its tests."""
    rows = (ROOT / "docs" / "findings.md").read_text(encoding="utf-8").splitlines()
    named = 0
    for row in rows:
        for path, names in re.findall(r"`(tests/[\w/]+\.py)`((?:[:,] `test_\w+`)*)", row):
            text = (ROOT / path).read_text(encoding="utf-8")
            for name in re.findall(r"test_\w+", names):
                named += 1
                assert f"def {name}(" in text, name
    assert named >= 12
