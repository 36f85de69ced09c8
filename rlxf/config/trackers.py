"""Whether the trackers that a recipe asks for are installed: found out before any model is loaded."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec

from rlxf.config.kinds import Tracker
from rlxf.config.problems import Problem
from rlxf.config.schema import RunConfig

# Module that a tracker needs, and the package that has it.
PACKAGES: dict[Tracker, tuple[str, str]] = {
    "tensorboard": ("tensorboard", "tensorboard"),
    "wandb": ("wandb", "wandb"),
    "mlflow": ("mlflow", "mlflow-skinny"),
    "swanlab": ("swanlab", "swanlab"),
}


def tracker_problems(config: RunConfig) -> Iterator[Problem]:
    """Each tracker whose package is missing here; a dry run may be about another machine."""
    for name in () if config.dry_run else dict.fromkeys(config.log.report_to):
        module, package = PACKAGES[name]
        if find_spec(module) is None:
            text = f"log.report_to = {name}: the package is not installed; pip install {package}, or leave {name} out"
            yield Problem(("log.report_to",), text)
