"""What the benchmarks of speed rest on: lengths that both programs get, and tokens that are told apart."""

from __future__ import annotations

import argparse
import json
import socket
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import dispatch, soak, stub_steps, weight_source, weight_sync
from benchmarks.moved_bytes import Moved
from benchmarks.random_world import EOS, SIZES, word_tokenizer
from benchmarks.sides import SAMPLES, Work, end_at, fix_lengths
from rlxf.assembly.roles import engine_settings
from rlxf.platform import get_platform
from rlxf.rollout.engine import Sampling
from tests.rollout_world import prompt_batch, random_prompts, run_config
from tests.tiny_models import config, save_causal_lm


def test_lengths_are_lognormal_where_the_workload_says_so_and_the_same_for_every_caller() -> None:
    work = Work(prompts=500, max_new_tokens=100_000, steps_per_turn=2)
    assert [work.workload(step) for step in range(6)] == ["fixed", "fixed", "lognormal", "lognormal", "fixed", "fixed"]
    assert set(work.lengths(0).flatten()) == {64}
    drawn = work.lengths(2)
    assert drawn.shape == (500, 2)
    assert abs(np.log(drawn).std() - 0.8) < 0.05
    assert abs(drawn.mean() - 64) < 4
    assert (Work(prompts=500, max_new_tokens=100_000, steps_per_turn=2).lengths(2) == drawn).all()
    assert (work.lengths(3) != drawn).any()


def test_a_row_ends_where_its_length_says_and_nowhere_else() -> None:
    torch.manual_seed(0)
    scores = torch.randn(3, 9)
    scores[:, EOS] = 50.0
    for index in range(5):
        chosen = end_at(scores, torch.tensor([2, 4, 5]), index).argmax(dim=1)
        assert (chosen == EOS).tolist() == [index == 1, index == 3, index == 4]


def test_a_completion_survives_decoding_and_encoding() -> None:
    """TRL scores texts: the reward model must see as many tokens as were sampled."""
    tokenizer = word_tokenizer(512)
    ids = [5, 2, 511, 77]
    text = "w9 w8 " + tokenizer.decode(ids, skip_special_tokens=True)
    assert tokenizer(text)["input_ids"] == [9, 8, *ids]


def test_parameters_are_those_of_the_model() -> None:
    for shape in SIZES.values():
        with torch.device("meta"):
            from transformers import LlamaForCausalLM

            model = LlamaForCausalLM(
                config(
                    tied=True, vocab_size=shape.vocab, hidden_size=shape.hidden, intermediate_size=shape.ffn,
                    num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads,
                )
            )  # fmt: skip
        matrices = sum(p.numel() for name, p in model.named_parameters() if "norm" not in name)
        assert matrices == shape.body + shape.head


def soaked(**changes: float) -> dict[str, Any]:
    """A report of the soak whose only process is the driver."""
    looks = [soak.Look(step=step // 2, rss=2**28 + 512 * step, files=43, threads=32 + step % 2) for step in range(600)]
    return {"processes": {"driver": dict(soak._slopes(looks)) | changes}, "events": {}, "cpu": {"ratio": 1.0}}


LIMITS = argparse.Namespace(engine="vllm", load=0, steps=300, begin=0, max_kb=None)


def test_the_soak_measures_growth_a_step_whatever_the_number_of_looks() -> None:
    slopes = soaked()["processes"]["driver"]
    assert slopes["kb_a_step"] == pytest.approx(1.0)
    assert slopes["kb_a_step_least"] == pytest.approx(1.0)
    assert slopes["files_a_step"] == slopes["threads_a_step"] == 0
    assert soak.broken(soaked(), LIMITS) == soak.broken(soaked(threads_a_step=3 / 300), LIMITS) == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"kb_a_step": 20.1}, "driver: memory grows by 20.1 KB a step, limit 20"),
        ({"files_a_step": 5 / 300, "files_last": 48.0}, "driver: files grow from 43 to 48"),
        ({"threads_a_step": 0.5, "threads_last": 99.0}, "driver: threads grow from 32 to 99"),
    ],
)
def test_the_soak_names_a_limit_that_was_not_kept(changes: dict[str, float], said: str) -> None:
    assert soak.broken(soaked(**changes), LIMITS) == [said]


def test_the_soak_counts_every_event_also_beside_other_load() -> None:
    report = soaked(kb_a_step=99.0) | {"events": {"hung": 2}, "cpu": {"ratio": 3.0}}
    loaded = argparse.Namespace(**{**vars(LIMITS), "load": 20})
    assert soak.broken(report, loaded) == ["2 events hung in an undisturbed run"]
    assert len(soak.broken(report, LIMITS)) == 3


def test_beside_stubs_the_driver_has_a_limit_of_its_own() -> None:
    stubs = argparse.Namespace(**{**vars(LIMITS), "engine": "stub"})
    assert soak.broken(soaked(kb_a_step=1.1), stubs) == ["driver: memory grows by 1.1 KB a step, limit 1"]


def test_an_engine_gives_the_lengths_of_the_workload_whatever_the_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rlxf.rollout import hf, hf_sampling, session, vllm

    patched = ((hf, "sample_requests"), (session, "sample_requests"), (vllm, "sample_requests"))
    for module, name in (*patched, (hf_sampling, "Sampler"), (vllm, "VllmRequests")):
        monkeypatch.setattr(module, name, getattr(module, name))  # to be undone
    work = Work(workloads=("lognormal",), prompts=4, max_new_tokens=12, mean_tokens=5)
    fix_lengths(work)
    save_causal_lm(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": EOS}))
    engine = hf.HfEngine(engine_settings(run_config(tmp_path)), get_platform("cpu"))
    sampling = Sampling(num_samples=SAMPLES, max_new_tokens=12)
    batch = prompt_batch(random_prompts([3, 4, 5, 6]), first_id=8)  # the third step
    whole = engine.generate(batch, sampling)
    assert whole.sequences.completion_lengths.tolist() == work.lengths(2).flatten().tolist()
    opened = engine.session(sampling)
    opened.add(batch.select([2, 0]))
    while (found := opened.advance()) is not None:
        places = found.prompts.positions - 8
        assert found.sequences.completion_lengths.tolist() == work.lengths(2)[places].flatten().tolist()


def test_a_stub_engine_fills_its_slots_and_counts_busy_rows() -> None:
    """Two slots, 1 + busy rows a step: 2 steps of 3 s, the third completion begins, 2 of 3 s, and 1 of 2 s alone."""
    lengths = np.array([[2, 4], [3, 0]])
    engine = dispatch.StubEngine(2, 1)
    engine.add([2, 4, 3])
    ends = []
    while engine.next_end() < float("inf"):
        engine.advance()
        ends.append(engine.now)
    assert ends == [6, 12, 14]
    assert dispatch.times_of_shares([[0], []], lengths, 2, 1) == [2 * 3 + 2 * 2, 0]
    assert dispatch.idle([10, 0]) == 0.5


def test_a_queued_prompt_goes_to_the_engine_that_has_room_first() -> None:
    """Two slots each and two completions a prompt: the fifth prompt follows the shortest, the sixth the next one."""
    lengths = np.array([[9, 9], [2, 2], [5, 5], [7, 7], [6, 6], [1, 1]])
    assert dispatch.times_of_queue(range(6), lengths, 2, 0) == [18, 16, 12, 14]


def test_the_lengths_of_two_epochs_correlate_as_the_workload_says() -> None:
    work = dispatch.Workload()
    last, now = work.draw(np.random.default_rng(3), 20_000, work.alike())
    assert dispatch.correlation(last, now) == pytest.approx(0.7, abs=0.02)
    assert abs(now.mean() - 62) < 2  # a few are cut at 256


def test_bytes_that_a_process_moves_are_counted_by_tcp_and_by_file(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as sender:
        receiver, _ = server.accept()
        with receiver:
            moved = Moved()
            thread = threading.Thread(target=sender.sendall, args=(bytes(3_000_000),))
            thread.start()
            left = 3_000_000
            while left:
                left -= len(receiver.recv(2**20))
            thread.join()
            (tmp_path / "file").write_bytes(bytes(500_000))
            found = moved.bytes()
    assert 6_500_000 <= found < 6_520_000  # both ends are in this process


def test_the_large_source_of_weights_is_a_model_of_1_2_billion_parameters() -> None:
    specs = weight_source.specs_of(weight_sync.LARGE, "bfloat16")
    assert sum(spec.num_bytes for spec in specs) == 2 * 1_235_814_400  # as Llama 3.2 1B
    plan = weight_source.Source(shape=weight_sync.LARGE, bucket_mb=256).plan()
    assert [spec.name for bucket in plan for spec in bucket.tensors] == [spec.name for spec in specs]


def test_goals_of_a_push_are_told_as_met_or_missed() -> None:
    seconds = {"one copy": 0.4, "shared_memory": 0.6, "shared_memory, engine of 2": 0.66}
    wall = {name: {"median": value} for name, value in seconds.items()}
    case = {"num_bytes": 2_000_000_000, "wall_s": wall, "bytes_through_driver": {"shared_memory": 1e6}}
    found = weight_sync.goals({"1.2B": case, "26M": case | {"num_bytes": 1e6}})
    assert [line.rpartition(": ")[2] for line in weight_sync.verdicts(found)] == ["met", "met", "MISSED"]
    assert [round(values["found"], 4) for values in found.values()] == [0.0005, round(0.6 / 0.62, 4), 1.1]
    assert weight_sync.goals({"1.2B": case | {"wall_s": {}, "bytes_through_driver": {}}}) == {}


def test_steps_of_stubs_are_steps_of_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, size in {"ROWS": 1000, "PROMPTS": 64, "ENGINES": 4}.items():
        monkeypatch.setattr(stub_steps, name, size)
    monkeypatch.setattr(stub_steps.Stubs, "num_engines", 4)
    assert stub_steps.measure(repeats=2)["median"] > 0
