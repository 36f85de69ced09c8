"""Online DPO: the policy answers prompts, the answers are scored, and the scores make pairs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from rlxf.algorithms.algorithm import reference_stage, with_reference
from rlxf.algorithms.early import FirstPairs, ReferredChunk
from rlxf.algorithms.scoring import Scoring
from rlxf.core.errors import ShapeError, SyncError
from rlxf.core.types import Batch, Examples, Pairs, PairValues, PromptBatch, ReferenceRecord, Rollouts, Sequences
from rlxf.loop.collected import Collected, pair_names
from rlxf.loop.run import Online, Reference, Run
from rlxf.observe.formulas import data_metrics
from rlxf.observe.tail import tail_metrics
from rlxf.rollout.chunks import Chunk, Gathered, chunks_of
from rlxf.rollout.dispatch import Dispatch, deal
from rlxf.schedule.lookahead import Stage


class OnlineDpo:
    """prompts -> rollout -> score -> pair -> reference. With ``rollout.stream_prompts`` chunk by chunk."""

    def stages(self, run: Run) -> tuple[Stage[Collected], ...]:
        size = _first_rows(run) if run.streams("train") else None
        stages: tuple[Stage[Collected], ...] = (
            Stage(
                name="gen",
                lane=run.lane("infer"),
                is_done=lambda item: item.rollouts is not None,
                work=lambda item: _sample(run, item),
            ),
            Stage(
                name="adv",
                lane=run.lane("reward"),
                is_done=lambda item: item.data is not None,
                work=lambda item: _score_and_pair(run, item),
                streams=run.streams("reward"),
            ),
            reference_stage(
                run,
                self,
                before=lambda item: _refer(run, item, size) if run.config.streams else None,
                also=lambda item: _refer_shown(run, item),
            ),
        )
        return stages if size is None else (*stages, _first_mini_batch(run))

    def record(self, run: Run, collected: Collected) -> None:
        assert collected.scored is not None
        assert collected.pairing is not None
        whole = run.config.actor_rollout.ld_alpha is None  # else a pair's sum is no log-prob of its completions
        reference = ReferenceRecord(tokens=collected.shown, pairs=collected.reference if whole else None)
        _online(run).recorder.write(collected.step + 1, collected.scored, collected.pairing, reference)

    def complete(self, run: Run, collected: Collected) -> None:
        assert collected.rollouts is not None
        _online(run).complete_lengths.add(collected.rollouts)

    def batch(self, data: Pairs | Examples, reference: Reference) -> Batch:
        assert isinstance(data, Pairs)
        return with_reference(data, reference)


def _online(run: Run) -> Online:
    assert isinstance(run.source, Online)  # assembly starts the engines of this stage
    return run.source


def _sample(run: Run, collected: Collected) -> None:
    """``rollouts``: B = P * K completions, all of them by the weights that the schedule says; in chunks before."""
    source, sampling = _online(run), run.training_sampling()
    with collected.sampled.made():
        with run.working(collected, "gen"):
            prompts = source.prompts.next_batch(collected.step)  # P prompts
            collected.metrics = data_metrics(source, collected.step)
            num_slots = source.rollout.num_slots(sampling) or len(prompts) * sampling.num_samples
            dispatch = _dispatch(run, source, prompts, num_slots)
            collected.chunks = dispatch.chunks if run.config.streams else ()
            num_samples = None if run.config.engine == "replay" else sampling.num_samples
            gathered = Gathered(prompts, collected.chunks, num_samples=num_samples)
            for part in source.rollout.sample(prompts, sampling, dispatch):
                _require_version(run, part, collected)
                for chunk in gathered.add(part):
                    collected.sampled.put(chunk)
            rollouts = gathered.whole()
            run.sync.sampled()
        source.lengths.add(rollouts)
        collected.metrics |= tail_metrics(rollouts, num_engines=source.rollout.num_engines, num_slots=num_slots)
        collected.rollouts = rollouts


def _dispatch(run: Run, source: Online, prompts: PromptBatch, num_slots: int) -> Dispatch:
    """Which engine samples which prompts, and which move on together. Steps are sampled in their order."""
    rollout, num_samples = run.config.rollout, run.config.actor_rollout.n_samples_per_prompt
    return deal(
        source.lengths.work(prompts, num_samples),
        source.rollout.num_engines,
        slots_per_engine=num_slots,
        samples_per_prompt=num_samples,
        chunk=rollout.stream_prompts,
        mode=rollout.dispatch,
    )


def _require_version(run: Run, rollouts: Rollouts, collected: Collected) -> None:
    if run.config.engine == "replay":  # which has the versions of another run
        return
    others = set(rollouts.policy_version.tolist()) - {collected.version}
    if others:
        raise SyncError(
            f"step {collected.step + 1}: completions were sampled by policy version {sorted(others)}, but version "
            f"{collected.version} was pushed into the engines; a weight push did not arrive in all of them"
        )


def _score_and_pair(run: Run, collected: Collected) -> None:
    """``raw_scores`` [B] unless they are known, then N pairs; chunk by chunk while others are being sampled."""
    with collected.paired.made():
        if run.config.streams:
            _score_chunks(run, collected)
            return
        assert collected.rollouts is not None  # the stage before
        with run.working(collected, "adv"):
            scoring = Scoring(run, _online(run), collected)
            (whole,) = chunks_of(collected.rollouts, [tuple(range(len(collected.rollouts.prompts)))])
            scoring.ask(whole)
            scoring.finish()


def _score_chunks(run: Run, collected: Collected) -> None:
    scoring: Scoring | None = None
    for chunk in _chunks(run, collected):
        with run.working(collected, "adv"):
            scoring = scoring or Scoring(run, _online(run), collected)  # the step's chunks are known by then
            scoring.ask(chunk)
    assert scoring is not None  # a step has prompts
    with run.working(collected, "adv"):
        scoring.finish()


def _chunks(run: Run, collected: Collected) -> Iterator[Chunk]:
    """The chunks of a step, as they are sampled; of one that waited in a checkpoint as they were cut before."""
    if collected.rollouts is None or not collected.sampled.is_empty:
        return collected.sampled.follow(run.check)
    collected.chunks = collected.chunks or (tuple(range(len(collected.rollouts.prompts))),)
    return chunks_of(collected.rollouts, collected.chunks)


def _refer(run: Run, collected: Collected, size: int | None) -> None:
    """``reference`` of the step's pairs, unless it is known: asked chunk by chunk, while others are being scored.

    ``size``: pairs of the mini-batch that the actor begins with as soon as it is whole; None: it begins with the step.
    """
    answers, known = [], collected.reference is not None
    first = None if size is None else FirstPairs(size, run.config.actor_rollout.n_samples_per_prompt)
    with collected.first.made():
        for chunk in collected.paired.follow(run.check):
            if known:
                continue
            if len(chunk.found):
                with run.working(collected, "ref"):
                    values = run.reference.logps(chunk.found.tokens())
            else:
                values = PairValues(chosen=torch.zeros(0), rejected=torch.zeros(0))
            answers.append(ReferredChunk(rows=chunk.rows, found=chunk.found, names=chunk.names, reference=values))
            if first is not None and (whole := first.add(answers[-1])) is not None:
                collected.first.put(whole)
    if known:
        return
    assert collected.pairing is not None
    collected.reference = _in_order(answers, pair_names(collected.pairing.rows))
    collected.referred = run.digest(collected.pairing.pairs)


def _in_order(answers: list[ReferredChunk], names: Tensor) -> PairValues:
    """What the reference says of a step's pairs ([N, 3] names), from what it said of the pairs of each chunk."""
    places = {tuple(name): place for place, name in enumerate(torch.cat([chunk.names for chunk in answers]).tolist())}
    try:
        index = torch.tensor([places[tuple(name)] for name in names.tolist()], dtype=torch.int64)
    except KeyError as error:
        raise ShapeError(f"the reference was not asked about the pair {error} of the step") from error
    return PairValues(
        chosen=torch.cat([chunk.reference.chosen for chunk in answers])[index],
        rejected=torch.cat([chunk.reference.rejected for chunk in answers])[index],
    )


def _refer_shown(run: Run, collected: Collected) -> None:
    """``shown``: what the reference says of each token of the pairs that people are shown of this step."""
    assert collected.pairing is not None
    pairs = _online(run).recorder.shown(collected.step + 1, collected.pairing.pairs)
    # A resumed run may pair what waited in another way; then it shows other pairs.
    known = collected.shown is not None and collected.referred == run.digest(collected.pairing.pairs)
    if len(pairs) and not known:
        with run.working(collected, "ref"):
            collected.shown = run.reference.token_logps(Sequences.concat([pairs.chosen, pairs.rejected]))


def _first_rows(run: Run) -> int | None:
    """Pairs of a step's first optimizer step; None: they are all its pairs, or drawn from all of them."""
    config, algorithm = run.config, run.config.algorithm
    samples = config.actor_rollout.n_samples_per_prompt
    most = samples * (samples - 1) // 2 if algorithm.pairing in ("all", "threshold") else 1  # of one prompt
    most = min(most, algorithm.max_pairs_per_prompt or most)
    size = config.actor_rollout.first_rows()
    return size if size is not None and size < most * config.training.global_batch_size else None


def _first_mini_batch(run: Run) -> Stage[Collected]:
    """The actor begins with the first pairs of a step whose other pairs are still being made."""
    return Stage(
        name="first",
        lane=run.lane("train"),
        is_done=lambda item: item.begun or (item.data is not None and not len(item.data)),
        work=lambda item: _begin_update(run, item),
        late=True,
        streams=True,
    )


def _begin_update(run: Run, collected: Collected) -> None:
    """The first mini-batch through the actor, without an optimizer step, if it is there before the whole step."""
    first = next(collected.first.follow(run.check), None)
    if first is not None and collected.batch is None:
        beta = run.config.actor_rollout.beta_after(run.state.epoch)
        with run.working(collected, "update_actor"):
            run.actor.prepare(replace(first, beta=beta), collected.step)
    collected.begun = True
