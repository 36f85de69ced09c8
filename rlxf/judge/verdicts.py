"""Verdicts on disk: one JSON object per line, synced as they come, so that no question is asked or paid for twice."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import math
import os
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from rlxf.core.disk import explain
from rlxf.core.errors import ConfigError
from rlxf.core.events import event
from rlxf.core.files import fsync, make_folder
from rlxf.judge.judge import Usage, Verdict

if TYPE_CHECKING:
    from rlxf.core.types import Text

log = logging.getLogger(__name__)

NAME = "verdicts.jsonl"  # in the run folder, or beside the checkpoints
_LONGEST_REPLY = 2000  # characters of a judge's text that are kept


@dataclass(slots=True)
class Spent:
    """What the verdicts of one judge took, in this run and in the runs that wrote the file before."""

    calls: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0

    def add(self, usage: Usage) -> None:
        self.calls += 1
        self.prompt_tokens += usage.prompt_tokens
        self.completion_tokens += usage.completion_tokens


def judge_digest(identity: Mapping[str, Any]) -> str:
    """A short name of a judge: another one for another model, template, function or option."""
    return _digest(dict(identity))[:16]


def question_key(judge: str, prompt: Text, first: str, second: str, columns: Mapping[str, Any] | None = None) -> str:
    """The name of a question: of its content and its judge. The two orders of a pair have different names."""
    return _digest([judge, prompt, first, second, columns or {}])[:32]


def _digest(content: Any) -> str:
    text = json.dumps(content, sort_keys=True, ensure_ascii=True, default=repr)
    return hashlib.sha256(text.encode()).hexdigest()


class VerdictStore:
    """The verdicts of one judge, in a file that several judges and runs may share.

    A line: ``{"judge", "key", "first_better": 0.75 or null, "prompt_tokens", "completion_tokens", "reply"}``; the last
    three stand there only if the judge is a service. A line that a killed process did not finish is cut off.

    Args:
        path: the file; it is made with the first verdict.
        judge: of ``judge_digest``.

    Raises:
        ConfigError: the file cannot be read or written.
    """

    def __init__(self, path: Path, judge: str) -> None:
        self.path = path
        self.spent = Spent()
        self._judge = judge
        self._known: dict[str, float] = {}
        self._file: int | None = None
        self._waiting: deque[bytes] = deque()  # lines that the disk did not take
        self._whole = True  # the file does not end in a part of a line of ours
        self._full = False  # the disk, and it has been told
        try:
            self._load()
        except OSError as error:
            raise ConfigError(f"{path}: the file of verdicts cannot be read: {error.strerror}") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self._known)

    def get(self, key: str) -> float | None:
        """The probability that the first answer is better, NaN for a verdict that the judge could not give.

        None if the question was never asked.
        """
        return self._known.get(key)

    def add(self, verdicts: Sequence[tuple[str, Verdict]]) -> None:
        """Keep verdicts by the keys of their questions; they are on disk when this returns.

        If the disk is full, a warning tells it, and they are written with the next ones.

        Raises:
            ConfigError: the file cannot be opened.
        """
        if not verdicts:
            return
        self._waiting.extend(self._line(key, verdict) for key, verdict in verdicts)
        try:
            self._open()
        except OSError as error:
            self._waiting.clear()
            raise ConfigError(f"{self.path}: a verdict cannot be written: {error.strerror}") from error
        self._put()
        for key, verdict in verdicts:
            self._known[key] = verdict.probability
            if verdict.usage is not None:
                self.spent.add(verdict.usage)

    def close(self) -> None:
        """Write what waits, and close the file. A later ``add`` opens it again."""
        self._put()
        if self._waiting:
            log.warning("%s: %d verdicts could not be written; they will be asked for again", self.path,
                        len(self._waiting))  # fmt: skip
            self._waiting.clear()
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _line(self, key: str, verdict: Verdict) -> bytes:
        known = math.isfinite(verdict.probability)
        row: dict[str, Any] = {"judge": self._judge, "key": key, "first_better": verdict.probability if known else None}
        if verdict.usage is not None:
            row |= {
                "prompt_tokens": verdict.usage.prompt_tokens,
                "completion_tokens": verdict.usage.completion_tokens,
            }
        if verdict.reply is not None:
            row["reply"] = verdict.reply[:_LONGEST_REPLY]
        return json.dumps(row, ensure_ascii=True).encode() + b"\n"

    def _open(self) -> None:
        if self._file is None:
            make_folder(self.path.parent)
            new = not self.path.exists()
            self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            if new:
                fsync(self.path.parent)

    def _put(self) -> None:
        """Append what waits, as far as the disk takes it.

        What was written in part is cut off, unless another run has written behind it. Then it stays, as a line that is
        no verdict.
        """
        if self._file is None:
            return
        try:
            while self._waiting:
                line = self._waiting[0] if self._whole else b"\n" + self._waiting[0]
                written = os.write(self._file, line)
                if written < len(line):
                    self._take_back(self._file, written)
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                self._whole = True
                self._waiting.popleft()
            os.fsync(self._file)
        except OSError as error:
            if not self._full:
                words = "%s. The run goes on; verdicts are kept, and written when there is room"
                log.warning(words, explain(error, self.path, "judge.verdicts"), extra=event("disk", who=self.path.name))
            self._full = True
        else:
            self._full = False

    def _take_back(self, file: int, num_bytes: int) -> None:
        end = os.lseek(file, 0, os.SEEK_CUR)
        if os.fstat(file).st_size == end:
            os.ftruncate(file, end - num_bytes)
        else:
            self._whole = False

    def _load(self) -> None:
        if not self.path.exists():
            return
        whole = 0
        with self.path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.endswith(b"\n"):
                    break
                whole += len(line)
                self._take(line, number)
        if whole < self.path.stat().st_size:
            os.truncate(self.path, whole)
            log.info("%s: the last line was cut off in the middle; its question will be asked again", self.path)

    def _take(self, line: bytes, number: int) -> None:
        try:
            row = json.loads(line)
            judge, key, found = str(row["judge"]), str(row["key"]), row["first_better"]
            probability = math.nan if found is None else float(found)
            usage = _usage(row)
        except (ValueError, KeyError, TypeError):
            log.warning("%s:%d: no verdict; the line is left out, and its question will be asked again",
                        self.path, number)  # fmt: skip
            return
        if judge == self._judge:
            self._known[key] = probability
            if usage is not None:
                self.spent.add(usage)


def _usage(row: Mapping[str, Any]) -> Usage | None:
    if "prompt_tokens" not in row:
        return None
    return Usage(prompt_tokens=int(row["prompt_tokens"]), completion_tokens=int(row["completion_tokens"]))
