"""Sampling against brute force: exact distributions, seeds, penalties, log-probabilities, bad input.

Statistical tests use fixed seeds, so they always give the same verdict. Their thresholds are
those of a test that rejects a correct sampler once in a million random seeds (ALPHA).
"""
import dataclasses
import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tinyvllm.errors import BadInput
from tinyvllm.sampling.params import SamplingParams, StructuredOutputs
from tinyvllm.sampling.sampler import (Sampled, Sampler, apply_count_penalties, apply_min_p,
    apply_repetition_penalty, apply_temperature, apply_top_k, apply_top_p, draw_token,
    log_softmax, process_logits, softmax, select_top_ids, draw_uniform)

ALPHA = 1e-6
sometimes_slow = settings(deadline=None)  # a busy machine is not a failure
LOGITS = [1.0, 2.5, -0.5, 2.0, 0.0, 1.5, 2.5, -3.0]  # two tie for the first place
PROMPT, OUTPUT = (1, 4, 1), (6, 6, 2)


# --- oracles: plain Python floats, a full sort, no code shared with the module -------------------

def exact(logits, prompt=(), output=(), temperature=1.0, top_k=0, top_p=1.0, min_p=0.0,
          repetition_penalty=1.0, presence_penalty=0.0, frequency_penalty=0.0):
    "The probabilities that the knobs ask for, and the distance to the nearest cut-off."
    xs, gap = [float(x) for x in logits], 1.0
    for i in {*prompt, *output}:
        xs[i] = xs[i] / repetition_penalty if xs[i] > 0 else xs[i] * repetition_penalty
    for i in set(output):
        xs[i] -= frequency_penalty * output.count(i) + presence_penalty
    xs = [x / temperature for x in xs]

    def normal(alive):
        m = max(xs[i] for i in alive)
        es = {i: math.exp(xs[i] - m) for i in alive}
        total = math.fsum(es.values())
        return {i: e / total for i, e in es.items()}

    ps = normal([i for i, x in enumerate(xs) if x > -math.inf])
    cut = min_p * max(ps.values())
    if min_p: gap = min([gap, *(abs(p - cut) for p in ps.values() if p < max(ps.values()))])
    ps = normal([i for i, p in ps.items() if p >= cut])
    if top_k > 0: ps = normal(sorted(ps, key=lambda i: (-xs[i], i))[:top_k])
    if top_p < 1:
        order = sorted(ps, key=lambda i: (-xs[i], i))
        before = [math.fsum(ps[i] for i in order[:rank]) for rank in range(len(order))]
        gap = min([gap, *(abs(b - top_p) for b in before)])
        ps = normal([i for i, b in zip(order, before) if b < top_p])
    return [ps.get(i, 0.0) for i in range(len(xs))], gap


def chi2_tail(x, dof):
    "P(a chi-square variable with `dof` degrees of freedom exceeds `x`): the finite sums."
    if dof % 2 == 0:
        terms = [math.exp(-x / 2)]
        for i in range(1, dof // 2): terms.append(terms[-1] * x / 2 / i)
        return math.fsum(terms)
    total, term = math.erfc(math.sqrt(x / 2)), math.sqrt(2 * x / math.pi) * math.exp(-x / 2)
    for i in range(1, dof, 2):
        total, term = total + term, term * x / (i + 2)
    return total


def check_shares(tokens, probs):
    "The chi-square test of `tokens` against `probs`; what is forbidden must never occur."
    counts = np.bincount(tokens, minlength=len(probs))
    assert counts[[i for i, p in enumerate(probs) if p == 0]].sum() == 0
    bins, pool = [], [0.0, 0]  # (expected, seen); rare tokens share a bin until they expect 10
    for p, n in sorted(zip(probs, counts.tolist())):
        pool = [pool[0] + p * len(tokens), pool[1] + n]
        if pool[0] >= 10: bins, pool = [*bins, pool], [0.0, 0]
    bins[-1] = [a + b for a, b in zip(bins[-1], pool)]
    if len(bins) == 1: return
    x = sum((n - e)**2 / e for e, n in bins)
    assert chi2_tail(x, len(bins) - 1) > ALPHA, bins


def test_the_oracles_themselves():
    for x, dof, p in ((3.841459, 1, 0.05), (5.991465, 2, 0.05), (7.814728, 3, 0.05),
                      (18.307038, 10, 0.05), (24.724970, 11, 0.01)):
        assert chi2_tail(x, dof) == pytest.approx(p, rel=1e-5)
    assert exact([0, 0, math.log(2)])[0] == pytest.approx([.25, .25, .5])
    with pytest.raises(AssertionError): check_shares([0] * 600 + [1] * 400, [.5, .5])
    with pytest.raises(AssertionError): check_shares([0, 1, 2] * 100, [.5, .5, 0])


# --- the distribution of every knob, and of combinations -----------------------------------------

KNOBS = [
    {}, {"temperature": 0.5}, {"temperature": 1.7}, {"min_p": 0.2}, {"min_p": 1.0},
    {"top_k": 1}, {"top_k": 2}, {"top_k": 4}, {"top_k": -1}, {"top_k": 100},
    {"top_p": 0.2}, {"top_p": 0.7}, {"top_p": 0.97}, {"top_p": 1e-6},
    {"repetition_penalty": 1.8}, {"repetition_penalty": 0.6},
    {"presence_penalty": 1.5}, {"presence_penalty": -1.0}, {"frequency_penalty": 0.7},
    {"frequency_penalty": -0.4},
    {"temperature": 1.5, "min_p": 0.15}, {"top_k": 5, "top_p": 0.6},
    {"temperature": 2.0, "top_k": 6, "top_p": 0.8, "min_p": 0.1},
    {"temperature": 0.7, "top_p": 0.9, "repetition_penalty": 1.3, "frequency_penalty": 0.5},
    {"temperature": 1.3, "top_k": 5, "top_p": 0.85, "min_p": 0.05, "repetition_penalty": 1.2,
     "presence_penalty": 0.4, "frequency_penalty": 0.3},
]
named = pytest.mark.parametrize("knobs", KNOBS, ids=lambda k: "-".join(f"{n}{v}" for n, v in k.items()))


@named
def test_distribution_over_seeds(knobs):
    "A fresh request per draw_token, in the middle of an answer, seeds 0, 1, 2, ..."
    probs, gap = exact(LOGITS, PROMPT, OUTPUT, **knobs)
    assert gap > 1e-7
    samplers = (Sampler(SamplingParams(seed=s, **knobs), PROMPT, OUTPUT) for s in range(4000))
    check_shares([s(LOGITS).token_id for s in samplers], probs)


@pytest.mark.parametrize("knobs", [k for k in KNOBS if not any("penalty" in n for n in k)],
                         ids=lambda k: "-".join(f"{n}{v}" for n, v in k.items()))
def test_distribution_over_positions(knobs):
    "One request, many tokens."
    sampler = Sampler(SamplingParams(seed=1234, **knobs))
    check_shares([sampler(LOGITS).token_id for _ in range(4000)], exact(LOGITS, **knobs)[0])


def test_distribution_of_a_large_vocabulary():
    "49,152 tokens in 64 groups of one total each, so that a shift of the line would show."
    logits = np.random.default_rng(3).normal(size=49_152).astype(np.float32) * 2
    probs = softmax(logits.astype(np.float64)).reshape(64, -1).sum(1)
    tokens = [draw_token(logits.astype(np.float64), draw_uniform(9, t)) for t in range(2000)]
    check_shares(np.array(tokens) // 768, probs)


@given(st.lists(st.floats(-8, 8, width=32) | st.integers(-2, 2).map(float) | st.just(-math.inf),
                min_size=1, max_size=40).filter(lambda xs: max(xs) > -math.inf),
       st.fixed_dictionaries({}, optional={
           "temperature": st.floats(0.1, 5), "top_k": st.integers(-1, 45), "top_p": st.floats(.01, 1),
           "min_p": st.floats(0, 1), "repetition_penalty": st.floats(.2, 3),
           "presence_penalty": st.floats(-2, 2), "frequency_penalty": st.floats(-2, 2)}),
       st.data())
@settings(sometimes_slow, max_examples=400)
def test_process_logits_against_brute_force(logits, knobs, data):
    ids = st.lists(st.integers(0, len(logits) - 1), max_size=6)
    prompt, output = tuple(data.draw(ids)), tuple(data.draw(ids))
    probs, gap = exact(logits, prompt, output, **knobs)
    assume(gap > 1e-9)
    sampler = Sampler(SamplingParams(**knobs), prompt, output)
    got = process_logits(np.array(logits), sampler.params, sampler.seen, sampler.counts)
    assert np.allclose(softmax(got), probs, atol=1e-9)


# --- each knob against a full sort, ties included ------------------------------------------------

rows = st.lists(st.integers(-3, 3).map(float) | st.floats(-30, 30, width=32) | st.just(-math.inf),
                min_size=1, max_size=200).filter(lambda xs: max(xs) > -math.inf).map(np.array)


def by_sort(x):
    "The ids of all allowed tokens, best first, equal values by id."
    return sorted((i for i, v in enumerate(x) if v > -math.inf), key=lambda i: (-x[i], i))


@given(rows, st.integers(0, 210))
@sometimes_slow
def test_top_ids_and_top_k(x, k):
    order = by_sort(x)[:k]
    assert select_top_ids(x, k).tolist() == order
    out = apply_top_k(x, k)
    if k == 0 or k >= len(x): assert out is x
    else: assert out.tolist() == [v if i in order else -math.inf for i, v in enumerate(x)]


@given(rows, st.floats(1e-9, 1), st.integers(1, 20))
@sometimes_slow
def test_top_p_for_any_number_of_candidates(x, top_p, n):
    "Taking candidates in rounds gives what the sorted row gives, to the bit."
    order, mass, kept = by_sort(x), 0.0, []
    probs = dict(zip(sorted(order), softmax(x[sorted(order)])))
    for i in order:
        if mass >= top_p: break
        kept.append(i)
        mass += probs[i]
    if top_p == 1: kept = order
    expect = [v if i in kept else -math.inf for i, v in enumerate(x)]
    assert apply_top_p(x, top_p, n).tolist() == apply_top_p(x, top_p).tolist() == expect


@given(rows, st.floats(0, 1))
@sometimes_slow
def test_min_p(x, min_p):
    ps, out = softmax(x), apply_min_p(x, min_p)
    for p, before, after in zip(ps, x, out):
        assert after in (before, -math.inf)
        if min_p and abs(p - min_p * ps.max()) > 1e-12:
            assert (after > -math.inf) == (p > min_p * ps.max())
    assert out[x.argmax()] == x.max()


def test_ties_go_to_the_lower_id():
    same = np.zeros(1000)
    assert select_top_ids(same, 3).tolist() == [0, 1, 2]
    assert np.flatnonzero(apply_top_k(same, 7) == 0).tolist() == list(range(7))
    assert np.flatnonzero(apply_top_p(same, 0.0105) == 0).tolist() == list(range(11))
    assert apply_top_p(np.zeros(4), 0.5).tolist() == [0, 0, -math.inf, -math.inf]
    assert np.flatnonzero(apply_min_p(np.array([1., 2, 2]), 1.0) > -math.inf).tolist() == [1, 2]


def test_penalties_by_hand():
    x = np.array([2.0, -1.0, 0.0, 4.0, -math.inf])
    assert apply_repetition_penalty(x, {0, 1, 2, 4}, 2.0).tolist() == [1, -2, 0, 4, -math.inf]
    assert apply_repetition_penalty(x, {0, 1}, 0.5).tolist() == [4, -0.5, 0, 4, -math.inf]
    assert apply_count_penalties(x, {0: 2, 4: 1}, 0.5, 0.25).tolist() == [1, -1, 0, 4, -math.inf]
    assert apply_count_penalties(x, {3: 1}, -1.0, 0.0).tolist() == [2, -1, 0, 5, -math.inf]


def test_what_each_penalty_looks_at():
    "Repetition: prompt and output. Presence and frequency: output only, growing as it grows."
    greedy = {"temperature": 0, "logprobs": 0}
    assert Sampler(SamplingParams(**greedy, repetition_penalty=9), [1])([1., 2.]).token_id == 0
    assert Sampler(SamplingParams(**greedy, presence_penalty=2), [1])([1., 2.]).token_id == 1
    s = Sampler(SamplingParams(**greedy, frequency_penalty=0.4))
    assert [s([0., 1.]).token_id for _ in range(5)] == [1, 1, 1, 0, 1]
    s = Sampler(SamplingParams(**greedy, presence_penalty=0.6))
    assert [s([0., .5]).token_id for _ in range(4)] == [1, 0, 1, 1]


# --- off means off, greedy means greedy, inputs stay -----------------------------------------------

@given(rows)
@sometimes_slow
def test_knobs_that_are_off_return_the_same_array(x):
    for off in (apply_temperature(x, 1.0), apply_min_p(x, 0.0), apply_top_k(x, 0), apply_top_k(x, -1),
                apply_top_k(x, len(x)), apply_top_p(x, 1.0), apply_repetition_penalty(x, {0}, 1.0),
                apply_count_penalties(x, {0: 3}, 0.0, 0.0),
                process_logits(x, SamplingParams(), {0}, {0: 3})):
        assert off is x


def test_explicit_no_ops_give_the_same_tokens():
    x = np.random.default_rng(0).normal(size=300).astype(np.float32)
    a = Sampler(SamplingParams(seed=5))
    b = Sampler(SamplingParams(seed=5, top_k=-1, top_p=1, min_p=0, temperature=1, repetition_penalty=1))
    assert [a(x) for _ in range(50)] == [b(x) for _ in range(50)]


@given(rows, st.sampled_from([0, 0.0, 1e-6]))
@sometimes_slow
def test_greedy_is_the_lowest_argmax_whatever_the_filters(x, temperature):
    s = Sampler(SamplingParams(temperature=temperature, top_k=2, top_p=0.1, min_p=0.9))
    assert s.params.greedy and int(s(x)) == by_sort(x)[0]
    assert not SamplingParams(temperature=1e-5).greedy


@named
def test_inputs_are_not_changed(knobs):
    x = np.array(LOGITS, np.float32)
    s = Sampler(SamplingParams(**knobs), PROMPT, OUTPUT)
    for row in (x, x.astype(np.float64)):
        before = row.copy()
        s(row)
        assert (row == before).all()


# --- extreme logits --------------------------------------------------------------------------------

@pytest.mark.parametrize("knobs", [{}, {"temperature": 1e-5}, {"temperature": 1e300}, {"top_k": 2},
                                   {"top_p": .5}, {"min_p": .5}, {"repetition_penalty": 1e6},
                                   {"temperature": 0}, {"temperature": 0.01, "top_k": 3, "top_p": .9}])
@pytest.mark.filterwarnings("error")
def test_extreme_logits(knobs):
    inf, top = math.inf, float(np.finfo(np.float32).max)
    for row in ([1e30, -1e30, 0], [-1e30, -1e30], [-inf, 0, -inf], [-inf, 1e30, 1e30, -inf],
                [top, -top, top], [-top, -inf], [1e-45, 0], [0.0]):
        s = Sampler(SamplingParams(seed=0, logprobs=3, **knobs), [0], [0])
        got = s(np.array(row, np.float32))
        assert row[got.token_id] > -inf
        assert math.isfinite(got.logprob) and got.logprob <= 0
        assert not any(math.isnan(v) for v in got.top_logprobs.values())
        if knobs.get("temperature", 1) <= 1 and "repetition_penalty" not in knobs:
            assert row[got.token_id] == max(row) or len(set(row) - {-inf}) == 2 and max(row) < 1


@pytest.mark.parametrize("row,what", [([1, math.nan], "NaN"), ([math.nan, math.inf], "NaN"),
                                      ([1, math.inf], "+inf"), ([-math.inf] * 3, "nothing but -inf")])
@pytest.mark.parametrize("temperature", [0, 1])
def test_broken_logits_are_named_and_change_nothing(row, what, temperature):
    s = Sampler(SamplingParams(temperature=temperature, seed=1))
    with pytest.raises(FloatingPointError, match="the model") as e: s(np.array(row, np.float32))
    assert what in str(e.value) and "\n" not in str(e.value)
    assert not s.output_token_ids and not s.counts and not s.seen


def test_penalties_that_overflow_are_named():
    s = Sampler(SamplingParams(repetition_penalty=1e-300), [0])
    with pytest.raises(FloatingPointError, match="the penalties"), np.errstate(over="ignore"):
        s(np.array([1e30, 1], np.float32))


@pytest.mark.parametrize("shape", [(1, 5), (), (2, 2)])
def test_one_row_at_a_time(shape):
    with pytest.raises(ValueError, match="one row"): Sampler(SamplingParams())(np.zeros(shape))


# --- random numbers ----------------------------------------------------------------------------------

def philox(key, counter):
    "The first word of Philox4x64-10, written from the paper's definition."
    mask, (k0, k1) = 2**64 - 1, (key & (2**64 - 1), key >> 64)
    x = [counter >> 64 * i & mask for i in range(4)]
    for _ in range(10):
        a, b = 0xD2E7470EE14C6C93 * x[0], 0xCA5A826395121157 * x[2]
        x = [b >> 64 ^ x[1] ^ k0, b & mask, a >> 64 ^ x[3] ^ k1, a & mask]
        k0, k1 = k0 + 0x9E3779B97F4A7C15 & mask, k1 + 0xBB67AE8584CAA73B & mask
    return x[0]


@given(st.integers(-2**63, 2**63 - 1), st.integers(0, 2**40))
@sometimes_slow
def test_uniform_is_philox_of_seed_and_position(seed, position):
    "numpy adds one to the counter before its first block."
    assert draw_uniform(seed, position) == (philox(seed % 2**64, position + 1) >> 11) / 2**53


def test_philox_known_answer():
    assert philox(0, 0) == 0x16554D9ECA36314C  # Random123's test vectors


def test_uniform_is_uniform_along_positions_seeds_and_pairs():
    along = np.array([draw_uniform(0, t) for t in range(8001)])
    across = np.array([draw_uniform(s, 5) for s in range(8001)])
    for u in (along, across):
        assert 0 <= u.min() and u.max() < 1
        check_shares((u * 32).astype(int), [1 / 32] * 32)
        pairs = (u[:-1] * 8).astype(int) * 8 + (u[1:] * 8).astype(int)
        check_shares(pairs, [1 / 64] * 64)


def test_same_seed_same_tokens_and_other_seeds_differ():
    runs = [[s(LOGITS).token_id for _ in range(64)] for s in
            [Sampler(SamplingParams(seed=seed)) for seed in (3, 3, 4, -3)]]
    assert runs[0] == runs[1]
    assert len({tuple(r) for r in runs}) == 3


def test_no_seed_means_fresh_and_still_repeatable():
    a, b = Sampler(SamplingParams()), Sampler(SamplingParams())
    one = [a(LOGITS).token_id for _ in range(64)]
    assert a.seed != b.seed and one != [b(LOGITS).token_id for _ in range(64)]
    again = Sampler(SamplingParams(seed=a.seed))
    assert one == [again(LOGITS).token_id for _ in range(64)]


@given(st.integers(0, 30), st.integers(-2**63, 2**63 - 1))
@sometimes_slow
def test_resuming_anywhere_gives_the_same_tokens(cut, seed):
    "Recomputed after a preemption: same penalties, same random numbers."
    params = SamplingParams(seed=seed, repetition_penalty=1.2, frequency_penalty=.3, top_p=.9, logprobs=2)
    whole = Sampler(params, PROMPT)
    first = [whole(LOGITS) for _ in range(31)]
    rest = Sampler(params, PROMPT, [s.token_id for s in first[:cut]])
    assert [rest(LOGITS) for _ in range(31 - cut)] == first[cut:]


def test_draws_depend_on_position_not_on_history():
    "Other logits earlier, other requests between: the number at position 5 is the same."
    a, b, noise = (Sampler(SamplingParams(seed=s), PROMPT[:n]) for n, s in enumerate((11, 11, 99)))
    for t in range(5):
        a(LOGITS)
        b(np.roll(LOGITS, t))
        noise(LOGITS)
    assert a(LOGITS).token_id == b(LOGITS).token_id == draw_token(np.array(LOGITS), draw_uniform(11, 5))


def test_draw_hits_every_token_at_its_place_and_no_forbidden_one():
    x = np.array([-math.inf, math.log(.25), -math.inf, math.log(.5), math.log(.25), -math.inf])
    us = [0, .2499, .2501, .7499, .7501, 1 - 2**-53]
    assert [draw_token(x, u) for u in us] == [1, 1, 3, 3, 4, 4]
    assert draw_token(np.array([0.0, -800.0, -1e30]), 1 - 2**-53) == 0  # these weights round to zero
    assert draw_token(np.array([-800.0, 0.0, -800.0]), 0.0) == 1


@given(rows, st.floats(0, 1, exclude_max=True))
@sometimes_slow
def test_draw_is_the_inverse_of_the_running_sum(x, u):
    token, ps = draw_token(x, u), softmax(x)
    assert ps[token] > 0
    assert ps[:token].sum() - 1e-12 <= u <= ps[:token + 1].sum() + 1e-12


# --- log-probabilities ---------------------------------------------------------------------------------

@given(rows)
@sometimes_slow
def test_log_softmax_in_higher_precision(x):
    m = float(x.max())
    total = math.log(math.fsum(math.exp(v - m) for v in x.tolist()))
    assert np.allclose(log_softmax(x), [v - m - total for v in x.tolist()], atol=1e-12)
    assert softmax(x).sum() == pytest.approx(1)


@pytest.mark.parametrize("k", [None, 0, 1, 5, 20])
def test_logprobs_are_the_models_own(k):
    x = np.random.default_rng(1).normal(size=1000).astype(np.float32) * 3
    wide = x.astype(np.float64)
    expect = wide - wide.max() - math.log(math.fsum(np.exp(wide - wide.max())))
    s = Sampler(SamplingParams(seed=0, temperature=3, top_k=900, repetition_penalty=2,
                               presence_penalty=1, logprobs=k), range(500))
    for _ in range(20):
        got = s(x)
        assert isinstance(got, Sampled) and type(got.token_id) is int
        assert got.logprob == pytest.approx(expect[got.token_id], abs=1e-5)
        if k is None:
            assert got.top_logprobs is None
            continue
        best = by_sort(x)[:k]
        assert list(got.top_logprobs)[:k] == best
        assert set(got.top_logprobs) == {*best, got.token_id}
        for i, lp in got.top_logprobs.items(): assert lp == pytest.approx(expect[i], abs=1e-5)


def test_more_logprobs_than_tokens():
    assert set(Sampler(SamplingParams(logprobs=20))([0., 1., 2.]).top_logprobs) == {0, 1, 2}


# --- parameters ----------------------------------------------------------------------------------------

NAN, INF = math.nan, math.inf
BAD = {
    "max_tokens": [-1, 1.5, "16", None, True, NAN, INF, 2**70],
    "temperature": [-1, -1e-9, NAN, INF, -INF, "1", None, True, [1], 10**400, 1j],
    "top_k": [-2, 2.5, 5.0, "5", None, True, NAN],
    "top_p": [0, 0.0, -0.1, 1.0000001, 2, NAN, INF, "0.9", None, True],
    "min_p": [-0.1, 1.1, NAN, "0", None, False],
    "repetition_penalty": [0, -1, NAN, INF, "1", None, True],
    "presence_penalty": [2.1, -2.1, NAN, INF, "0", None, False],
    "frequency_penalty": [2.1, -2.1, NAN, -INF, "0", None, False],
    "seed": [1.0, "1", 2**63, -2**63 - 1, True, NAN, [1]],
    "stop": ["", [""], ["a", ""], [1], 5, None, b"a", {"a"}, ("a", None)],
    "stop_token_ids": [5, [-1], [1.0], ["1"], None, [True], "12"],
    "ignore_eos": [1, 0, None, "true"],
    "logprobs": [-1, 21, 1.0, "1", True, NAN],
    "n": [0, -1, 1.5, "2", None, True, NAN],
    "prompt_logprobs": [-1, 21, 1.0, "1", True, NAN],
    "include_stop_str_in_output": [1, 0, None, "true"],
    "skip_special_tokens": [1, 0, None, "true"],
    "min_tokens": [-1, 1.5, "16", None, True, NAN],
    "logit_bias": [5, {-1: 1}, {1: 101}, {1: NAN}, {"1": 1}, [1, 2], {i: 0 for i in range(1025)}, None],
    "allowed_token_ids": [[], (), 5, [-1], [1.0], "12", [True]],
    "bad_words": ["", [""], [" "], "a", [1], None, ["a"] * 129],
    "structured_outputs": ["{}", {}, 1],
    "logits_processors": [["a"], 5, None, [("a", 1)]],
}


@pytest.mark.parametrize("name,value", [(n, v) for n, vs in BAD.items() for v in vs], ids=repr)
def test_bad_parameters_get_one_clear_line(name, value):
    with pytest.raises(BadInput) as e: SamplingParams(**{name: value})
    message = str(e.value)
    assert message.startswith(f"{name} must be ") and "\n" not in message and len(message) < 160
    assert repr(value)[:20] in message or name == "stop" and value == ""


def test_every_field_has_bad_values_above():
    assert set(BAD) == {f.name for f in dataclasses.fields(SamplingParams)}


def test_long_and_multiline_values_stay_one_line():
    for value in (np.zeros((30, 30)), "x\n" * 500):
        with pytest.raises(BadInput) as e: SamplingParams(temperature=value)
        assert "\n" not in str(e.value) and len(str(e.value)) < 160


def test_the_form_of_an_answer_is_one_of_five():
    for good in ({"json": {"type": "object"}}, {"json": True}, {"json_object": True}, {"regex": "a+"},
                 {"choice": ["a", "b"]}, {"grammar": "start: /a/"}):
        SamplingParams(structured_outputs=StructuredOutputs(**good))
    assert StructuredOutputs(json={"a": 1}) == StructuredOutputs(json='{"a": 1}')
    for bad in ({}, {"json_object": True, "regex": "a"}, {"regex": ""}, {"choice": []}, {"choice": ["a", ""]},
                {"json": 5}, {"grammar": ""}, {"json_object": False}):
        with pytest.raises(BadInput, match="structured_outputs"): StructuredOutputs(**bad)


def test_parameters_can_be_compared_hashed_and_read():
    a, b = (SamplingParams(logit_bias={3: 1}, logits_processors={"x": {"b": 1, "a": [2]}}) for _ in range(2))
    assert a == b and hash(a) == hash(b) and a.has_constraints and not SamplingParams(stop="x").has_constraints
    assert repr(SamplingParams(top_k=3)) == "SamplingParams(top_k=3)" and dataclasses.replace(a) == a
    with pytest.raises(BadInput, match="min_tokens is 9"): SamplingParams(min_tokens=9, max_tokens=8)
    with pytest.raises(BadInput, match="logits_processors"): SamplingParams(logits_processors={"x": {1: object()}})


def test_good_parameters_at_the_edges():
    p = SamplingParams(3, 0, 0, -1, 1, 1, 1e-9, -2, 2, -2**63, "x", [3, np.int64(4)], True, 20)
    assert p.n == 3 and p.stop == ("x",) and p.stop_token_ids == (3, 4) and p.greedy
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b") and SamplingParams().stop == ()
    q = SamplingParams(temperature=np.float32(0.5), top_k=np.int32(7), seed=np.int64(2))
    assert q == SamplingParams(temperature=0.5, top_k=7, seed=2)
    assert [type(v) for v in (q.temperature, q.top_k, q.seed)] == [float, int, int]


def test_params_are_a_frozen_hashable_record():
    p = SamplingParams(stop=["a"], stop_token_ids=[1])
    assert len({p, SamplingParams(stop="a", stop_token_ids=(1,)), SamplingParams()}) == 2
    q = dataclasses.replace(p, temperature=0)
    assert q.greedy and q.stop == ("a",) and not p.greedy
    with pytest.raises(BadInput, match="temperature"): dataclasses.replace(p, temperature=-1)
    with pytest.raises(dataclasses.FrozenInstanceError): p.top_k = 3


def test_defaults_are_vllms():
    p = SamplingParams()
    assert (p.n, p.max_tokens, p.temperature, p.top_k, p.top_p, p.min_p) == (1, 16, 1.0, 0, 1.0, 0.0)
    assert (p.repetition_penalty, p.presence_penalty, p.frequency_penalty) == (1.0, 0.0, 0.0)
    assert (p.seed, p.stop, p.stop_token_ids, p.ignore_eos, p.logprobs) == (None, (), (), False, None)
