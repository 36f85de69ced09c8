"""A judge's function in a process of its own, which is ended when it takes too long."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlxf.core.errors import ScoreError
from rlxf.core.files import file_digest
from rlxf.core.stop import Stop
from rlxf.core.types import Text
from rlxf.core.user_file import load_function
from rlxf.core.user_process import UserProcess
from rlxf.judge.function import SIGNATURE, FunctionJudge
from rlxf.judge.judge import Columns, Heard, Verdict, ignore

_Questions = tuple[Sequence[Text], Sequence[str], Sequence[str], dict[str, Sequence[Any]]]


def load_judge(path: Path) -> FunctionJudge:
    """``judge`` of a Python file, which is run for that.

    Raises:
        ConfigError: the file or the function is missing or wrong.
    """
    function = load_function(path, "judge", key="judge.function", signature=SIGNATURE, asynchronous=True)
    return FunctionJudge(function, path)


class ProcessJudge:
    """``FunctionJudge`` in a process of its own.

    Args:
        path: of its file.
        timeout_s: longest time of a call, in seconds.
        stop: ends a wait early when the user asked for it.

    Raises:
        ConfigError: the function cannot be loaded.
    """

    is_symmetric = False
    reads_columns = True

    def __init__(self, path: Path, *, timeout_s: float, stop: Stop) -> None:
        self.identity: Mapping[str, Any] = {"kind": "function", "content": file_digest(path)}
        self._process = UserProcess(
            partial(load_judge, path),
            f"judge.function={path}",
            workers=1,
            timeout_s=timeout_s,
            stop=stop,
            failed=ScoreError,
            limit="reward.timeout_s",
        )
        self._process.start()

    def compare(
        self,
        prompts: Sequence[Text],
        first: Sequence[str],
        second: Sequence[str],
        columns: Columns,
        *,
        heard: Heard = ignore,
    ) -> Tensor:
        """[N] float32 probability that the first answer is better; NaN where the function returned None.

        Raises:
            ScoreError: the function failed, took too long, or ended its process.
        """
        (found,) = self._process.call(_compare, [(prompts, first, second, dict(columns))])
        heard({index: Verdict(probability=value) for index, value in enumerate(found)})
        return torch.tensor(found, dtype=torch.float32)

    def close(self) -> None:
        """End the process."""
        self._process.close()


def _compare(judge: FunctionJudge, questions: _Questions) -> list[float]:
    found: list[float] = judge.compare(*questions).tolist()
    return found
