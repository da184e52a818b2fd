"""Graphs against the eager runner, request by request; and what waits for what.

The engine here has the model with fused kernels, graphs, sampling on the device and tokens that are read a
step late. Beside it stands the portable model, one token after the other, with `sampling` on the host.
"""
import random

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from support.fake_model import EOS, alone, next_token, prompt
from tinyvllm.core.blocks import BlockManager
from tinyvllm.engine.defaults import make_engine
from tinyvllm.errors import BadInput
from tinyvllm.engine.defaults import best_attend, best_cache
from tinyvllm.models.fused import fused
from tinyvllm.reference.generate import same_greedy
from tinyvllm.models.llama import Llama, model_config
from tinyvllm.runner.eager import EagerRunner
from tinyvllm.runner import graphs
from tinyvllm.runner.graphs import Replay
from tinyvllm.runner.jit import JitRunner, next_power_of_four, pad_shape
from tinyvllm.runner.sampled_tokens import SampledTokenBuffer
from tinyvllm.sampling.params import SamplingParams
from tinyvllm.sampling.sampler import Sampled
from tinyvllm.core.scheduler import Scheduler
from tinyvllm.core.sequence import Sequence, SequenceStatus
from tinyvllm.models.weights import tiny_checkpoint


@pytest.fixture(scope='module')
def plain():
    config, state = tiny_checkpoint(seed=3, max_position_embeddings=1024, num_hidden_layers=1)
    return Llama(model_config(config), state)


@pytest.fixture(scope='module')
def model(plain):
    return fused(plain)


def eager(model, seqs=4, budget=32, blocks=200):
    cache = best_cache(model, blocks)
    scheduler = Scheduler(BlockManager(blocks, 16), seqs, budget)
    return make_engine(model, cache=cache, scheduler=scheduler, runner=EagerRunner(model, cache, best_attend(model)))


@pytest.fixture(scope='module')
def engine(model):
    return make_engine(model, num_blocks=400, max_num_seqs=4, max_num_batched_tokens=32)


def answers(engine, prompts, params):
    outputs = [engine.add_request(i, p, q) for i, (p, q) in enumerate(zip(prompts, params))]
    while engine.has_unfinished_requests():
        engine.step()
    pool = engine.scheduler.blocks.pool
    assert len(pool.free) == len(pool.blocks) - 1
    for out in outputs:
        assert out.error is None
    return [[(c.token_ids, c.finish_reason) for c in out.outputs] for out in outputs], outputs


def mixed(n, vocab, seed=0):
    "Requests of every kind: greedy and not, penalties, log-probabilities, several answers, stop tokens."
    rng = random.Random(seed)
    prompts = [[rng.randrange(vocab) for _ in range(rng.randint(1, 60))] for _ in range(n)]
    params = [SamplingParams(
        max_tokens=rng.randint(1, 24), temperature=rng.choice([0, 0.7, 1]), top_p=rng.choice([1, 0.8]),
        top_k=rng.choice([0, 10]), min_p=rng.choice([0, 0.05]), seed=i, ignore_eos=True, n=rng.choice([1, 1, 2]),
        frequency_penalty=rng.choice([0, 0, 0.5]), repetition_penalty=rng.choice([1, 1, 1.2]),
        logprobs=rng.choice([None, None, 3]), stop_token_ids=rng.choice([(), tuple(range(0, vocab, 30))])) for i in range(n)]
    return prompts, params


# --- the same tokens --------------------------------------------------------------------------------

@pytest.mark.parametrize('sizes', [dict(), dict(num_scheduler_steps=4), dict(num_blocks=9)])
def test_mixed_requests_get_the_tokens_of_the_eager_engine(plain, model, sizes):
    prompts, params = mixed(8, plain.config.vocab_size)
    want, slow = answers(eager(plain), prompts, params)
    engine = make_engine(model, **(dict(num_blocks=200, max_num_seqs=4, max_num_batched_tokens=32) | sizes))
    assert isinstance(engine.runner, JitRunner) and engine.scheduler.output_delay == 1
    got, fast = answers(engine, prompts, params)
    assert got == want
    assert sizes.get('num_blocks') != 9 or engine.scheduler.preemptions
    for a, b in zip(slow, fast):
        for x, y in zip(a.outputs, b.outputs):
            assert abs(x.cumulative_logprob - y.cumulative_logprob) < 1e-3
            assert (x.logprobs is None) == (y.logprobs is None)
            for this, other in zip(x.logprobs or (), y.logprobs or ()):
                assert list(this) == list(other)
                assert all(abs(this[i].logprob - other[i].logprob) < 1e-4 for i in this)


@pytest.mark.parametrize('sizes', [(1, 3), pytest.param((1, 2, 3, 5, 11, 23, 64), marks=pytest.mark.slow)])
def test_greedy_tokens_over_all_buckets(plain, model, sizes):
    "Batches padded to their buckets; each token against one plain forward pass. The slow one: 10,000 tokens."
    rng = np.random.default_rng(0)
    engine = make_engine(model, num_blocks=2000, max_num_seqs=64, max_num_batched_tokens=256)
    total = 0
    for size in sizes:
        prompts = [rng.integers(0, plain.config.vocab_size, int(rng.integers(1, 40))).tolist() for _ in range(size)]
        params = [SamplingParams(temperature=0, max_tokens=93 if size > 1 else 40, ignore_eos=True)] * size
        for prompt, [(tokens, _)] in zip(prompts, answers(engine, prompts, params)[0]):
            assert same_greedy(plain, prompt, tokens)
            total += len(tokens)
    assert total == 40 + 93 * sum(sizes[1:])


def test_a_seed_gives_the_same_tokens_alone_and_in_company(engine, model):
    "Bit for bit: no kernel lets a row see how many others there are."
    prompts, params = mixed(10, model.config.vocab_size, seed=5)
    together = answers(engine, prompts, params)[0]
    for i in range(0, 10, 3):
        assert answers(engine, prompts[i:i + 1], params[i:i + 1])[0] == together[i:i + 1]


def test_broken_logits_end_one_request(plain):
    config, state = tiny_checkpoint(seed=3, num_hidden_layers=1)
    weights = state['model.embed_tokens.weight'].numpy()
    weights[9] = np.nan    # the head is another matrix: only sequences with token 9 are hurt
    model = fused(Llama(model_config(config), state))
    model.embedding.parts[0].uop.base.buffer.as_memoryview(force_zero_copy=True)[:] = memoryview(weights).cast('B')
    engine = make_engine(model, num_blocks=40, max_num_seqs=4)
    greedy = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    good, bad = [engine.add_request(i, p, greedy) for i, p in enumerate([[1, 2], [9, 9]])]
    while engine.has_unfinished_requests():
        engine.step()
    assert isinstance(bad.error, FloatingPointError) and bad.outputs[0].finish_reason == 'error'
    assert not good.error and same_greedy(plain, [1, 2], good.outputs[0].token_ids)


def test_log_probabilities_of_a_prompt_are_those_of_the_eager_engine(plain, engine):
    "Rows with forced tokens, in chunks, beside a sequence that decodes and one with penalties."
    prompts = [[5, 6, 7, 8, 9, 10, 11] * 6, [1, 2], [3, 4, 5]]
    params = [SamplingParams(temperature=0, max_tokens=3, prompt_logprobs=3), SamplingParams(seed=2, max_tokens=9, logprobs=2),
              SamplingParams(temperature=0, max_tokens=3, prompt_logprobs=0, repetition_penalty=1.3)]
    want, slow = answers(eager(plain), prompts, params)
    got, fast = answers(engine, prompts, params)
    assert got == want
    for a, b, prompt in zip(slow, fast, prompts):
        assert (a.prompt_logprobs is None) == (b.prompt_logprobs is None)
        for i, (x, y) in enumerate(zip(a.prompt_logprobs or (), b.prompt_logprobs or (), strict=True)):
            assert (x is None) == (y is None) == (i == 0)
            if i:
                assert x.keys() == y.keys() and prompt[i] in y
                assert all(abs(x[token].logprob - y[token].logprob) < 1e-4 for token in x)


# --- tokens that arrive late --------------------------------------------------------------------------

class Late:
    "A device: it keeps each sequence's tokens by itself, and returns the new ones."
    def __init__(self):
        self.ids = {}

    def __call__(self, batch):
        out = []
        for i, (seq, n) in enumerate(zip(batch.seqs, batch.num_new)):
            known = self.ids.setdefault(seq.id, list(seq.token_ids))
            assert known[:len(seq.token_ids)] == seq.token_ids and seq.num_computed + n <= len(known)
            assert len(batch.block_tables[i]) * batch.block_size >= seq.num_computed + n + batch.steps - 1
            new = []
            for _ in range(batch.steps if batch.samples[i] else 0):
                new.append(Sampled(next_token(known), 0.0, None))
                known.append(int(new[-1]))
            out.append(new)
        return out


@settings(max_examples=120, deadline=None)
@given(seed=st.integers(0, 10**6), steps=st.sampled_from([1, 1, 2, 5]), blocks=st.integers(9, 40),
       budget=st.integers(1, 20), seqs=st.integers(1, 6))
def test_late_tokens_change_no_answer(seed, steps, blocks, budget, seqs):
    rng, device = random.Random(seed), Late()
    scheduler = Scheduler(BlockManager(blocks, 4), seqs, budget, steps, output_delay=1)
    requests = [Sequence(i, prompt(rng.randint(1, 9), i), SamplingParams(
        max_tokens=rng.randint(1, 12), ignore_eos=rng.random() < 0.5, stop_token_ids=(7,) * rng.randint(0, 1)),
        (EOS,)) for i in range(rng.randint(1, 8))]
    waiting, aborted, reported = list(requests), set(), []
    for step in range(2000):
        while waiting and rng.random() < 0.5:
            scheduler.add(waiting.pop())
        batch = scheduler.schedule()
        if scheduler.sequences and rng.random() < 0.02:
            aborted.add(victim := rng.choice(list(scheduler.sequences)))
            scheduler.abort(victim)
        reported += [s for s in scheduler.update_from_output(batch, device(batch)) if s.status is SequenceStatus.FINISHED]
        if not waiting and not scheduler.sequences and not scheduler.finished and not any(b.seqs for b, _ in scheduler.delayed):
            break
    assert sorted(s.id for s in reported) == sorted(s.id for s in requests)    # each once
    assert scheduler.blocks.num_free == blocks - 1
    for seq in requests:
        ids, reason = alone(seq.token_ids[:seq.num_prompt], seq.params)
        if seq.id in aborted:
            assert seq.token_ids == ids[:len(seq.token_ids)]
        else:
            assert (seq.token_ids, seq.finish_reason) == (ids, reason)


def test_the_next_step_is_on_its_way_before_the_last_one_is_read(engine, monkeypatch):
    "No wait for the device between two replays: the trace of a request alone."
    trace, run, read = [], engine.runner.launch, SampledTokenBuffer.read
    monkeypatch.setattr(engine.runner, 'launch', lambda *a: trace.append('launch') or run(*a))
    monkeypatch.setattr(SampledTokenBuffer, 'read', lambda *a: trace.append('read') or read(*a))
    answers(engine, [[1, 2, 3]], [SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)])
    assert trace == ['launch'] + ['launch', 'read'] * 4 + ['read']


def test_steps_for_one_decision_end_where_the_answer_ends(model):
    engine = make_engine(model, num_blocks=40, max_num_seqs=4, num_scheduler_steps=8)
    steps = []
    schedule = engine.scheduler.schedule
    engine.scheduler.schedule = lambda: steps.append((batch := schedule()).steps) or batch
    answers(engine, [[1, 2], [3]], [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in (12, 5)])
    assert steps[:3] == [1, 4, 7] and max(steps) <= 8    # the prompts; up to the short answer; the rest


def test_steps_need_a_runner_that_can(plain):
    cache = best_cache(plain, 20)
    with pytest.raises(BadInput, match='EagerRunner reads each token at once'):
        make_engine(plain, cache=cache, runner=EagerRunner(plain, cache, best_attend(plain)), num_scheduler_steps=2)
    with pytest.raises(BadInput, match='num_scheduler_steps is 0'):
        make_engine(plain, num_scheduler_steps=0)


# --- graphs ------------------------------------------------------------------------------------------

def test_a_shape_is_captured_once(engine):
    requests = [[1, 2, 3], [4]], [SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)] * 2
    first = answers(engine, *requests)[0]
    known = dict(engine.runner.graphs)
    assert answers(engine, *requests)[0] == first and engine.runner.graphs == known


def test_there_are_few_shapes():
    assert [next_power_of_four(n, 16) for n in (1, 16, 17, 64, 65, 300)] == [16, 16, 64, 64, 256, 1024]
    assert [pad_shape(n, n) for n in (1, 3, 64, 200)] == [(1, 1), (4, 4), (64, 64), (256, 256)]
    assert [pad_shape(*s) for s in ((5, 1), (40, 2), (300, 17))] == [(16, 1), (64, 4), (512, 64)]


def test_a_capture_that_fails_leaves_the_numbers_in_step(model, monkeypatch):
    "The device counts what it has run; what never ran has no number."
    engine = make_engine(model, num_blocks=50, max_num_seqs=2)
    with monkeypatch.context() as broken:
        broken.setattr(Replay, 'run_first', lambda self: 1 / 0)
        engine.add_request('a', [1, 2, 3], SamplingParams(temperature=0, max_tokens=3))
        with pytest.raises(ZeroDivisionError):
            engine.step()
    assert engine.runner.state.step_id == 0
    engine.fail(RuntimeError('the step failed'))
    assert answers(engine, [[1, 2, 3]], [SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)])[0][0][0][1] == 'length'


def test_a_launch_that_fails_when_its_step_has_run_leaves_the_numbers_in_step(model, monkeypatch):
    "The device has counted it: the next step has the next number, and reads no tokens of this one."
    requests = [[1, 2, 3]], [SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)]
    engine, want = (make_engine(model, num_blocks=50, max_num_seqs=2) for _ in 'ab')
    want = answers(want, *requests)[0]
    with monkeypatch.context() as broken:
        broken.setattr(graphs, 'check_threads', lambda graph: 1 / 0)
        engine.add_request('a', [7] * 3, requests[1][0])
        with pytest.raises(ZeroDivisionError):
            engine.step()
    assert engine.runner.state.step_id == 1
    engine.fail(RuntimeError('the step failed'))
    assert answers(engine, *requests)[0] == want


def test_a_runner_without_constraints_refuses_one_sequence(plain):
    "The others of the batch get their tokens."
    cache = best_cache(plain, 20)
    bare, greedy = JitRunner(plain, cache, best_attend(plain), max_num_seqs=2), SamplingParams(temperature=0, max_tokens=3)
    scheduler = Scheduler(BlockManager(20, 16), 2, output_delay=1)
    good, bad = [Sequence(i, [1, 2], greedy, logits_processors=object() if i else None) for i in range(2)]
    scheduler.add(good)
    scheduler.add(bad)
    while scheduler.sequences:
        batch = scheduler.schedule()
        scheduler.update_from_output(batch, bare(batch))
    assert isinstance(bad.error, BadInput) and bad.finish_reason == 'error'
    assert good.error is None and same_greedy(plain, [1, 2], good.output_token_ids)
