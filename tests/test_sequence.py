"A sequence: what it counts, where it ends; and a batch, which is decided once."
from dataclasses import FrozenInstanceError

import pytest

from tinyvllm.core.sequence import Batch, Sequence, SequenceStatus
from tinyvllm.sampling.params import SamplingParams
from tinyvllm.sampling.sampler import Sampled

EOS = 0


def tokens(*ids):
    return [Sampled(i, -0.5, None) for i in ids]


def request(id, n, **params):
    return Sequence(id, list(range(1, n + 1)), SamplingParams(**params), (EOS,))


def test_several_tokens_in_one_step():
    "As speculation will return them: all but the last are computed."
    seq = Sequence('a', [5, 6], SamplingParams(max_tokens=4, stop_token_ids=(9,)), (EOS,))
    seq.num_computed = 2
    seq.append_tokens(tokens(7, 8))
    assert (seq.num_tokens, seq.num_computed, seq.finish_reason) == (4, 3, None)
    seq.append_tokens(tokens(9, 7, 7))
    assert (seq.token_ids[2:], seq.finish_reason, seq.stop_reason) == ([7, 8, 9], 'stop', 9)
    seq = Sequence('a', [5, 6], SamplingParams(max_tokens=2, stop_token_ids=(9,)), (EOS,))
    seq.append_tokens(tokens(7, 9))
    assert seq.finish_reason == 'stop'    # a reason to stop comes before the length
    seq = Sequence('a', [5, 6], SamplingParams(max_tokens=2), (EOS,))
    seq.append_tokens(tokens(EOS))
    assert (seq.finish_reason, seq.stop_reason) == ('stop', None)


def test_an_entry_that_reaches_the_end_samples():
    seq = request('a', 5)
    for computed, n, samples in ((0, 5, True), (0, 4, False), (3, 2, True), (3, 1, False)):
        seq.num_computed = computed
        assert Batch.of([(seq, n, [1, 2])], 4).samples == [samples]


def test_a_new_sequence_waits():
    seq = Sequence('a', ids := [5, 6, 7], priority=3)
    assert (seq.status, seq.rank[0], seq.num_computed, seq.num_to_compute) == (SequenceStatus.WAITING, 3, 0, 3)
    seq.append_tokens(tokens(9))
    assert ids == [5, 6, 7] and seq.output_token_ids == [9]    # the caller's list is not changed


def test_tokens_in_flight_count():
    seq = request('a', 3, max_tokens=2)
    seq.num_computed, seq.in_flight = 3, 1
    assert (seq.num_tokens, seq.num_to_sample, seq.num_to_compute) == (4, 1, 1)
    seq.num_computed, seq.in_flight = 4, 2
    assert (seq.num_tokens, seq.num_to_sample, seq.num_to_compute) == (5, 0, 0)    # its last token is never computed
    seq.append_tokens(tokens(8))
    assert (seq.num_tokens, seq.in_flight, seq.num_computed, seq.finish_reason) == (5, 1, 4, None)
    seq.append_tokens(tokens(9))
    assert (seq.num_tokens, seq.in_flight, seq.finish_reason) == (5, 0, 'length')


def test_a_preempted_sequence_keeps_its_tokens():
    seq = request('a', 3, max_tokens=5)
    seq.num_computed = 3
    seq.append_tokens(tokens(8))
    seq.num_computed = 0
    seq.append_tokens(tokens(9))    # was in flight
    assert (seq.num_computed, seq.num_to_compute, seq.output_token_ids) == (0, 5, [8, 9])


@pytest.mark.parametrize('ignore_eos, stop_ids', [(False, {EOS, 7}), (True, {7})])
def test_end_tokens(ignore_eos, stop_ids):
    assert request('a', 2, ignore_eos=ignore_eos, stop_token_ids=(7,)).stop_ids == stop_ids


def test_prompt_positions_to_score():
    seq = request('a', 4, prompt_logprobs=0)
    assert seq.num_to_score == 3 and request('b', 4).num_to_score == 0 == request('c', 1, prompt_logprobs=0).num_to_score
    assert Batch.of([(seq, 2, [1])], 4).scores_prompt == [True]
    seq.num_computed = 3
    batch = Batch.of([(seq, 1, [1])], 4)
    assert (batch.scores_prompt, batch.samples) == ([False], [True])
    seq.num_computed, seq.prompt_logprobs = 0, dict.fromkeys((1, 2, 3))
    assert seq.num_to_score == 0    # preempted afterwards: they are known


@pytest.mark.parametrize('params, needs', [({}, False), (dict(temperature=0, seed=1), False), (dict(presence_penalty=1), True),
                                           (dict(frequency_penalty=-1), True), (dict(repetition_penalty=1.1), True)])
def test_what_needs_the_output(params, needs):
    assert request('a', 2, **params).needs_output_tokens is needs
    assert Sequence('a', [1], SamplingParams(**params), logits_processors=object()).needs_output_tokens


def test_a_batch_is_frozen():
    seq = request('a', 5)
    batch = Batch.of([(seq, 5, [1, 2])], 4, copies=((1, 2),), steps=3)
    seq.num_computed, seq.in_flight = 5, 1
    assert (batch.starts, batch.samples, batch.copies, batch.steps, batch.num_tokens) == ([0], [True], [(1, 2)], 3, 5)
    with pytest.raises(FrozenInstanceError):
        batch.steps = 1


def test_an_empty_batch():
    batch = Batch.of([], 4)
    assert batch.seqs == batch.num_new == batch.samples == [] and batch.num_tokens == 0
