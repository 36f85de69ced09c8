"""The part of device.py that moves weights between two processes on one device."""

from __future__ import annotations

import queue
import statistics
import time
from typing import Any

import torch
import torch.multiprocessing as multiprocessing
from torch import Tensor

from benchmarks.device_numbers import Bench
from benchmarks.random_world import Shape

REPEATS = 5
BUCKET_BYTES = 2**28
LIMIT_S = 60.0


def shapes_of(shape: Shape) -> list[tuple[int, ...]]:
    """Those of a Llama with a tied head, by Hugging Face's names."""
    kv = shape.kv_heads * shape.hidden // shape.heads
    square, ffn, norm = (shape.hidden, shape.hidden), (shape.ffn, shape.hidden), (shape.hidden,)
    layer = [square, (kv, shape.hidden), (kv, shape.hidden), square, ffn, ffn, (shape.hidden, shape.ffn), norm, norm]
    return [(shape.vocab, shape.hidden), *(layer * shape.layers), norm]


def measure_weights(bench: Bench) -> dict[str, Any]:
    """Seconds and GB/s of a whole push by each way; one copy inside the device and one inside the host for scale."""
    shapes = shapes_of(bench.shape("1b"))
    context = multiprocessing.get_context("spawn")
    jobs, answers = context.Queue(), context.Queue()
    receiver = context.Process(target=receive, args=(jobs, answers, str(bench.device), shapes), daemon=True)
    receiver.start()
    source = [torch.randn(*shape, device=bench.device).bfloat16() for shape in shapes]
    total = sum(tensor.nbytes for tensor in source)
    expected = float(sum(tensor.double().sum() for tensor in source))
    assert answers.get(timeout=LIMIT_S) == "ready"
    found: dict[str, Any] = {"megabytes": total / 1e6, "tensors": len(source)}
    ways = {"handles of every tensor": by_tensors, "a reused bucket": by_buckets}
    ways |= {"host, pageable": by_pageable_host, "host, pinned": by_pinned_host}
    for name, way in ways.items():
        try:
            found[name] = summary(way(bench, source, jobs, answers), total)
            jobs.put(("sum", None))
            found[name]["right"] = abs(answers.get(timeout=LIMIT_S) - expected) <= 1e-6 * abs(expected)
            jobs.put(("clear", None))
            assert answers.get(timeout=LIMIT_S) == "cleared"
        except (queue.Empty, RuntimeError, AssertionError) as error:
            found[name] = f"FAILED {type(error).__name__}: {str(error)[:200]}"
            break
    jobs.put(("end", None))
    receiver.join(10)
    receiver.terminate()
    found["one copy inside the device"] = summary(copies(bench, source), total)
    found["one copy inside the host"] = summary(host_copies(total), total)
    return found


def summary(seconds: list[float], total: int) -> dict[str, Any]:
    later = statistics.median(seconds[1:])
    return {"first_s": seconds[0], "later_s": later, "gb_per_s": total / later / 1e9}


def receive(jobs: Any, answers: Any, device: str, shapes: list[tuple[int, ...]]) -> None:
    """The other process: it copies what it is sent into weights of its own."""
    accelerator = torch.get_device_module(device)
    accelerator.set_device(device)
    own = [torch.zeros(*shape, dtype=torch.bfloat16, device=device) for shape in shapes]
    staging: dict[str, Tensor] = {}
    accelerator.synchronize()
    answers.put("ready")
    while True:
        kind, value = jobs.get()
        if kind == "end":
            return
        if kind == "sum":
            answers.put(float(sum(tensor.double().sum() for tensor in own)))
        elif kind == "clear":
            for tensor in own:
                tensor.zero_()
            staging.clear()
            accelerator.synchronize()
            answers.put("cleared")
        elif kind == "tensors":
            torch._foreach_copy_(own, value)
            accelerator.synchronize()
            answers.put("done")
        elif kind == "open":
            staging["bucket"] = value
            answers.put("opened")
        elif kind == "bucket":
            unpack(staging["bucket"], [own[index] for index in value])
            accelerator.synchronize()
            answers.put("done")
        elif kind == "host":
            unpack(value.to(device, non_blocking=True), own)
            accelerator.synchronize()
            answers.put("done")
        del value


def unpack(flat: Tensor, targets: list[Tensor]) -> None:
    """Copy consecutive pieces of a flat bf16 tensor."""
    pieces = flat[: sum(t.numel() for t in targets)].split([t.numel() for t in targets])
    torch._foreach_copy_(targets, [piece.view(t.shape) for piece, t in zip(pieces, targets, strict=True)])


def by_tensors(bench: Bench, source: list[Tensor], jobs: Any, answers: Any) -> list[float]:
    """Every push sends a handle of each tensor; the receiver copies from there."""
    seconds = []
    for _ in range(REPEATS):
        bench.platform.synchronize()
        begin = time.perf_counter()
        jobs.put(("tensors", source))
        assert answers.get(timeout=LIMIT_S) == "done"
        seconds.append(time.perf_counter() - begin)
    return seconds


def by_buckets(bench: Bench, source: list[Tensor], jobs: Any, answers: Any) -> list[float]:
    """One handle for the whole run: the sender packs, the receiver unpacks, a bucket at a time."""
    groups, room = list[list[int]](), 0
    for index, tensor in enumerate(source):
        if not groups or room + tensor.nbytes > BUCKET_BYTES:
            groups.append([])
            room = 0
        groups[-1].append(index)
        room += tensor.nbytes
    size = max(sum(source[index].numel() for index in group) for group in groups)
    bucket = torch.empty(size, dtype=torch.bfloat16, device=bench.device)
    jobs.put(("open", bucket))
    assert answers.get(timeout=LIMIT_S) == "opened"
    seconds = []
    for _ in range(REPEATS):
        bench.platform.synchronize()
        begin = time.perf_counter()
        for group in groups:
            pack(bucket, [source[index] for index in group])
            bench.platform.synchronize()
            jobs.put(("bucket", group))
            assert answers.get(timeout=LIMIT_S) == "done"
        seconds.append(time.perf_counter() - begin)
    return seconds


def pack(flat: Tensor, tensors: list[Tensor]) -> None:
    pieces = flat[: sum(t.numel() for t in tensors)].split([t.numel() for t in tensors])
    torch._foreach_copy_([piece.view(t.shape) for piece, t in zip(pieces, tensors, strict=True)], tensors)


def by_pageable_host(bench: Bench, source: list[Tensor], jobs: Any, answers: Any) -> list[float]:
    return by_host(bench, source, jobs, answers, pinned=False)


def by_pinned_host(bench: Bench, source: list[Tensor], jobs: Any, answers: Any) -> list[float]:
    return by_host(bench, source, jobs, answers, pinned=True)


def by_host(bench: Bench, source: list[Tensor], jobs: Any, answers: Any, *, pinned: bool) -> list[float]:
    """Through memory of the host that both processes map; ``pinned``: the sender registers its side."""
    shared = torch.empty(sum(t.numel() for t in source), dtype=torch.bfloat16).share_memory_()
    shared.zero_()
    if pinned:
        error = bench.accelerator.cudart().cudaHostRegister(shared.data_ptr(), shared.nbytes, 0)
        assert int(error) == 0, error
    seconds = []
    for _ in range(REPEATS):
        bench.platform.synchronize()
        begin = time.perf_counter()
        pieces = shared.split([t.numel() for t in source])
        for piece, tensor in zip(pieces, source, strict=True):
            piece.view(tensor.shape).copy_(tensor, non_blocking=pinned)
        bench.platform.synchronize()
        jobs.put(("host", shared))
        assert answers.get(timeout=LIMIT_S) == "done"
        seconds.append(time.perf_counter() - begin)
    if pinned:
        bench.accelerator.cudart().cudaHostUnregister(shared.data_ptr())
    return seconds


def copies(bench: Bench, source: list[Tensor]) -> list[float]:
    targets = [torch.empty_like(tensor) for tensor in source]
    seconds = []
    for _ in range(REPEATS):
        bench.platform.synchronize()
        begin = time.perf_counter()
        torch._foreach_copy_(targets, source)
        bench.platform.synchronize()
        seconds.append(time.perf_counter() - begin)
    return seconds


def host_copies(total: int) -> list[float]:
    source, target = (torch.zeros(total, dtype=torch.uint8) for _ in range(2))
    seconds = []
    for _ in range(REPEATS):
        begin = time.perf_counter()
        target.copy_(source)
        seconds.append(time.perf_counter() - begin)
    return seconds
