"""Masks on the device: the kernel against numpy, and two engines against each other.

One engine samples on the host and asks `LogitsProcessors.apply`, which is numpy; the other has masks and edits in its
staging buffers and the kernel `apply_constraints` in its graph. Both must sample the same tokens.
"""
import math
import random
import re
import sys

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from support.constraints import Favour, answers, cases, engines, model, plugins, seeds, tokenizer, tokens  # noqa: F401
from tinygrad import Tensor

from tinyvllm.engine.defaults import make_engine
from tinyvllm.kernels import masks
from tinyvllm.kernels.metal import Kernel
from tinyvllm.measure import counting
from tinyvllm.metalsim import MetalError
from tinyvllm.models.fused import fused
from tinyvllm.sampling.logits_processors import LogitBias, LogitConstraints, LogitsProcessorPlugin, register_plugin
from tinyvllm.sampling.params import SamplingParams, StructuredOutputs
from tinyvllm.sampling.structured_output import Grammar

few = settings(cases, max_examples=5)
simulated = pytest.mark.skipif(sys.platform == 'darwin', reason='a Mac does not check')
form = StructuredOutputs


# --- the kernel -----------------------------------------------------------------------------------------------

SLOTS, STEPS = 3, 4    # staging buffers, replays of each


def on(device, x, dtype=np.int32):
    return Tensor(np.asarray(x, dtype), device=device).realize()


def random_constraints(rng, rows, V):
    "For each row: nothing, a mask, edits, both. Bits behind the vocabulary are noise."
    held = []
    for _ in range(rows):
        mask = rng.integers(-2**31, 2**31, -(-V // 32)).astype(np.int32) if rng.random() < 0.6 else None
        tokens = rng.permutation(V)[:rng.integers(0, min(V, 9))].tolist() if rng.random() < 0.7 else []
        edits = [(t, float(rng.choice([-np.inf, 1e30, -3.5, 0.25, 100]))) for t in tokens]
        held.append(LogitConstraints(mask, edits) if mask is not None or edits else None)
    return held


def on_device(device, logits, held, slot):
    "The kernel, with a staging buffer that is not the first one, and noise where nothing should be read."
    (R, V), E = logits.shape, 16 * len(held)
    words, flat = -(-V // 32), [pair for c in held if c for pair in c.edits]
    memory = np.full((SLOTS, R, words), 0x5a5a5a5a, np.int32)
    for row, constraints in enumerate(held):
        if constraints and constraints.mask is not None:
            memory[slot, row] = constraints.mask
    pad = [(3, 7e7)] * (E - len(flat))
    tokens, adds = zip(*flat, *pad)
    edges = np.cumsum([0, *(len(c.edits) if c else 0 for c in held)])
    x = dict(masked=on(device, [c is not None and c.mask is not None for c in held]), edges=on(device, edges),
             edited=on(device, tokens), adds=on(device, adds, np.float32), masks=on(device, memory.reshape(-1)),
             step_to_slot=on(device, [9, slot * STEPS + 2, 0]), step_counter=on(device, [4]))    # step 4 looks at entry 4 % 3
    return masks.apply_constraints(on(device, logits, np.float32), x, STEPS).numpy()


def compare(device, seed, V):
    "Random rows through the kernel and through numpy."
    rng = np.random.default_rng(seed)
    logits = rng.standard_normal((3, V)).astype(np.float32)
    held = random_constraints(rng, 3, V)
    want = [(c or LogitConstraints()).apply_to(row) for row, c in zip(logits, held)]
    np.testing.assert_array_equal(on_device(device, logits, held, int(rng.integers(SLOTS))), want)


@cases
@given(seeds, st.sampled_from([33, 70, 8200]))
def test_the_kernel_agrees_with_numpy(seed, V):
    compare('CPU', seed, V)


@few
@given(seeds)
def test_the_metal_text_agrees_with_numpy(seed):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(masks, 'TILE', 64)    # three tiles to a row, the last one short
        compare('METAL', seed, 150)


MUTANTS = [
    ('slot * ROWS + row', 'row'), ('step_counter[0] % IDS', '0'), ('] / STEPS', ']'), ('>> i % 32', '>> (i + 1) % 32'),
    ('from / 32 + me', 'me'), ('has_mask = masked[row]', 'has_mask = 1'), (': -INFINITY', ': -1e30f'),
    ('edited[e] >= from && ', ''), ('+= adds[e]', '= adds[e]'), ('edges[row + 1]', 'edges[row] + 1'),
    (' && at < WORDS', ''), ('threadgroup_barrier(mem_flags::mem_threadgroup);', ''),
    ('threadgroup_barrier(mem_flags::mem_device);', ''), ('min(from + TILE, V)', 'from + TILE'),
]


def compare_tiles(monkeypatch):
    monkeypatch.setattr(masks, 'TILE', 64)
    for seed in range(3):
        compare('METAL', seed, 150)


@simulated
def test_the_simulator_finds_nothing(monkeypatch):
    compare_tiles(monkeypatch)


@simulated
@pytest.mark.parametrize('change', MUTANTS, ids=lambda c: c[0][:30])
def test_a_mutant_is_caught(change, monkeypatch):
    assert change[0] in masks.METAL_TEXT
    monkeypatch.setattr(masks, 'APPLY_CONSTRAINTS', Kernel(masks.METAL_TEXT.replace(*change), c=masks.C_TEXT))
    with pytest.raises((AssertionError, MetalError)):
        compare_tiles(monkeypatch)


# --- both engines ---------------------------------------------------------------------------------------------

def random_params(rng, tokenizer):
    "Parameters of a request with two random kinds of rules."
    text = ''.join(chr(rng.randrange(97, 123)) for _ in range(2))
    kinds = [dict(logit_bias={rng.randrange(512): rng.uniform(-100, 100) for _ in range(5)}),
             dict(allowed_token_ids=rng.sample(range(512), 20)), dict(min_tokens=4, stop_token_ids=[*range(0, 512, 3)]),
             dict(bad_words=[text[0], text, 'xyz']), dict(structured_outputs=form(regex='[a-f]{2,9}(yes|no)')),
             dict(structured_outputs=form(json={'type': 'array', 'items': {'type': 'boolean'}, 'maxItems': 3})),
             dict(structured_outputs=form(choice=['alpha', 'beta', 'be'])), dict(logits_processors={'favour': {'token': 33}}), {}]
    asked = {}
    for kind in rng.sample(kinds, 2):
        asked |= kind
    if 'structured_outputs' in asked:
        for name in ('min_tokens', 'allowed_token_ids', 'bad_words', 'logits_processors'):
            asked.pop(name, None)
    return SamplingParams(max_tokens=rng.randint(5, 16), temperature=rng.choice([0, 0, 0.8]), seed=rng.randrange(99),
                          frequency_penalty=rng.choice([0, 0, 0.5]), logprobs=rng.choice([None, 2]), n=rng.choice([1, 1, 2]),
                          **asked)


@pytest.mark.parametrize('seed', range(3))
def test_both_engines_sample_the_same_tokens(engines, tokenizer, plugins, seed):
    register_plugin(Favour())
    rng = random.Random(seed)
    params = [random_params(rng, tokenizer) for _ in range(8)]
    slow, fast = (answers(engine, params) for engine in engines)
    assert [out.error for out in slow + fast] == [None] * 16
    assert tokens(slow) == tokens(fast)
    for a, b in zip(slow, fast):
        for x, y in zip(a.outputs, b.outputs):    # log-probabilities are the model's own
            assert abs(x.cumulative_logprob - y.cumulative_logprob) < 1e-3


def test_every_kind_is_obeyed(engines, tokenizer, plugins):
    hot = dict(temperature=1.5, max_tokens=24)
    params = [SamplingParams(**hot, seed=1, allowed_token_ids=[5, 6, 511]), SamplingParams(**hot, seed=2, logit_bias={9: 100}),
              SamplingParams(**hot, seed=3, structured_outputs=form(choice=['so', 'long'])),
              SamplingParams(**hot, seed=4, min_tokens=9, stop_token_ids=[*range(400)]),
              SamplingParams(**hot, seed=5, structured_outputs=form(regex=r'\d{3}-\d{2}'), n=2),
              SamplingParams(**hot, seed=6, structured_outputs=form(json_object=True), logit_bias={ord('}') - 33: 100}),
              SamplingParams(**hot, seed=7, bad_words=['a'], allowed_token_ids=tokenizer.encode('ab'))]
    outs = answers(engines[1], params)
    ids = tokens(outs)
    assert set(ids[0][0]) <= {5, 6, 511} and set(ids[1][0]) == {9}
    assert outs[2].outputs[0].text in ('so', 'long') and outs[2].outputs[0].finish_reason == 'stop'
    assert len(ids[3][0]) >= 9
    for answer in outs[4].outputs:
        assert re.fullmatch(r'\d{3}-\d{2}', answer.text)
    assert outs[5].outputs[0].text.replace(' ', '').replace('\n', '') == '{}'
    assert set(ids[6][0]) == set(tokenizer.encode('b'))


def test_edits_leave_the_log_probabilities_alone(engines):
    "A forced token has the probability that the model gave it."
    free = SamplingParams(temperature=0, max_tokens=1, logprobs=20, ignore_eos=True)
    token = list(answers(engines[1], [free])[0].outputs[0].logprobs[0])[5]
    for engine in engines:
        first, forced = answers(engine, [free, SamplingParams(temperature=0, max_tokens=1, logprobs=3, ignore_eos=True,
                                                              allowed_token_ids=[token])], [[7, 8], [7, 8]])
        want = answers(engine, [free], [[7, 8]])[0].outputs[0].logprobs[0]
        got = forced.outputs[0].logprobs[0]
        assert forced.outputs[0].token_ids == [token]
        assert list(got)[:3] == list(want)[:3] and all(abs(got[i].logprob - want[i].logprob) < 1e-5 for i in list(got)[:3])


# --- steps without rules pay nothing --------------------------------------------------------------------------

def test_edits_are_padded_so_that_few_graphs_exist():
    needs = [masks.ConstraintPlan([LogitConstraints(edits=[(0, 1.0)] * n), None]).needs for n in (0, 1, 64, 65, 1024, 1025)]
    assert needs == [(), (64, ()), (64, ()), (256, ()), (1024, ()), (4096, ())]


def kernels(engine):
    "Kernels of each graph, by its key."
    return {key: len(graph.replay.graph.calls) for key, graph in engine.runner.graphs.items()}


@pytest.mark.skipif(Tensor([0]).device != 'CPU', reason='counts the calls of the graph of the CPU')
def test_one_kernel_more_and_none_for_others(model, tokenizer):
    engine = make_engine(fused(model), tokenizer, num_blocks=50, max_num_seqs=2)
    free = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    first = tokens(answers(engine, [free]))
    before = kernels(engine)
    assert all(key[-1] == () for key in before)    # no needs of constraints in them
    answers(engine, [SamplingParams(temperature=0, max_tokens=4, logit_bias={3: 1})])
    answers(engine, [SamplingParams(temperature=0, max_tokens=4, structured_outputs=form(choice=['a', 'b']))])
    after = kernels(engine)
    assert {key: after[key] for key in before} == before
    constrained = {key: n for key, n in after.items() if key not in before}
    assert constrained and all(n == before[*key[:-1], ()] + 1 for key, n in constrained.items())
    with counting() as count:
        assert tokens(answers(engine, [free])) == first
    assert count.compiled == 0 and kernels(engine) == after


def test_only_rules_that_need_output_tokens_wait_for_them(model, tokenizer):
    "A bias needs no token that is in flight; a grammar does. Several steps for a decision: only without rules."
    engine = make_engine(fused(model), tokenizer, num_blocks=50, max_num_seqs=2, num_scheduler_steps=4)
    seen, steps, schedule = [], [], engine.scheduler.schedule

    def note():
        steps.append((batch := schedule()).steps)
        return batch
    engine.scheduler.schedule = note
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LogitBias, 'compute_edits', lambda self, output: seen.append(list(output)) or self.edits)
        answers(engine, [SamplingParams(temperature=0, max_tokens=4, logit_bias={3: 1}, ignore_eos=True)])
    assert [len(output) for output in seen] == [0, 1, 2, 3] and all(output[-1:] == [-1] for output in seen[1:])
    assert set(steps) <= {0, 1}
    steps.clear()
    answers(engine, [SamplingParams(temperature=0, max_tokens=9, ignore_eos=True)])
    assert max(steps) == 4
    steps.clear()
    with pytest.MonkeyPatch.context() as patch:
        consume = Grammar.consume
        patch.setattr(Grammar, 'consume', lambda self, output: seen.append(list(output)) or consume(self, output))
        seen.clear()
        answers(engine, [SamplingParams(temperature=0, max_tokens=9, structured_outputs=form(regex='[ab]{9,20}'))])
    assert max(steps) == 1 and len(seen) >= 9 and not any(-1 in output for output in seen)


# --- an error ends one sequence -------------------------------------------------------------------------------

class Broken(LogitsProcessorPlugin):
    name = 'broken'

    def compute_row(self, args, prompt, output):
        if args.get('where') == 'row' and len(output) == 2:
            raise RuntimeError('row fails')
        return [float('nan')] if args.get('where') == 'nan' and output else [0.0]

    def apply(self, logits, rows):
        return logits


class Crooked(LogitsProcessorPlugin):
    name = 'crooked'

    def compute_row(self, args, prompt, output):
        return [1.0]

    def apply(self, logits, rows):
        raise RuntimeError('apply fails')


class Flat(Crooked):
    name = 'flat'

    def apply(self, logits, rows):
        return logits.sum(1)


class Sick(Crooked):
    name = 'sick'

    def apply(self, logits, rows):
        return logits * math.nan


FAULTS = [({'broken': {'where': 'row'}}, RuntimeError, 2), ({'broken': {'where': 'nan'}}, ValueError, 1),
          ({'crooked': {}}, RuntimeError, 0), ({'flat': {}}, Exception, 0), ({'sick': {}}, FloatingPointError, 0)]


@pytest.mark.parametrize('which', [0, 1])
def test_a_broken_plugin_ends_its_own_request_only(engines, plugins, which):
    for plugin in (Broken(), Crooked(), Flat(), Sick()):
        register_plugin(plugin)
    free = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
    want = tokens(answers(engines[which], [free] * 2))
    for used, kind, length in FAULTS:
        good, bad, other = answers(engines[which], [free, SamplingParams(temperature=0, max_tokens=5, logits_processors=used),
                                                    free], [[7, 8, 9], [7, 8, 9], [7, 8, 10]])
        assert tokens([good, other]) == want and not good.error and not other.error
        assert isinstance(bad.error, kind) and len(bad.outputs[0].token_ids) == length
        assert bad.outputs[0].finish_reason == 'error'


def test_nothing_allowed_is_an_error_of_one(engines):
    both = SamplingParams(temperature=0, max_tokens=5, allowed_token_ids=[400], structured_outputs=form(choice=['a']))
    for engine in engines:
        bad, good = answers(engine, [both, SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)])
        assert isinstance(bad.error, FloatingPointError) and not good.error and len(good.outputs[0].token_ids) == 5
