"The three calls of a step, with a runner that adds digits."
import random

import pytest
from hypothesis import given, settings, strategies as st

from tinyvllm.core.blocks import BlockManager
from tinyvllm.core.scheduler import Scheduler
from tinyvllm.core.sequence import Sequence
from tinyvllm.engine.core import EngineCore
from tinyvllm.errors import BadInput
from tinyvllm.sampling.params import SamplingParams
from tinyvllm.sampling.sampler import Sampled


def add_digits(batch):
    return [[Sampled(sum(seq.token_ids) % 10, 0.0, None)] if samples else []
            for seq, samples in zip(batch.seqs, batch.samples)]


def add_digits_late(batch):
    "The same, computed when it is read."
    def compute():
        yield from add_digits(batch)
    return compute()


def make(runner=add_digits, num_blocks=64, **sizes):
    return EngineCore(Scheduler(BlockManager(num_blocks, block_size=4), **sizes), runner)


def expected(prompt, n):
    tokens = list(prompt)
    for _ in range(n):
        tokens.append(sum(tokens) % 10)
    return tokens[len(prompt):]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.lists(st.integers(0, 9), min_size=1, max_size=9), st.integers(1, 6)), min_size=1, max_size=8),
       st.integers(1, 9), st.integers(5, 20), st.integers(0, 1), st.integers(0, 99))
def test_each_answer_is_what_it_is_alone(requests, budget, num_blocks, delay, seed):
    core, rng = make([add_digits, add_digits_late][delay], num_blocks, max_num_batched_tokens=budget, output_delay=delay), random.Random(seed)
    sequences = [Sequence(i, ids, SamplingParams(max_tokens=n)) for i, (ids, n) in enumerate(requests)]
    waiting, reported = sequences[::-1], []
    while waiting or core.has_work:
        if waiting and rng.random() < 0.5:
            core.add_sequences([waiting.pop()])
        reported += core.step()
    for seq, (ids, n) in zip(sequences, requests):
        assert seq.output_token_ids == expected(ids, n) and seq.finish_reason == 'length'
        assert reported.count(seq) == n
    assert core.scheduler.blocks.num_free == num_blocks - 1


def test_an_error_in_the_place_of_tokens_ends_one_sequence():
    def breaks(batch):
        return [ValueError(seq.id) if seq.id == 'bad' else new for seq, new in zip(batch.seqs, add_digits(batch))]
    core, params = make(breaks), SamplingParams(max_tokens=3)
    bad, good = Sequence('bad', [1, 2], params), Sequence('good', [1, 2], params)
    core.add_sequences([bad, good])
    assert set(core.step()) == {bad, good} and bad.finish_reason == 'error' and isinstance(bad.error, ValueError)
    while core.has_work:
        core.step()
    assert good.output_token_ids == expected([1, 2], 3) and not good.error


def test_what_finishes_between_steps_is_reported_by_the_next_one():
    core = make()
    a, b = Sequence('a', [1]), Sequence('b', [2])
    core.add_sequences([a, b])
    core.step()
    core.finish_sequences([a], 'abort')
    core.finish_sequences([a], 'stop')    # it has finished already
    assert a.finish_reason == 'abort' and core.has_work
    assert core.step() == [b, a]
    with pytest.raises(BadInput, match="'b' is in use"):
        core.add_sequences([Sequence('b', [3])])
    core.finish_sequences([b], 'abort')
    assert core.has_work and core.step() == [b] and not core.has_work


def test_a_step_that_fails_ends_all_sequences_and_no_later_one():
    core, error = make(), OSError('the device is gone')
    sequences = [Sequence(i, [i]) for i in range(3)]
    core.add_sequences(sequences)
    core.step()
    assert core.fail_sequences(error) == sequences and not core.has_work
    assert all(seq.error is error and seq.finish_reason == 'error' for seq in sequences)
    later = Sequence(0, [5], SamplingParams(max_tokens=2))
    core.add_sequences([later])
    while core.has_work:
        core.step()
    assert later.output_token_ids == expected([5], 2) and not later.error
