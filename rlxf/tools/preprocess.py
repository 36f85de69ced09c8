"""The preprocessing, whose command is `scripts/preprocess_data.py`: a data file to Megatron's indexed token files."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rlxf.core.errors import ConfigError, DataError, StageTimeout, WorkerLost
from rlxf.core.jsonl import RowProblems
from rlxf.core.waiting import own_children
from rlxf.core.words import nearest
from rlxf.data.batches import DropReason
from rlxf.data.encoders import ChatEncoder, Encoder, Ids, TextEncoder
from rlxf.data.handlers import Columns, Handler, find_handler
from rlxf.data.hub import open_input
from rlxf.data.indexed import IndexedWriter, packed_name
from rlxf.data.packing import pack
from rlxf.data.readers import RowFile
from rlxf.data.templates import Template, chat_template
from rlxf.models.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHUNK_ROWS = 1024  # rows that a worker tokenizes at a time; every call of the tokenizer costs as much as tens of rows
LIMIT_S = 1800.0  # longest time that a worker may take for them
ANY_NUMBER = 2**62
Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """The flags of the command, their names with underscores."""

    input: str
    tokenizer_name_or_path: str
    output_prefix: str
    handler_name: str = "GeneralPretrainHandler"
    prompt_type: str | None = None  # None: the tokenizer's own template
    map_keys: Mapping[str, Any] = field(default_factory=dict)
    json_keys: tuple[str, ...] = ("text",)
    dataset_additional_keys: tuple[str, ...] = ()
    seq_length: int | None = None  # tokens; longer rows are left out
    append_eod: bool = False
    pack: bool = False
    neat_pack: bool = False
    workers: int = 1
    log_interval: int = 100  # rows
    max_samples: int | None = None
    max_bad_rows: int | None = None  # None: one in a hundred
    streaming: bool = False
    cache_dir: str | None = None


@dataclass(slots=True)
class Summary:
    """The result of a preprocessing."""

    num_rows: int  # looked at
    num_written: int = 0  # rows of the files
    num_tokens: int = 0  # of the first key
    num_bad: int = 0
    dropped: Counter[str] = field(default_factory=Counter)  # valid rows that were left out, by reason
    bad_rows: tuple[str, ...] = ()  # the first of them with place and reason
    files: tuple[str, ...] = ()  # without .bin and .idx


def preprocess(options: Options, say: Say) -> Summary:
    """Write the files of a handler; when anything is wrong, none of them.

    Rows keep their order, and the files are the same for any number of workers.

    Raises:
        ConfigError: flags that do not go together, or unknown names.
        DataError: the input cannot be read, has too many bad rows, or nothing is left of it.
        WorkerLost, StageTimeout: a worker process died, or did not answer.
    """
    handler = find_handler(options.handler_name)
    columns = Columns(handler, options.map_keys)
    _check(options, handler)
    template = None if options.prompt_type is None else chat_template(options.prompt_type)
    tokenizer = load_tokenizer(options.tokenizer_name_or_path)
    encoder = make_encoder(options, columns, tokenizer, template, say)
    problems = RowProblems(ANY_NUMBER, "--max-bad-rows")
    rows = open_input(
        options.input,
        problems,
        streaming=options.streaming,
        max_samples=options.max_samples,
        cache_dir=options.cache_dir,
    )
    work = _Work(options, rows, encoder, problems, say)
    _require_columns(options, columns, rows)
    made = work.rows()
    if options.pack:
        assert options.seq_length is not None  # checked above
        pad_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        made = pack(made, options.seq_length, pad_id=pad_id, neat=options.neat_pack)
    summary = work.summary
    names = {key: _name(options.output_prefix, key, handler) for key in encoder.keys}
    with IndexedWriter(names) as writer:
        for ids in made:
            writer.add(ids)
            summary.num_written += 1
            summary.num_tokens += len(ids[encoder.keys[0]])
        work.require_some()
    summary.bad_rows, summary.files = tuple(problems.report()), tuple(names.values())
    return summary


class _Work:
    """The rows of the input, tokenized in order by this process or by others."""

    def __init__(self, options: Options, rows: RowFile, encoder: Encoder, problems: RowProblems, say: Say) -> None:
        self._options, self._file, self._encoder, self._problems, self._say = options, rows, encoder, problems, say
        num_rows = min(len(rows), options.max_samples or len(rows))
        problems.allowed = num_rows // 100 if options.max_bad_rows is None else options.max_bad_rows
        problems.raise_any(0)  # those that were found on opening are counted by now
        self.summary = Summary(num_rows, num_bad=problems.total)

    def rows(self) -> Iterator[Ids]:
        """The token ids of all rows that give some, in order.

        Raises:
            DataError: too many bad rows.
        """
        begin, done = time.perf_counter(), 0
        for chunk, results in self._chunks():
            for row, result in zip(chunk, results, strict=True):
                done += 1
                if done % self._options.log_interval == 0:
                    self._say(f"{done} rows, {done / (time.perf_counter() - begin):.0f} rows/s")
                if isinstance(result, DropReason):
                    self._drop(row, result)
                elif self._fits(result):
                    yield result

    def require_some(self) -> None:
        """Raises DataError: no row is left."""
        if not self.summary.num_written:
            dropped = self.summary.dropped
            reasons = [*self._problems.report(), *(f"{count} rows: {reason}" for reason, count in dropped.items())]
            raise DataError(f"{self._file.path}: no row is left of {self.summary.num_rows}", *reasons)

    def _drop(self, row: int, drop: DropReason) -> None:
        if not drop.is_error:
            self.summary.dropped[drop.reason] += 1
            return
        self.summary.num_bad += 1
        if not self._problems.add(self._file.where(row), drop.reason):
            self._problems.raise_any(0)

    def _fits(self, ids: Ids) -> bool:
        limit = self._options.seq_length
        if limit is None or max(len(value) for value in ids.values()) <= limit:
            return True
        self.summary.dropped[f"it is longer than --seq-length {limit}"] += 1
        return False

    def _chunks(self) -> Iterator[tuple[list[int], list[Ids | DropReason]]]:
        """Row numbers and what became of them."""
        good = [row for row in range(self.summary.num_rows) if row not in self._file.bad]
        chunks = [good[start : start + CHUNK_ROWS] for start in range(0, len(good), CHUNK_ROWS)]
        workers = min(self._options.workers, len(chunks))
        if workers > 1:
            yield from self._in_processes(chunks, workers)
            return
        for chunk in chunks:
            yield chunk, _encode(self._encoder, self._file, chunk)

    def _in_processes(
        self, chunks: Sequence[list[int]], workers: int
    ) -> Iterator[tuple[list[int], list[Ids | DropReason]]]:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread per worker; threads do not survive a fork
        pool = ProcessPoolExecutor(
            workers,
            multiprocessing.get_context("fork"),  # workers take over tokenizer and file without loading them again
            initializer=_set_up,
            initargs=(self._encoder, self._file),
        )
        waiting: deque[tuple[list[int], Future[list[Ids | DropReason]]]] = deque()
        done = False
        with own_children() as kill:
            try:
                for chunk in chunks:
                    waiting.append((chunk, pool.submit(_encode_here, chunk)))
                    if len(waiting) > 2 * workers:  # more would only wait in memory
                        first, future = waiting.popleft()
                        yield first, future.result(timeout=LIMIT_S)
                for first, future in waiting:
                    yield first, future.result(timeout=LIMIT_S)
                done = True
            except BrokenProcessPool as error:
                raise WorkerLost(
                    f"{self._file.path}: a worker process of the preprocessing died, perhaps for want of memory; "
                    f"use fewer than --workers {workers}"
                ) from error
            except FutureTimeout as error:
                raise StageTimeout(
                    f"{self._file.where(first[0])}: {len(first)} rows from here on were not tokenized within "
                    f"{LIMIT_S:g} s by one of --workers {workers}; --workers 1 has no such limit"
                ) from error
            finally:
                if not done:
                    kill()  # the pool waits for its workers
                pool.shutdown(cancel_futures=True)


_HERE: dict[str, Any] = {}  # what a worker process works with


def _set_up(encoder: Encoder, file: RowFile) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process; the one that writes ends the others
    _HERE.update(encoder=encoder, file=file)


def _encode_here(chunk: list[int]) -> list[Ids | DropReason]:
    return _encode(_HERE["encoder"], _HERE["file"], chunk)


def _encode(encoder: Encoder, file: RowFile, chunk: list[int]) -> list[Ids | DropReason]:
    return encoder([file[row] for row in chunk])


def _check(options: Options, handler: Handler) -> None:
    """Raises ConfigError: flags that do not go together."""
    problems = []
    if handler.makes == "text" and options.prompt_type is not None:
        problems.append(
            f"--prompt-type writes conversations, but {options.handler_name} takes whole texts; leave it out"
        )
    if options.neat_pack and not options.pack:
        problems.append("--neat-pack needs --pack; add --pack")
    if options.pack and handler.makes != "example":
        problems.append(
            f"--pack joins examples of supervised fine-tuning, but {options.handler_name} makes "
            f"{'whole texts' if handler.makes == 'text' else f'{handler.makes}s'}, which are never joined; leave it out"
        )
    if options.pack and options.seq_length is None:
        problems.append("--pack fills rows of --seq-length tokens; give --seq-length, too")
    if options.pack and options.dataset_additional_keys:
        problems.append("--dataset-additional-keys belong to one row each and cannot be packed; leave out one of them")
    if handler.makes == "text" and options.dataset_additional_keys:
        problems.append(f"{options.handler_name} takes its columns from --json-keys, not --dataset-additional-keys")
    taken = [key for key in options.dataset_additional_keys if key in handler.keys]
    if taken:
        problems.append(f"--dataset-additional-keys: {', '.join(taken)} is a key that {options.handler_name} writes")
    if problems:
        raise ConfigError(*problems)


def make_encoder(
    options: Options, columns: Columns, tokenizer: PreTrainedTokenizerBase, template: Template | None, say: Say
) -> Encoder:
    """What a worker does with rows; the tokenizer gets the template."""
    if options.append_eod and tokenizer.eos_token_id is None:
        raise ConfigError(f"--append-eod: the tokenizer {options.tokenizer_name_or_path} has no eos_token")
    if columns.handler.makes == "text":
        return TextEncoder(tokenizer, options.json_keys, append_eod=options.append_eod)
    ends = template.eos_tokens if template else ()
    if template and template.jinja:
        tokenizer.chat_template = template.jinja
    known = tokenizer.get_vocab()
    if unknown := [token for token in ends if token not in known]:
        say(
            f"warning: {options.prompt_type} ends turns with {', '.join(unknown)}, which is no token of "
            f"{options.tokenizer_name_or_path}; it is written in pieces"
        )
    return ChatEncoder(
        tokenizer,
        columns,
        append_eod=options.append_eod,
        end_tokens=[token for token in ends if token in known],
        additional_keys=options.dataset_additional_keys,
    )


def _require_columns(options: Options, columns: Columns, rows: RowFile) -> None:
    if columns.handler.makes != "text":
        columns.require(rows.columns, rows.path)
    for flag, keys in (
        ("--json-keys", options.json_keys if columns.handler.makes == "text" else ()),
        ("--dataset-additional-keys", [key for key in options.dataset_additional_keys if key != "labels"]),
    ):
        for key in keys:
            if key not in rows.columns:
                close = nearest(key, rows.columns)
                hint = f' Did you mean "{close}"?' if close else ""
                raise DataError(
                    f'{rows.path}: no row has a column "{key}" ({flag}).{hint} The columns are: '
                    f"{', '.join(rows.columns)}"
                )


def _name(prefix: str, key: str, handler: Handler) -> str:
    return f"{prefix}_{key}_document" if handler.makes == "text" else packed_name(prefix, key)
