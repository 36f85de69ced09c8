"""Bytes of a rollout engine on one of its devices: weights, cache of keys and values, and room for its passes."""

from __future__ import annotations

from dataclasses import dataclass

from rlxf.core.memory import GIB
from rlxf.planner.device import Device
from rlxf.planner.jobs import BYTES, EngineJob, Precision, Shape, Work

_BLOCKS = {"npu": 128, "cuda": 16, "cpu": 128}  # tokens of a block of vLLM's cache (``Platform.kv_block_size``)
_VOCAB = 64  # vLLM's VocabParallelEmbedding fills its rows up to a multiple
_FP32 = 4
_GRAPHS = 0.6 * GIB  # captured graphs; an assumption, not measured
_PREFILL = 8192  # prompt tokens of a pass of the hf engine (``PREFILL_TOKENS``)
_LARGE, _MANY, _FEW = 70 * GIB, 16384, 8192  # vLLM 0.32: max_num_batched_tokens of ``LLM``, by the device's memory


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineBytes:
    """What one process of an engine needs."""

    weights: float
    cache: float  # for the sequences that it decodes at a time
    one_sequence: float  # of the cache: less cannot sample
    passes: float  # activations and logits
    graphs: float

    @property
    def total(self) -> float:
        return self.weights + self.cache + self.passes + self.graphs

    @property
    def least(self) -> float:
        return self.weights + self.one_sequence + self.passes + self.graphs


def token_bytes(shape: Shape, tp: int, precision: Precision) -> int:
    """Keys and values of one token, all layers, on one device. Fewer key/value heads than devices: each has one."""
    return 2 * shape.layers * max(shape.kv_heads // tp, 1) * shape.head_size * BYTES[precision]


def cache_blocks(shape: Shape, tp: int, precision: Precision, cache: float, kind: str) -> int:
    """Blocks of vLLM's cache that so many bytes hold."""
    return int(cache // (_BLOCKS[kind] * token_bytes(shape, tp, precision)))


def engine_weight_bytes(job: EngineJob) -> int:
    """Of one process. vLLM repeats key/value heads where there are fewer than devices, and pads the vocabulary."""
    shape, tp = job.shape, job.tp
    keys = max(shape.kv_heads // tp, 1) * shape.head_size
    queries = shape.heads * shape.head_size // tp
    layer = shape.hidden * (2 * queries + 2 * keys) + 3 * shape.hidden * shape.ffn // tp + 2 * shape.hidden
    layer += (queries + 2 * keys if shape.qkv_bias else 0) + (2 * shape.head_size if shape.qk_norm else 0)
    rows = shape.vocab if job.kind == "hf" else -(-shape.vocab // _VOCAB) * _VOCAB // tp
    tables = 1 if shape.tied else 2
    return BYTES[job.precision] * (shape.layers * layer + shape.hidden + tables * rows * shape.hidden)


def engine_bytes(job: EngineJob, work: Work, device: Device) -> EngineBytes:
    """What one process needs for its share of a step.

    It decodes as many sequences at a time as it has slots, or as its share of the step has. Each may become as long as
    the recipe allows. A vLLM engine on a CPU takes all of ``cpu_kv_cache_gib`` at once.
    """
    share = max(-(-int(work.completions) // job.engines), 1)
    if job.kind == "hf":
        return _hf_bytes(job, share, device)
    slots = min(job.slots or device.engine_slots, share)
    block = _BLOCKS[device.kind]
    length = -(-job.max_length // block) * block
    one = float(length * token_bytes(job.shape, job.tp, job.precision))
    return EngineBytes(
        weights=engine_weight_bytes(job),
        cache=float(job.cpu_cache_bytes) if device.is_cpu else slots * one,
        one_sequence=one,
        passes=_pass_bytes(job, device),
        graphs=0 if device.is_cpu else _GRAPHS,
    )


def _pass_bytes(job: EngineJob, device: Device) -> float:
    """What vLLM's profile finds: a pass of as many tokens as it batches, and the logits of all its slots in fp32.

    The pass is at its largest in an MLP: gate and up, their product, and three streams of hidden states. The sampler
    has the logits, their log-softmax and a copy.
    """
    shape, width = job.shape, BYTES[job.precision]
    tokens = 4096 * job.tp if device.is_cpu else _MANY if device.memory >= _LARGE else _FEW
    tokens = max(tokens, job.max_length) if not device.is_cpu else tokens
    mlp = tokens * width * (3 * shape.ffn // job.tp + 3 * shape.hidden)
    logits = (job.slots or device.engine_slots) * shape.vocab * _FP32 * 3
    return float(max(mlp, logits))


def _hf_bytes(job: EngineJob, share: int, device: Device) -> EngineBytes:
    """It decodes its share, or its slots, at a time. On a CPU it has copies of its linears, laid out for few rows."""
    share = min(share, job.slots or share)
    shape, width = job.shape, BYTES[job.precision]
    one = float(job.max_length * token_bytes(shape, 1, job.precision))
    tokens = min(_PREFILL, share * job.max_length)
    mlp = tokens * width * (4 * shape.ffn + 3 * shape.hidden)
    logits = share * shape.vocab * _FP32 * 3  # with noise, and what is left of them
    copies = width * (shape.body + shape.head) if device.is_cpu else 0
    return EngineBytes(
        weights=engine_weight_bytes(job) + copies,
        cache=share * one,
        one_sequence=one,
        passes=float(max(mlp, logits)),
        graphs=0,
    )
