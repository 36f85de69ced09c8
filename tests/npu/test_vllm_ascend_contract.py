"""Everything of vLLM that the rollout engine uses exists in the NPU lane's vLLM 0.23.0 and vllm-ascend 0.23.0.

Read, not run: the engine's own source says what it uses, the wheels' source says what there is. How requests go into
an engine and completions come out is read in the installed vLLM, too: the engine uses only what both have.
"""

from __future__ import annotations

import ast
import logging
import re
import sys
import types
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

import rlxf.rollout.vllm
import rlxf.rollout.vllm_requests
import rlxf.rollout.vllm_worker
from rlxf.platform.cuda import CudaPlatform
from rlxf.platform.environment import NO_EXPANDABLE_SEGMENTS
from rlxf.platform.npu import NpuPlatform, extra_cleanup
from rlxf.rollout.noise import _STEP
from rlxf.rollout.vllm_sleep import map_once
from tests.npu.test_torch_npu_contract import TORCH_NPU
from tests.npu.wheels import INSTALLED, source, wheel

VLLM = "vllm==0.23.0"
ASCEND = "vllm-ascend==0.23.0"
ENGINE = ast.parse(Path(rlxf.rollout.vllm.__file__).read_text())
REQUESTS = ast.parse(Path(rlxf.rollout.vllm_requests.__file__).read_text())
WORKER = ast.parse(Path(rlxf.rollout.vllm_worker.__file__).read_text())
LLM_FILE = "vllm/entrypoints/llm.py"
LLM_ENGINE = "vllm/v1/engine/llm_engine.py"
OUTPUTS = "vllm/v1/engine/output_processor.py"

both = pytest.mark.parametrize("version", [VLLM, INSTALLED])

pytestmark = [pytest.mark.npu, pytest.mark.slow]  # the vLLM wheel has 274 MB


@cache
def tree(requirement: str, path: str) -> ast.Module:
    return ast.parse(source(requirement, path))


def class_in(requirement: str, path: str, name: str) -> ast.ClassDef:
    return next(node for node in tree(requirement, path).body if isinstance(node, ast.ClassDef) and node.name == name)


def fields(node: ast.ClassDef) -> set[str]:
    """Annotated fields of a dataclass or struct."""
    return {ast.unparse(item.target) for item in node.body if isinstance(item, ast.AnnAssign)}


def methods(node: ast.ClassDef) -> dict[str, set[str]]:
    """Parameter names of each method."""
    found = {}
    for item in node.body:
        if isinstance(item, ast.FunctionDef):
            arguments = item.args
            found[item.name] = {a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)}
    return found


def positional(node: ast.ClassDef | ast.Module, function: str) -> list[str]:
    """Names of a function's parameters that may be given without their names."""
    found = next(item for item in node.body if isinstance(item, ast.FunctionDef) and item.name == function)
    return [argument.arg for argument in (*found.args.posonlyargs, *found.args.args)]


def calls(module: ast.Module, function: str) -> list[ast.Call]:
    nodes = [node for node in ast.walk(module) if isinstance(node, ast.Call) and ast.unparse(node.func) == function]
    assert nodes, f"the engine no longer calls {function}"
    return nodes


def keywords(call: ast.Call) -> set[str]:
    return {keyword.arg for keyword in call.keywords if keyword.arg}


def test_llm_accepts_every_argument_of_the_engine_and_of_the_platform() -> None:
    (call,) = calls(ENGINE, "LLM")
    ours = keywords(call) | set(NpuPlatform().vllm_arguments(colocated=True)) | {"max_num_seqs"}
    own = methods(class_in(VLLM, LLM_FILE, "LLM"))["__init__"]
    passed_on = fields(class_in(VLLM, "vllm/engine/arg_utils.py", "EngineArgs"))
    assert ours >= {"worker_extension_cls", "max_model_len", "additional_config"}
    assert ours <= own | passed_on


@both
def test_sampling_parameters_have_every_field_that_is_set(version: str) -> None:
    (shared,) = [node for node in ast.walk(REQUESTS) if isinstance(node, ast.Dict) and len(node.keys) > 5]
    (call,) = calls(REQUESTS, "SamplingParams")
    forms = [node for node in ast.walk(REQUESTS) if isinstance(node, ast.Dict) and len(node.keys) == 1]
    ours = {ast.literal_eval(key) for node in (shared, *forms) for key in node.keys if key} | keywords(call)
    assert ours >= {"temperature", "seed", "stop_token_ids", "structured_outputs", "output_kind"}
    assert ours <= fields(class_in(version, "vllm/sampling_params.py", "SamplingParams"))
    kinds = class_in(version, "vllm/sampling_params.py", "RequestOutputKind")
    names = {ast.unparse(target) for item in kinds.body if isinstance(item, ast.Assign) for target in item.targets}
    assert names >= {"DELTA", "FINAL_ONLY"}


@pytest.mark.parametrize("method", ["collective_rpc", "reset_prefix_cache"])
def test_llm_has_every_method_that_is_called(method: str) -> None:
    theirs = methods(class_in(VLLM, LLM_FILE, "LLM"))[method]
    for call in calls(ENGINE, f"self._llm.{method}"):
        assert keywords(call) <= theirs


@both
def test_the_engine_takes_requests_and_steps_as_they_are_given(version: str) -> None:
    engine = class_in(version, LLM_ENGINE, "LLMEngine")
    expected = {
        "add_request": ["self", "request_id", "prompt", "params"],
        "step": ["self"],
        "abort_request": ["self", "request_ids"],
        "has_unfinished_requests": ["self"],
    }
    used = {
        node.func.attr
        for node in ast.walk(REQUESTS)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
        if ast.unparse(node.func.value) == "self._engine"
    }
    assert used == set(expected)
    for method, parameters in expected.items():
        assert positional(engine, method)[: len(parameters)] == parameters
        for call in calls(REQUESTS, f"self._engine.{method}"):
            assert (len(call.args), call.keywords) == (len(parameters) - 1, [])
    assert positional(tree(version, "vllm/inputs/engine.py"), "tokens_input") == ["prompt_token_ids"]
    assert '"tokens_input"' in source(version, "vllm/inputs/__init__.py")
    # A prompt with a type is taken as it is; others would be rendered first.
    assert 'isinstance(prompt, dict) and "type" in prompt' in source(version, "vllm/v1/engine/input_processor.py")
    assert 'TokensInput(type="token", prompt_token_ids=prompt_token_ids)' in source(version, "vllm/inputs/engine.py")
    assert "max_num_seqs" in fields(class_in(version, "vllm/config/scheduler.py", "SchedulerConfig"))
    assert "self.vllm_config = vllm_config" in source(version, LLM_ENGINE)
    config = class_in(version, "vllm/config/vllm.py", "VllmConfig")
    assert fields(config) >= {"scheduler_config", "cache_config", "model_config", "structured_outputs_config"}


@both
def test_an_output_has_the_name_that_was_given_and_so_has_a_request_that_is_taken_back(version: str) -> None:
    """Inside vLLM a name gets a random end; outside it is what it was."""
    assert "request.external_req_id = request.request_id" in source(version, "vllm/v1/engine/input_processor.py")
    text = source(version, OUTPUTS)
    assert "request_id=external_req_id,  # request_id is what was provided externally" in text
    assert "self.external_req_ids.pop(request_id, [])" in text  # of abort_request, where `internal` is not given
    assert "self.output_processor.abort_requests(request_ids, internal)" in source(version, LLM_ENGINE)
    given = methods(class_in(version, "vllm/outputs.py", "RequestOutput"))["__init__"]
    assert given >= {"request_id", "outputs", "finished"}
    assert fields(class_in(version, "vllm/outputs.py", "CompletionOutput")) >= {"token_ids", "logprobs"}


@both
def test_a_request_gives_its_tokens_at_the_end_or_as_they_come(version: str) -> None:
    text = source(version, OUTPUTS)
    assert "if not finished and final_only:" in text
    assert "delta = self.output_kind == RequestOutputKind.DELTA" in text
    assert "logprobs = logprobs[-" in text  # of a delta: those of its own tokens


def test_the_executors_and_the_block_size_are_where_the_engine_looks() -> None:
    assert 'DistributedExecutorBackend = Literal["ray", "mp", "uni"' in source(VLLM, "vllm/config/parallel.py")
    assert "block_size" in fields(class_in(VLLM, "vllm/config/cache.py", "CacheConfig"))
    assert "self.vllm_config = vllm_config" in source(VLLM, "vllm/v1/engine/llm_engine.py")
    assert "cache_config.block_size = 128" in source(ASCEND, "vllm_ascend/utils.py")
    assert NpuPlatform().kv_block_size == 128


def test_layerwise_reload_takes_what_the_worker_gives() -> None:
    theirs = {
        node.name: [argument.arg for argument in node.args.args]
        for node in tree(VLLM, "vllm/model_executor/model_loader/reload/layerwise.py").body
        if isinstance(node, ast.FunctionDef)
    }
    assert theirs["initialize_layerwise_reload"] == ["model"]
    assert theirs["finalize_layerwise_processing"] == ["model", "model_config"]  # finalize_layerwise_reload calls it
    exported = source(VLLM, "vllm/model_executor/model_loader/reload/__init__.py")
    for name, count in (("initialize_layerwise_reload", 1), ("finalize_layerwise_reload", 2)):
        assert f'"{name}"' in exported
        assert all(len(call.args) == count for call in calls(WORKER, name))


def test_ascend_updates_its_own_weights_by_the_same_pair() -> None:
    text = source(ASCEND, "vllm_ascend/worker/worker.py")
    assert "with torch.device(self.device):\n                initialize_layerwise_reload(model)" in text
    assert "finalize_layerwise_reload(model, self.model_config)" in text


def test_the_worker_has_what_the_extension_uses_and_no_name_of_its_own() -> None:
    text = source(ASCEND, "vllm_ascend/worker/worker.py")
    worker = class_in(ASCEND, "vllm_ascend/worker/worker.py", "NPUWorker")
    assert "self.model_runner" in text
    assert "self.device = " in text
    assert "self.vllm_config = vllm_config" in source(VLLM, "vllm/v1/worker/worker_base.py")
    assert not any(name.startswith("rlxf_") for name in methods(worker))


@both
def test_a_worker_knows_its_place_and_the_settings_of_its_model(version: str) -> None:
    path = "vllm/v1/worker/worker_base.py"
    assert positional(class_in(version, path, "WorkerBase"), "__init__")[:4] == [
        "self", "vllm_config", "local_rank", "rank",
    ]  # fmt: skip
    base = source(version, path)
    for name in ("vllm_config", "local_rank", "rank"):
        assert f"self.{name} = {name}" in base
    assert "self.device: torch.device | None = None" in base
    worker = source(version, "vllm/v1/worker/gpu_worker.py")
    assert 'self.device = torch.device(f"cuda:' in worker
    assert "self.rank = " not in worker
    # The settings that layers ask for while they load: given as the worker gives them while it loads.
    settings = tree(version, "vllm/config/vllm.py")
    assert positional(settings, "set_current_vllm_config")[0] == "vllm_config"
    (function,) = [
        node for node in settings.body if isinstance(node, ast.FunctionDef) and node.name == "set_current_vllm_config"
    ]
    assert [ast.unparse(decorator) for decorator in function.decorator_list] == ["contextmanager"]
    assert '"set_current_vllm_config"' in source(version, "vllm/config/__init__.py")
    assert "set_current_vllm_config(self.vllm_config)" in worker
    for call in calls(WORKER, "set_current_vllm_config"):
        assert ([ast.unparse(argument) for argument in call.args], call.keywords) == (["self.vllm_config"], [])


def test_the_npu_worker_has_the_same_place() -> None:
    assert [ast.unparse(base) for base in class_in(ASCEND, "vllm_ascend/worker/worker.py", "NPUWorker").bases] == [
        "WorkerBase"
    ]
    text = source(ASCEND, "vllm_ascend/worker/worker.py")
    assert 'device = torch.device(f"npu:{self.local_rank}")' in text
    assert "self.rank = " not in text


def test_rebuilding_a_tied_head_is_a_step_that_the_model_knows() -> None:
    path = "vllm/model_executor/layers/vocab_parallel_embedding.py"
    head = methods(class_in(VLLM, path, "UnquantizedEmbeddingMethod"))
    assert head["process_weights_after_loading"] == {"self", "layer"}


def test_the_private_weight_layout_is_off_by_both_switches() -> None:
    assert '"VLLM_ASCEND_ENABLE_NZ": lambda' in source(ASCEND, "vllm_ascend/envs.py")
    assert '"weight_nz_mode"' in source(ASCEND, "vllm_ascend/ascend_config.py")
    assert '"VLLM_ENABLE_V1_MULTIPROCESSING"' in source(VLLM, "vllm/envs.py")
    assert NpuPlatform().rollout_environment(1, 1)["VLLM_ASCEND_ENABLE_NZ"] == "0"
    assert NpuPlatform().vllm_arguments(colocated=False)["additional_config"] == {"weight_nz_mode": 0}


def _allocator_of_the_wheel(monkeypatch: pytest.MonkeyPatch, mapped: dict[int, int], room: list[int]) -> Any:
    """The wheel's sleeping allocator as a module, over a device that counts how often an address is mapped."""

    def create(device: int, size: int, address: int, handle: int) -> None:
        if not room[0]:
            raise RuntimeError("(OOM: Out of Memory, allocation failed)")
        room[0] -= 1
        mapped[address] += 1

    def release(device: int, size: int, address: int, handle: int) -> None:
        mapped[address] -= 1

    functions = {"init_module": None, "python_create_and_map": create, "python_unmap_and_release": release}
    for name, content in {
        "acl": {}, "acl.rt": {"memcpy": lambda *_: None}, "vllm": {}, "vllm.logger": {"logger": logging.getLogger()},
        "vllm_ascend": {}, "vllm_ascend.vllm_ascend_C": functions,
    }.items():  # fmt: skip
        stand_in = types.ModuleType(name)
        stand_in.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, stand_in)
    memory = types.SimpleNamespace(NPUPluggableAllocator=object)
    npu = types.SimpleNamespace(empty_cache=lambda: None, memory=memory)
    monkeypatch.setattr(torch, "npu", npu, raising=False)
    name, _, kind = (NpuPlatform.vllm_allocator or "").partition(":")
    assert kind == "CaMemAllocator"
    module = types.ModuleType(name)
    monkeypatch.setitem(sys.modules, name, module)
    exec(source(ASCEND, name.replace(".", "/") + ".py"), module.__dict__)
    return module


@pytest.mark.parametrize("guarded", [False, True])
def test_a_second_wake_maps_nothing_twice(guarded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without our guard it does: this fault of the wheel's is why there is one."""
    monkeypatch.delenv("PYTORCH_NPU_ALLOC_CONF", raising=False)
    mapped, room = dict.fromkeys(range(4), 1), [4]
    module = _allocator_of_the_wheel(monkeypatch, mapped, room)
    if guarded:
        map_once(object(), str(NpuPlatform.vllm_allocator))
    allocator = module.CaMemAllocator.get_instance()
    for address in mapped:
        tag = "weights" if address else "kv_cache"
        allocator.pointer_to_data[address] = module.AllocationData((0, 8, address, 0), tag)
    for _ in range(2):
        allocator.sleep(())
        assert set(mapped.values()) == {0}
        room[0] = 2
        with pytest.raises(RuntimeError, match="Out of Memory"):
            allocator.wake_up(["weights"])
        room[0] = 9
        allocator.wake_up(["weights"])
        allocator.wake_up(["kv_cache"])
        if not guarded:
            assert max(mapped.values()) == 2
            return
        assert set(mapped.values()) == {1}


@both
def test_vllm_sleeps_and_wakes_by_level_and_tags(version: str) -> None:
    llm = class_in(version, LLM_FILE, "LLM")
    assert positional(llm, "sleep") == ["self", "level", "mode"]
    assert positional(llm, "wake_up") == ["self", "tags"]
    assert {"is_sleeping"} <= set(methods(class_in(version, LLM_ENGINE, "LLMEngine")))
    for method in ("sleep", "wake_up"):
        for call in calls(ENGINE, f"self._llm.{method}"):
            assert keywords(call) <= {"level", "tags"}
    worker = source(version, "vllm/v1/worker/gpu_worker.py")
    for tag in ("weights", "kv_cache"):
        assert f'tag="{tag}"' in worker
    assert "for name, buffer in model.named_buffers()" in worker  # level 2 keeps them, and no other table
    # Going to sleep forgets the prefixes, so that a wake has none to forget.
    core = source(version, "vllm/v1/engine/core.py")
    assert "pause_future = self.pause_scheduler(mode=mode, clear_cache=clear_prefix_cache)" in core
    assert "clear_prefix_cache = level >= 1" in core
    executor = source(version, "vllm/v1/executor/abstract.py")
    assert executor.index('self.collective_rpc("wake_up"') < executor.index("self.sleeping_tags.remove(tag)")


def test_the_gpu_lanes_allocator_knows_itself_what_is_mapped() -> None:
    """So that a second wake maps nothing twice."""
    assert "is_asleep" in fields(class_in(INSTALLED, "vllm/device_allocator/__init__.py", "AllocationData"))
    text = source(INSTALLED, "vllm/device_allocator/cumem.py")
    wake = text[text.index("    def wake_up") :]
    assert wake.index("if not data.is_asleep:") < wake.index("create_and_map(handle)")
    assert wake.index("create_and_map(handle)") < wake.index("data.is_asleep = False")
    name, _, kind = (CudaPlatform.vllm_allocator or "").partition(":")
    assert "get_instance" in methods(class_in(INSTALLED, name.replace(".", "/") + ".py", kind))


def test_ascend_sleeps_by_the_same_tags_and_keeps_tables_that_level_2_would_lose() -> None:
    worker = source(ASCEND, "vllm_ascend/worker/worker.py")
    theirs = methods(class_in(ASCEND, "vllm_ascend/worker/worker.py", "NPUWorker"))
    assert theirs["sleep"] == {"self", "level"}
    assert theirs["wake_up"] == {"self", "tags"}
    assert 'offload_tags=("weights",) if level == 1' in worker
    assert "model.named_buffers()" in worker
    tables = source(ASCEND, "vllm_ascend/ops/rotary_embedding.py")
    assert re.search(r"^_cos_sin_cache\b", tables, re.MULTILINE)  # of the module, so no buffer of the model
    assert NpuPlatform.vllm_sleep_level == 1


def test_the_sleeping_allocator_refuses_expandable_segments_only() -> None:
    """And vllm-ascend turns them on for an engine that does not sleep, unless the variable names them already."""
    text = source(ASCEND, "vllm_ascend/device_allocator/camem.py")
    assert 'conf = os.environ.get("PYTORCH_NPU_ALLOC_CONF", "")' in text
    assert 'assert "expandable_segments:True" not in conf' in text
    text = source(ASCEND, "vllm_ascend/platform.py")
    assert "if model_config and not model_config.enable_sleep_mode:" in text
    assert '"expandable_segments" not in npu_alloc_configs' in text
    assert NpuPlatform().rollout_environment(1, 1, colocated=True)["PYTORCH_NPU_ALLOC_CONF"] == NO_EXPANDABLE_SEGMENTS


def test_what_frees_more_in_a_sleep_is_asked_for_by_the_key_that_the_version_knows() -> None:
    """0.23.0 ignores keys that it does not know; later versions renamed the key and refuse others."""
    pinned = source(ASCEND, "vllm_ascend/ascend_config.py")
    assert 'additional_config.get("enable_sleep_mode_extra_cleanup", False)' in pinned
    assert "rl_config" not in pinned
    assert extra_cleanup(pinned) == {"enable_sleep_mode_extra_cleanup": True}
    worker = source(ASCEND, "vllm_ascend/worker/worker.py")
    assert worker.count('getattr(get_ascend_config(), "enable_sleep_mode_extra_cleanup", False)') == 2
    assert (
        'raise ValueError(\n                "FRACTAL_NZ mode is enabled' in worker
    )  # a wake-up needs weight_nz_mode 0


def test_the_sampler_draws_by_a_function_that_can_be_replaced() -> None:
    """By its name in its module, row by row; ``rlxf/rollout/noise.py`` draws all rows at once."""
    name = NpuPlatform().vllm_sampler
    assert name == "vllm_ascend.sample.sampler"
    path = "vllm_ascend/sample/sampler.py"
    assert positional(tree(ASCEND, path), "random_sample") == ["probs", "generators"]
    text = source(ASCEND, path)
    assert "q[i].exponential_(generator=generator)" in text  # once this is gone, so may the replacement
    assert "return probs.div_(q).argmax(dim=-1).view(-1)" in text
    assert text.count("random_sample(probs, generators)") == 2
    assert text.count("probs = cand_logits.softmax(dim=-1, dtype=torch.float32)") == 1
    assert text.count("probs = logits.softmax(dim=-1, dtype=torch.float32)") == 1
    runner = source(ASCEND, "vllm_ascend/worker/model_runner_v1.py")
    assert "from vllm_ascend.sample.sampler import AscendSampler" in runner
    assert "self.sampler = AscendSampler()" in runner
    worker = source(ASCEND, "vllm_ascend/worker/worker.py")
    assert 'if self.use_v2_model_runner and vllm_version_is("0.23.0"):' in worker  # the V1 runner, always
    # The other way to draw is off unless it is asked for.
    assert 'additional_config.get("enable_async_exponential", False)' in source(ASCEND, "vllm_ascend/ascend_config.py")


def test_a_requests_generator_counts_its_tokens_by_offsets() -> None:
    runner = source(ASCEND, "vllm_ascend/worker/model_runner_v1.py")
    assert "class NPUModelRunner(GPUModelRunner):" in runner
    assert f"gen.set_offset(gen.get_offset() - {_STEP})" in runner  # a token that does not count
    made = source(VLLM, "vllm/v1/worker/gpu_model_runner.py")
    assert "generator.manual_seed(sampling_params.seed)" in made
    assert "generator = torch.Generator(device=self.device)" in made
    symbols = wheel(TORCH_NPU).read("torch_npu/lib/libtorch_npu.so")
    for method in (b"10set_offsetEm", b"10get_offsetEv", b"12current_seedEv"):
        assert b"at_npu16NPUGeneratorImpl" + method in symbols
    registered = source(TORCH_NPU, "torch_npu/csrc/aten/npu_native_functions_by_codegen.yaml")
    for operation in ("floor.out", "log1p_", "neg_", "mul_.Scalar", "sub_.Tensor", "add_.Tensor", "add_.Scalar", "mm"):
        assert f"- func: {operation}(" in registered, operation
