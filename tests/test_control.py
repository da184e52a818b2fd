"""What may be said: rules in numpy against the kernel, both paths of an engine against each other, grammars that mean harm.

The eager engine asks `Control.apply`, which is numpy; the other one has masks and edits on its pages and the kernel
`steer` in its graph. Whatever is asked for, both must say the same tokens.
"""
import json
import math
import random
import re
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from tinygrad import Tensor, dtypes

from tinyvllm.sampling import logits_processors as module
from tinyvllm.core.blocks import BlockManager
from tinyvllm.sampling.logits_processors import (Bias, BadWords, Control, Grammar, LogitsProcessor, NotYet, Order, Use, grammar_of, grammars_of,
                              load_processors, make_control, obeyed, packed, register, spellings, steer, unpacked)
from tinyvllm.engine.llm import LLM
from tinyvllm.engine.defaults import make_engine
from tinyvllm.errors import BadInput
from tinyvllm.engine.defaults import best_attend, best_cache
from tinyvllm.models.fused import fused
from tinyvllm.models.llama import Llama, model_config
from tinyvllm.measure import counting
from tinyvllm.kernels.metal import Kernel
from tinyvllm.metalsim import MetalError
from tinyvllm.runner.eager import EagerRunner
from tinyvllm.sampling.params import SamplingParams, StructuredOutputs
from tinyvllm.core.scheduler import Scheduler
from tinyvllm.models.tokenizer import load_tokenizer
from tinyvllm.models.weights import tiny_checkpoint

cases = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
few = settings(cases, max_examples=5)
seeds = st.integers(0, 2**32 - 1)
simulated = pytest.mark.skipif(sys.platform == 'darwin', reason='a Mac does not check')
form = StructuredOutputs


# --- the kernel -----------------------------------------------------------------------------------------

PAGES, STEPS = 3, 4


def on(device, x, dtype=np.int32):
    return Tensor(np.asarray(x, dtype), device=device).realize()


def random_orders(rng, rows, V):
    "For each row: nothing, a mask, edits, both. Bits behind the vocabulary are noise."
    orders = []
    for _ in range(rows):
        mask = rng.integers(-2**31, 2**31, -(-V // 32)).astype(np.int32) if rng.random() < 0.6 else None
        tokens = rng.permutation(V)[:rng.integers(0, min(V, 9))].tolist() if rng.random() < 0.7 else []
        edits = [(t, float(rng.choice([-np.inf, 1e30, -3.5, 0.25, 100]))) for t in tokens]
        orders.append(Order(mask, edits) if mask is not None or edits else None)
    return orders


def steered(device, logits, orders, page):
    "The kernel, with a page that is not the first one, and noise where nothing should be read."
    (R, V), E = logits.shape, 16 * len(orders)
    words, flat = -(-V // 32), [pair for o in orders if o for pair in o.edits]
    memory = np.full((PAGES, R, words), 0x5a5a5a5a, np.int32)
    for row, order in enumerate(orders):
        if order and order.mask is not None:
            memory[page, row] = order.mask
    pad = [(3, 7e7)] * (E - len(flat))
    tokens, adds = zip(*flat, *pad)
    edges = np.cumsum([0, *(len(o.edits) if o else 0 for o in orders)])
    x = dict(masked=on(device, [o is not None and o.mask is not None for o in orders]), edges=on(device, edges),
             edited=on(device, tokens), adds=on(device, adds, np.float32))
    route, clock = on(device, [9, page * STEPS + 2, 0]), on(device, [4])    # ticket 4 looks at route[4 % 3]
    return steer(on(device, logits, np.float32), x, on(device, memory.reshape(-1)), route, clock, STEPS).numpy()


def trial(device, seed, V):
    rng = np.random.default_rng(seed)
    logits = rng.standard_normal((3, V)).astype(np.float32)
    orders = random_orders(rng, 3, V)
    want = [obeyed(row, order or Order()) for row, order in zip(logits, orders)]
    np.testing.assert_array_equal(steered(device, logits, orders, int(rng.integers(PAGES))), want)


@cases
@given(seeds, st.sampled_from([33, 70, 8200]))
def test_masks_and_edits_are_the_oracles(seed, V):
    trial('CPU', seed, V)


@few
@given(seeds)
def test_the_metal_text_says_the_same(seed):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, 'TILE', 64)    # three tiles to a row, the last one short
        trial('METAL', seed, 150)


MUTANTS = [
    ('page * ROWS + row', 'row'), ('clock[0] % ROUTES', '0'), ('] / STEPS', ']'), ('>> i % 32', '>> (i + 1) % 32'),
    ('from / 32 + me', 'me'), ('held = masked[row]', 'held = 1'), (': -INFINITY', ': -1e30f'),
    ('edited[e] >= from && ', ''), ('+= adds[e]', '= adds[e]'), ('edges[row + 1]', 'edges[row] + 1'),
    (' && at < WORDS', ''), ('threadgroup_barrier(mem_flags::mem_threadgroup);', ''),
    ('threadgroup_barrier(mem_flags::mem_device);', ''), ('min(from + TILE, V)', 'from + TILE'),
]


def on_trial(monkeypatch):
    monkeypatch.setattr(module, 'TILE', 64)
    for seed in range(3):
        trial('METAL', seed, 150)


@simulated
def test_the_kernel_survives_the_trial(monkeypatch):
    on_trial(monkeypatch)


@simulated
@pytest.mark.parametrize('change', MUTANTS, ids=lambda c: c[0][:30])
def test_a_mutant_is_caught(change, monkeypatch):
    assert change[0] in module.M_STEER
    monkeypatch.setattr(module, 'STEER', Kernel(module.M_STEER.replace(*change), c=module.C_STEER))
    with pytest.raises((AssertionError, MetalError)):
        on_trial(monkeypatch)


@cases
@given(seeds, st.integers(1, 200))
def test_packed_is_the_inverse_of_unpacked(seed, V):
    ids = np.flatnonzero(np.random.default_rng(seed).random(V) < 0.4)
    assert unpacked(packed(ids, V), V).nonzero()[0].tolist() == ids.tolist()


# --- rules ----------------------------------------------------------------------------------------------

@cases
@given(st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=3), max_size=5), st.lists(st.integers(0, 3), max_size=6))
def test_bad_words_end_nowhere(words, said):
    "Forbidden is exactly what would complete one of them."
    rule = BadWords([tuple(w) for w in words])
    forbidden = {token for token, add in rule.edits(said) if add == -math.inf}
    assert forbidden == {t for t in range(4) if any([*said, t][-len(w):] == w for w in words)}
    assert rule.listens == any(len(w) > 1 for w in words)


def test_rules_add_up():
    control = Control([Bias([(1, 2.0), (3, 1.0)]), NotYet([3, 9], 2), BadWords([(1,)])])
    assert dict(control.edits([5])) == {1: -math.inf, 3: -math.inf, 9: -math.inf}
    assert dict(control.edits([5, 5])) == {1: -math.inf, 3: 1.0}
    assert not control.listens and control.mask([]) is None
    masks = Control([module.Allowed([1, 2, 40], 50), module.Allowed([2, 40, 49], 50)])
    assert unpacked(masks.mask([]), 50).nonzero()[0].tolist() == [2, 40]
    assert masks.apply(np.zeros(50), [])[[1, 2, 49]].tolist() == [-math.inf, 0, -math.inf]


# --- both paths of an engine ----------------------------------------------------------------------------

@pytest.fixture(scope='module')
def tokenizer(folder):
    tokenizer = load_tokenizer(folder)    # 257 tokens, ends are 256 and 2
    tokenizer.check_vocab(512)
    return tokenizer


@pytest.fixture(scope='module')
def plain():
    config, state = tiny_checkpoint(seed=3, num_hidden_layers=1)
    return Llama(model_config(config), state)


@pytest.fixture(scope='module')
def engines(plain, tokenizer):
    "The oracle, and the fast one."
    cache = best_cache(plain, 200)
    eager = make_engine(plain, tokenizer, cache=cache, scheduler=Scheduler(BlockManager(200, 16), 4, 32),
                        runner=EagerRunner(plain, cache, best_attend(plain)))
    return eager, make_engine(fused(plain), tokenizer, num_blocks=200, max_num_seqs=4, max_num_batched_tokens=32)


@pytest.fixture
def plugins(monkeypatch):
    monkeypatch.setattr(module, 'PROCESSORS', {})


def answers(engine, params, prompts=None):
    assert not engine.requests
    outs = [engine.add_request(i, prompts[i] if prompts else [7, 8, 9 + i], p) for i, p in enumerate(params)]
    while engine.has_unfinished_requests():
        engine.step()
    pool = engine.scheduler.blocks.pool
    assert len(pool.free) == len(pool.blocks) - 1
    return outs


def tokens(outs):
    return [[c.token_ids for c in out.outputs] for out in outs]


class Favour(LogitsProcessor):
    "Adds to a token, more with each token that was said."
    name = 'favour'

    def check(self, args):
        if not isinstance(args.get('token'), int):
            raise BadInput('favour takes a token')

    def row(self, args, prompt, said):
        return [args['token'], 0.1 * len(said) + 0.01 * len(prompt)]

    def apply(self, logits, rows):
        ids = Tensor.arange(logits.shape[1]).to(logits.device)
        return logits + (ids == rows[:, :1]).where(rows[:, 1:], 0)


def wishes(rng, tokenizer):
    "One request of a random kind."
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
def test_both_paths_say_the_same(engines, tokenizer, plugins, seed):
    register(Favour())
    rng = random.Random(seed)
    params = [wishes(rng, tokenizer) for _ in range(8)]
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
    said = tokens(outs := answers(engines[1], params))
    assert set(said[0][0]) <= {5, 6, 511} and set(said[1][0]) == {9}
    assert outs[2].outputs[0].text in ('so', 'long') and outs[2].outputs[0].finish_reason == 'stop'
    assert len(said[3][0]) >= 9
    for answer in outs[4].outputs:
        assert re.fullmatch(r'\d{3}-\d{2}', answer.text)
    assert outs[5].outputs[0].text.replace(' ', '').replace('\n', '') == '{}'
    assert set(said[6][0]) == set(tokenizer.encode('b'))


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


# --- who asks for nothing pays nothing ------------------------------------------------------------------

def kernels(engine):
    "Kernels of each graph, by its key."
    return {key: len(graph.step.replay.graph.calls if hasattr(graph.step, 'replay') else graph.replay.graph.calls)
            for key, graph in engine.runner.graphs.items()}


@pytest.mark.skipif(Tensor([0]).device != 'CPU', reason='counts the calls of the graph of the CPU')
def test_one_kernel_more_and_none_for_others(plain, tokenizer):
    engine = make_engine(fused(plain), tokenizer, num_blocks=50, max_num_seqs=2)
    free = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    first = tokens(answers(engine, [free]))
    before = kernels(engine)
    assert all(len(key) == 5 for key in before)    # nothing about steering in them
    answers(engine, [SamplingParams(temperature=0, max_tokens=4, logit_bias={3: 1})])
    answers(engine, [SamplingParams(temperature=0, max_tokens=4, structured_outputs=form(choice=['a', 'b']))])
    after = kernels(engine)
    assert {key: after[key] for key in before} == before
    steered = {key: n for key, n in after.items() if key not in before}
    assert steered and all(n == before[key[:5]] + 1 for key, n in steered.items())
    with counting() as count:
        assert tokens(answers(engine, [free])) == first
    assert count.compiled == 0 and kernels(engine) == after


def test_only_who_listens_is_waited_for(plain, tokenizer):
    "A bias needs no token that is on its way; a grammar does. Several steps for a decision: only without control."
    engine = make_engine(fused(plain), tokenizer, num_blocks=50, max_num_seqs=2, num_scheduler_steps=4)
    heard, steps, schedule = [], [], engine.scheduler.schedule

    def note():
        steps.append((batch := schedule()).steps)
        return batch
    engine.scheduler.schedule = note
    with pytest.MonkeyPatch.context() as patch:
        listen = module.Grammar.hear
        patch.setattr(module.Grammar, 'hear', lambda self, said: heard.append(list(said)) or listen(self, said))
        patch.setattr(module.Bias, 'edits', lambda self, said: heard.append(list(said)) or self.pairs)
        answers(engine, [SamplingParams(temperature=0, max_tokens=4, logit_bias={3: 1}, ignore_eos=True)])
    assert [len(said) for said in heard] == [0, 1, 2, 3] and all(said[-1:] == [-1] for said in heard[1:])
    assert set(steps) <= {0, 1}
    heard.clear(), steps.clear()
    answers(engine, [SamplingParams(temperature=0, max_tokens=9, ignore_eos=True)])
    assert max(steps) == 4
    steps.clear()
    answers(engine, [SamplingParams(temperature=0, max_tokens=9, structured_outputs=form(regex='[ab]{9,20}'))])
    assert max(steps) == 1


# --- an error ends one sequence -------------------------------------------------------------------------

class Broken(LogitsProcessor):
    name = 'broken'

    def row(self, args, prompt, said):
        if args.get('where') == 'row' and len(said) == 2:
            raise RuntimeError('row fails')
        return [float('nan')] if args.get('where') == 'nan' and said else [0.0]

    def apply(self, logits, rows):
        return logits


class Crooked(LogitsProcessor):
    name = 'crooked'

    def row(self, args, prompt, said):
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
        register(plugin)
    free = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
    want = tokens(answers(engines[which], [free] * 2))
    for used, kind, said in FAULTS:
        good, bad, other = answers(engines[which], [free, SamplingParams(temperature=0, max_tokens=5, logits_processors=used),
                                                    free], [[7, 8, 9], [7, 8, 9], [7, 8, 10]])
        assert tokens([good, other]) == want and not good.error and not other.error
        assert isinstance(bad.error, kind) and len(bad.outputs[0].token_ids) == said
        assert bad.outputs[0].finish_reason == 'error'


@pytest.mark.parametrize('which', [0, 1])
def test_a_grammar_that_gives_up_ends_its_own_request_only(engines, monkeypatch, which):
    make, calls = module.next_mask, []

    def tired(matcher, words):
        calls.append(matcher)
        if len(calls) == 5:
            raise BadInput('structured_outputs: too complex')
        return make(matcher, words)
    shape = form(regex='[ab]{30}')
    asked = SamplingParams(temperature=0, max_tokens=20, structured_outputs=shape)
    good = tokens(answers(engines[which], [asked]))[0]
    monkeypatch.setattr(module, 'next_mask', tired)
    a, b = answers(engines[which], [asked, asked], [[7, 8, 9]] * 2)
    failed, fine = sorted((a, b), key=lambda out: out.error is None)
    assert 'too complex' in str(failed.error) and tokens([fine])[0] == good
    assert answers(engines[which], [asked])[0].error is None    # and nothing is left of it


def test_nothing_allowed_is_an_error_of_one(engines):
    both = SamplingParams(temperature=0, max_tokens=5, allowed_token_ids=[400], structured_outputs=form(choice=['a']))
    for engine in engines:
        bad, good = answers(engine, [both, SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)])
        assert isinstance(bad.error, FloatingPointError) and not good.error and len(good.outputs[0].token_ids) == 5


# --- grammars -------------------------------------------------------------------------------------------

def rule_of(tokenizer, V=512, **wish):
    control = make_control(SamplingParams(structured_outputs=form(**wish)), tokenizer, SimpleNamespace(vocab_size=V))
    return control.rules[0]


def accepts(rule, tokenizer, text):
    "Does the grammar let all of it pass, and an end after it?"
    said = []
    for token in [*tokenizer.encode(text, add_bos=False, parse_special=False), tokenizer.eos_ids[0]]:
        if not unpacked(rule.mask(said), 512)[token]:
            return False
        said.append(token)
    return True


@settings(cases, max_examples=12)
@given(st.lists(st.text(min_size=1, max_size=6), min_size=1, max_size=4, unique=True), st.text(min_size=1, max_size=6))
def test_a_choice_is_exactly_its_texts(tokenizer, choice, other):
    "Quotes, control characters, emoji: whatever JSON can hold."
    rule = rule_of(tokenizer, choice=choice)
    assert all(accepts(rule.copy(), tokenizer, text) for text in choice)
    assert accepts(rule.copy(), tokenizer, other) == (other in choice)


@pytest.mark.parametrize('pattern', ['a+b?', 'a/b', r'[^\n"]{2}', r'(x|yy)\.z', 'é{2}', r'\d+(\.\d)?'])
def test_a_regex_is_the_same_as_in_python(tokenizer, pattern):
    rule, rng, alphabet = rule_of(tokenizer, regex=pattern), random.Random(0), 'abxyz/."é17\n'
    texts = [''.join(rng.choices(alphabet, k=rng.randint(1, 4))) for _ in range(60)] + ['aab', 'a/b', 'yy.z', 'éé', '17.1']
    for text in texts:
        assert accepts(rule.copy(), tokenizer, text) == bool(re.fullmatch(pattern, text)), text


def test_unused_rows_are_never_allowed(tokenizer):
    "The model has 512 rows, the tokenizer 257 tokens; a special token is no text."
    mask = unpacked(rule_of(tokenizer, regex='(.|\n)+').mask([]), 512)
    assert not mask[257:].any() and not mask[list(tokenizer.special_ids)].any() and mask.sum() > 150


def test_gbnf_and_lark_are_both_grammars(tokenizer):
    for grammar in ('root ::= "<" [a-z]+ ">"', 'start: "<" /[a-z]+/ ">"'):
        rule = rule_of(tokenizer, grammar=grammar)
        assert accepts(rule.copy(), tokenizer, '<ab>') and not accepts(rule.copy(), tokenizer, '<>')


@settings(cases, max_examples=20)
@given(seeds)
def test_a_parser_goes_back_to_what_was_said(tokenizer, seed):
    "Guesses that were taken back leave nothing."
    rng, first = random.Random(seed), rule_of(tokenizer, regex='([a-c]{1,3}[0-9]?)+')
    walking, said = first.copy(), []
    for _ in range(12):
        said = said[:rng.randint(max(0, len(said) - 3), len(said))]
        fresh = first.copy()
        mask = unpacked(walking.mask(said), 512)
        assert (mask == unpacked(fresh.mask(said), 512)).all()
        said.append(rng.choice(mask[:256].nonzero()[0].tolist()))


def test_after_the_end_the_step_that_is_thrown_away_does_not_fail(tokenizer):
    rule = rule_of(tokenizer, choice=['ab'])
    said = [*tokenizer.encode('ab'), tokenizer.eos_ids[0]]
    for n in range(len(said) + 1):
        rule.mask(said[:n])


def test_answers_of_one_request_walk_alone(engines, tokenizer):
    out, = answers(engines[1], [SamplingParams(temperature=2, max_tokens=30, n=4, seed=5,
                                               structured_outputs=form(regex='[a-z]{3,12}'))])
    texts = {answer.text for answer in out.outputs}
    assert len(texts) > 1 and all(re.fullmatch('[a-z]{3,12}', text) for text in texts)


def test_compiled_grammars_are_shared_and_bounded(tokenizer):
    grammars = module.Grammars(tokenizer, 512, room=3 * 2**20)
    text = [grammar_of(form(regex=f'a{{{n}}}')) for n in range(1, 6)]
    built = [grammars.matcher(t) for t in text]
    assert list(grammars.kept) == text[-3:] and len({id(m) for m in built}) == 5
    grammars.matcher(text[2]), grammars.matcher(text[0])
    assert list(grammars.kept) == [text[4], text[2], text[0]]    # the least used went


def test_threads_compile_at_the_same_time(tokenizer):
    made, wrong = [], []

    def ask(n):
        try:
            made.append(rule_of(tokenizer, regex=f'[a-z]{{{n % 3 + 1}}}'))
        except BaseException as error:
            wrong.append(error)
    threads = [threading.Thread(target=ask, args=(n,)) for n in range(9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and len({id(rule.matcher) for rule in made}) == 9
    assert grammars_of(tokenizer, 512) is grammars_of(tokenizer, 512)


# --- hostile input --------------------------------------------------------------------------------------

def nested(n, leaf='{"type": "string"}'):
    return '{"items":' * n + leaf + '}' * n


HOSTILE = {
    'unclosed regex': (dict(regex='((('), 'invalid regex'), 'look-ahead': (dict(regex='(?=a)b'), 'invalid regex'),
    'backslash': (dict(regex='ab\\'), 'ends in a backslash'), 'never': (dict(regex=r'[^\s\S]'), 'structured_outputs'),
    'long regex': (dict(regex='a' * 70_000), '70000 bytes'), 'surrogate': (dict(regex='\ud800'), 'not valid Unicode'),
    'no JSON': (dict(json='{"a'), 'not JSON'), 'deep': (dict(json=nested(70)), '71 levels'),
    'very deep': (dict(json='[' * 50_000), 'nested too deeply'), 'false': (dict(json='false'), 'structured_outputs.json'),
    'unknown type': (dict(json='{"type": "strin"}'), 'structured_outputs.json'),
    'not honoured': (dict(json='{"not": {"type": "string"}}'), 'not'),
    'remote': (dict(json='{"$ref": "http://127.0.0.1:9/x.json"}'), 'does not fetch'),
    'a schema in itself': (dict(json='{"allOf": [{"$ref": "#"}]}'), 'structured_outputs'),
    'doubling tokens': (dict(grammar='start: R0\n' + ''.join(f'R{i}: R{i + 1} R{i + 1}\n' for i in range(40)) + 'R40: "a"'),
                        'structured_outputs.grammar'),
    'no grammar': (dict(grammar='hello'), 'structured_outputs.grammar'), 'bad GBNF': (dict(grammar='root ::= ((('), 'grammar'),
    'overflows the stack': (dict(grammar='start: r0\n' + ''.join(f'r{i}: r{i + 1}\n' for i in range(4000)) + 'r4000: "a"'),
                            'too complex'),
    'slow numbers': (dict(json='{"type": "integer", "multipleOf": 999983}'), 'too complex'),
    'never ends': (dict(grammar='start: A\nA: ' + ' & '.join(f'/(.|\\n)*a{i}.{{5}}(.|\\n)*/' for i in range(30))),
                   'too complex'),
    'many choices': (dict(choice=['x' * 50 + str(i) for i in range(2000)]), 'bytes'),
    'choice of half a character': (dict(choice=['\ud83d']), 'structured_outputs.choice'),
}


@pytest.mark.parametrize('name', HOSTILE)
def test_a_hostile_grammar_is_refused_in_time(name, tokenizer, monkeypatch):
    monkeypatch.setattr(module, 'PATIENCE', 1)
    wish, message = HOSTILE[name]
    start = time.perf_counter()
    with pytest.raises(BadInput, match=re.escape(message)) as error:
        rule_of(tokenizer, **wish)
    assert time.perf_counter() - start < 20    # and not the hour that some would take; a machine may be busy
    assert error.value.param == 'structured_outputs'
    assert len(str(error.value)) < 250 and '\n' not in str(error.value)


@pytest.mark.parametrize('wish', [dict(regex='[a-z]{1,2000}'), dict(regex='(a{1,9999}){1,9999}'), dict(regex='(.|\n)*a(.|\n){200}'),
                                  dict(json={'enum': [f'value{i}' for i in range(4000)]}), dict(json={'type': 'string', 'maxLength': 10**6}),
                                  dict(json={'type': 'object', 'properties': {f'p{i}': {'type': 'string'} for i in range(500)}}),
                                  dict(grammar='start: e\ne: e e | "a" | "a" "a"'), dict(json=nested(60))])
def test_a_large_grammar_is_allowed_or_refused_but_fast(wish, tokenizer):
    "A dozen steps along it: neither the compiler nor a mask takes long."
    try:
        rule, said, slowest, rng = rule_of(tokenizer, **wish), [], 0, random.Random(0)
        for _ in range(12):
            start = time.perf_counter()
            free = unpacked(rule.mask(said), 512).nonzero()[0].tolist()
            slowest = max(slowest, time.perf_counter() - start)
            said.append(rng.choice(free))
            if said[-1] in tokenizer.eos_ids:
                break
        assert slowest < 5    # 3 ms, if nobody else wants the processor
    except BadInput as error:
        assert error.param == 'structured_outputs'


def test_a_bad_grammar_after_a_good_one(engines, tokenizer):
    "vLLM's engine died of this once."
    good = SamplingParams(temperature=0, max_tokens=6, structured_outputs=form(choice=['yes', 'no']))
    first = tokens(answers(engines[1], [good]))
    with pytest.raises(BadInput):
        engines[1].add_request('bad', [1], SamplingParams(structured_outputs=form(regex='(')))
    assert tokens(answers(engines[1], [good])) == first


WRONG = [(dict(logit_bias={512: 1}), 'logit_bias'), (dict(allowed_token_ids=[3, 600]), 'allowed_token_ids'),
         (dict(logits_processors={'none such': {}}), 'logits_processors'),
         (dict(bad_words=['x' * 300, 'y' * 300]), 'bad_words'),
         (dict(structured_outputs=form(choice=['a']), ignore_eos=True), 'structured_outputs'),
         (dict(structured_outputs=form(choice=['a']), min_tokens=3), 'structured_outputs')]


@pytest.mark.parametrize('asked,param', WRONG, ids=lambda x: x if isinstance(x, str) else '')
def test_wishes_that_cannot_be_met(tokenizer, asked, param):
    with pytest.raises(BadInput) as error:
        make_control(SamplingParams(**asked), tokenizer, SimpleNamespace(vocab_size=512))
    assert error.value.param == param


def test_without_a_tokenizer_there_is_no_text(tokenizer):
    config = SimpleNamespace(vocab_size=512)
    for asked in (dict(bad_words=['a']), dict(structured_outputs=form(regex='a'))):
        with pytest.raises(BadInput, match='no tokenizer'):
            make_control(SamplingParams(**asked), None, config)
    assert make_control(SamplingParams(logit_bias={3: 1}), None, config).edits([]) == [(3, 1)]
    assert make_control(SamplingParams(), None, config) is None


def test_without_llguidance_the_error_says_what_to_do(tokenizer, monkeypatch):
    monkeypatch.setattr(module, 'find_spec', lambda name: None)
    monkeypatch.setitem(sys.modules, 'llguidance', None)    # whoever imports it fails
    monkeypatch.setitem(vars(tokenizer), 'grammars', {})
    with pytest.raises(BadInput, match=re.escape("pip install 'tinyvllm[serve]'")):
        rule_of(tokenizer, regex='abc')
    assert make_control(SamplingParams(logit_bias={3: 1}), tokenizer, SimpleNamespace(vocab_size=512))


# --- plugins --------------------------------------------------------------------------------------------

def test_plugins_are_loaded_by_name_only(plugins, monkeypatch):
    class Point(SimpleNamespace):
        def load(self):
            loaded.append(self.name)
            return self.thing
    loaded = []
    points = [Point(name='favour', thing=Favour), Point(name='evil', thing=1 / 1), Point(name='other', thing=Favour())]
    monkeypatch.setattr(module, 'entry_points', lambda group: points if group == 'tinyvllm.logits_processors' else [])
    load_processors([])
    assert not loaded and not module.PROCESSORS
    load_processors(['favour'])
    assert loaded == ['favour'] and isinstance(module.PROCESSORS['favour'], Favour)
    for name, message in (('nothing', 'there are: favour, evil, other'), ('evil', 'no LogitsProcessor'), ('other', 'calls itself')):
        with pytest.raises(BadInput, match=message):
            load_processors([name])


def test_arguments_are_checked_at_admission(plugins):
    register(Favour())
    with pytest.raises(BadInput, match='takes a token'):
        make_control(SamplingParams(logits_processors={'favour': {}}), None, SimpleNamespace(vocab_size=8))
    with pytest.raises(BadInput, match='an object'):
        Use('favour', '[1]', [])


def test_greedy_requests_skip_what_keeps_the_likeliest(plugins):
    class Calm(LogitsProcessor):
        name, argmax_invariant = 'calm', True
    register(Calm())
    config, used = SimpleNamespace(vocab_size=8), {'calm': {}}
    assert make_control(SamplingParams(temperature=0, logits_processors=used), None, config) is None
    assert len(make_control(SamplingParams(temperature=1, logits_processors=used), None, config).processors) == 1


def test_a_plugin_sees_only_those_who_use_it(engines, plugins):
    register(Favour())
    free = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    uses = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, logits_processors={'favour': {'token': 77}})
    want = tokens(answers(engines[1], [free, free]))
    a, b, c = answers(engines[1], [free, uses, free], [[7, 8, 9], [7, 8, 9], [7, 8, 10]])
    assert tokens([a, c]) == want and tokens([b]) == tokens(answers(engines[0], [uses]))


# --- a real model ---------------------------------------------------------------------------------------

def test_random_schemas_are_obeyed_by_a_real_model(monkeypatch):
    "`benchmarks/json_schemas.py` does this with 200 larger ones."
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / 'benchmarks')
    pytest.importorskip('jsonschema')
    import json_schemas
    llm, rng = LLM('smollm2', num_blocks=300, max_num_seqs=8), random.Random(7)
    schemas = [json_schemas.random_schema(rng, depth=1) for _ in range(24)]
    right, cut, bad = json_schemas.judged(llm, schemas, constrained=True, max_tokens=60)
    assert not bad and right >= 20 and right + cut == 24
