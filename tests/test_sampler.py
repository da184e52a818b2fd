"""Sampling on the device against `sampling.Sampler`, which is numpy in float64.

The C text runs hundreds of batches, the Metal text a few in the simulator (or on a Mac). Logits and random
numbers are float32 there: a draw that points nearly between two tokens may fall on the other one. `straddles`
says when that is, and only such a draw may differ."""
import sys
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from support.c_kernels import lanes  # noqa: F401
from tinygrad import Tensor

from tinyvllm.kernels import penalties, sampler, top_tokens
from tinyvllm.kernels.metal import Kernel
from tinyvllm.metalsim import MetalError, counting
from tinyvllm.kernels.penalties import apply_penalties
from tinyvllm.kernels.sampler import pack_sampling_params, sample_tokens
from tinyvllm.kernels.top_tokens import find_top_tokens
from tinyvllm.sampling.params import SamplingParams
from tinyvllm.sampling.sampler import (Sampler, log_softmax, process_logits, softmax,
    select_top_ids, draw_uniform)

simulated = pytest.mark.skipif(sys.platform == 'darwin', reason='a Mac does not check')
every_width = pytest.mark.usefixtures('lanes')     # the C text for vectors of 4, 8 and 16 floats
cases = settings(max_examples=120, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
few = settings(cases, max_examples=6)
seeds = st.integers(0, 2**32 - 1)
SIZES = {'CPU': (20, 33, 257), 'METAL': (20, 70)}    # few: each is compiled once


def logits_of(rng, rows, size):
    "Logits of every kind: sharp and flat, with ties, with forbidden tokens, with zeros of both signs."
    x = (rng.standard_normal((rows, size)) * rng.choice([0.1, 1, 5], (rows, 1))).astype(np.float32)
    kinds = rng.integers(0, 5, rows)
    x[kinds == 1] = np.round(x[kinds == 1], 0)          # -0.0 and 0.0 are equal
    x[kinds == 2] = np.where(rng.random((rows, size)) < 0.6, -np.inf, x)[kinds == 2]
    x[kinds == 3] = x[kinds == 3, :1]                   # all equal
    x[:, rng.integers(size)] = 0.5
    return x


def params_of(rng, penalties=False):
    def pick(*choices): return choices[rng.integers(len(choices))]
    more = dict(repetition_penalty=pick(1, 1.3, 0.5), presence_penalty=pick(0, 0.5, -1),
                frequency_penalty=pick(0, 0.25, -2)) if penalties else {}
    return SamplingParams(temperature=pick(0, 0.3, 1, 1.7), top_k=pick(0, -1, 1, 5, 10**6), top_p=pick(1, 0.9, 0.3, 1e-6),
                          min_p=pick(0, 0.05, 0.2, 1), seed=int(rng.integers(2**62)), logprobs=20, **more)


def on(device, x, dtype=np.float32):
    return Tensor(np.asarray(x, dtype), device=device).realize()


def settings_of(params, positions):
    "The rows that the kernel reads, with the random numbers for these positions of the outputs."
    table = np.array([pack_sampling_params(p) for p in params], np.float32)
    table[:, 4] = [min(draw_uniform(p.seed, position), 1 - 2**-24) for p, position in zip(params, positions)]
    return table


def entries_of(prompts, outputs):
    "Tokens of prompt and output, counts in the output, and where each row's begin."
    lists = [[(t, Counter(out)[t]) for t in {*prompt, *out}] for prompt, out in zip(prompts, outputs)]
    pairs = np.array([pair for seen in lists for pair in seen], np.int32).reshape(-1, 2)
    return pairs[:, 0], pairs[:, 1], np.cumsum([0, *map(len, lists)])


def sample_rows(x, params, device='CPU', prompts=None, outputs=None, **sizes):
    "Ids (R,), log-probabilities (R,), and the 20 likeliest with theirs, as the runner asks for them."
    outputs = outputs or [[] for _ in params]
    raw_logits, table = on(device, x), on(device, settings_of(params, map(len, outputs)))
    logits = raw_logits
    if prompts:
        logits = apply_penalties(raw_logits, *(on(device, e, np.int32) for e in entries_of(prompts, outputs)), table)
    outs = *sample_tokens(logits, table, raw_logits, **sizes), *find_top_tokens(raw_logits, 20, **sizes)
    Tensor.realize(*outs)
    ids, parts, tops, below = (t.numpy() for t in outs)
    sums = np.log(parts[:, 1])
    return ids, parts[:, 0] - sums, tops, below - sums[:, None]


def straddles(row, params, position, prompt=(), out=()):
    "Does the draw, or the edge of top-p, lie within a rounding of another token?"
    final = process_logits(row.astype(np.float64), params, {*prompt, *out}, Counter(out))
    line = np.cumsum(softmax(final))
    gap = np.abs(line - draw_uniform(params.seed, position)).min()
    wide = process_logits(row.astype(np.float64), replace(params, top_p=1.0), {*prompt, *out}, Counter(out))
    edge = np.abs(np.cumsum(np.sort(softmax(wide))[::-1]) - params.top_p).min()
    return gap < 1e-5 or params.top_p < 1 and edge < 1e-5


def check(x, params, device='CPU', prompts=None, outputs=None):
    "Every row is the oracle's."
    some = outputs or [[] for _ in params]
    ids, logprobs, tops, below = sample_rows(x, params, device, prompts, outputs)
    for r, (row, p) in enumerate(zip(x, params)):
        prompt = prompts[r] if prompts else ()
        want = Sampler(p, prompt, some[r])(row)
        if ids[r] != want.token_id:
            assert not p.greedy and straddles(row, p, len(some[r]), prompt, some[r]), (p, ids[r], want.token_id)
            continue
        assert abs(logprobs[r] - want.logprob) < 1e-5 * max(1, abs(want.logprob))
        best = select_top_ids(row, 20)
        assert tops[r, :len(best)].tolist() == best.tolist()
        np.testing.assert_allclose(below[r, :len(best)], log_softmax(row.astype(np.float64))[best], rtol=1e-5, atol=1e-5)


def batch(seed, device, penalties):
    rng = np.random.default_rng(seed)
    size, rows = int(rng.choice(SIZES[device])), int(rng.choice([1, 4]))
    x, params = logits_of(rng, rows, size), [params_of(rng, penalties) for _ in range(rows)]
    if not penalties:
        return x, params, None, None
    some = [[rng.integers(0, size, int(rng.integers(1, 9))).tolist() for _ in range(rows)] for _ in range(2)]
    return x, params, *some


@every_width
@cases
@given(seeds)
def test_any_row_is_the_oracles(seed):
    check(*batch(seed, 'CPU', penalties=False)[:2])


@every_width
@settings(cases, max_examples=60)
@given(seeds)
def test_any_row_with_penalties_is_the_oracles(seed):
    x, params, prompts, outputs = batch(seed, 'CPU', penalties=True)
    check(x, params, 'CPU', prompts, outputs)


@few
@given(seeds, st.booleans())
def test_the_metal_text_says_the_same(seed, penalties):
    x, params, prompts, outputs = batch(seed, 'METAL', penalties)
    check(x, params, 'METAL', prompts, outputs)


@every_width
# --- rows do not see each other -----------------------------------------------------------------------

@pytest.mark.parametrize('device', ['CPU', 'METAL'])
def test_a_row_is_the_same_alone_and_in_company(device):
    "Bit for bit."
    rng = np.random.default_rng(1)
    x, params = logits_of(rng, 4, 70), [params_of(rng) for _ in range(4)]
    together = sample_rows(x, params, device)
    for i in (range(4) if device == 'CPU' else [2]):
        for a, b in zip(sample_rows(x[i:i + 1], params[i:i + 1], device), together):
            assert (a == b[i:i + 1]).all()


@pytest.mark.parametrize('device', ['CPU', 'METAL'])
@pytest.mark.parametrize('greedy', [True, False])
def test_a_broken_row_has_no_token_and_changes_no_other(device, greedy):
    rng = np.random.default_rng(2)
    x = rng.standard_normal((6, 70)).astype(np.float32)
    params = [SamplingParams(temperature=1 - greedy, seed=i, top_p=0.9, top_k=9) for i in range(6)]
    want = sample_rows(x, params, device)[0]
    assert (want >= 0).all()
    x[1, 69], x[2, 3], x[3, 66] = np.nan, np.inf, -np.nan
    x[4] = -np.inf
    ids, logprobs = sample_rows(x, params, device)[:2]
    assert ids.tolist() == [want[0], -1, -1, -1, -1, want[5]]
    assert np.isfinite(logprobs[[0, 5]]).all()


@every_width
def test_broken_in_every_place():
    "The vector part of a row and its rest."
    x, greedy = np.zeros((37, 37), np.float32), SamplingParams(temperature=0, seed=0)
    x[np.arange(37), np.arange(37)] = np.nan
    assert (sample_rows(x, [greedy] * 37)[0] == -1).all()


@every_width
def test_penalties_that_overflow_leave_no_token():
    "As in `sampling`: what is refused is the row after its penalties."
    params = SamplingParams(temperature=0, repetition_penalty=1e-38, seed=0, logprobs=20)
    x = np.full((1, 25), 9, np.float32)
    assert sample_rows(x, [params], prompts=[[3]], outputs=[[]])[0] == [-1]


# --- ties, edges, random numbers -----------------------------------------------------------------------------

@pytest.mark.parametrize('device', ['CPU', 'METAL'])
def test_equal_logits_are_kept_by_id(device):
    x = np.zeros((4, 70), np.float32)
    x[1::2, ::2] = -0.0
    params = [SamplingParams(seed=0, **cut) for cut in [dict(top_k=3)] * 2 + [dict(top_p=0.5)] * 2]
    table = settings_of(params, [0] * 4)
    for number, want in ((0.0, [0, 0, 0, 0]), (1 - 2**-24, [2, 2, 34, 34])):
        table[:, 4] = number
        assert sample_tokens(on(device, x), on(device, table))[0].tolist() == want
    params = [SamplingParams(temperature=0, seed=0)] * 4
    assert sample_rows(x, params, device)[0].tolist() == [0] * 4
    assert sample_rows(x, params, device)[2].tolist() == [list(range(20))] * 4


@pytest.mark.parametrize('device', ['CPU', 'METAL'])
def test_a_forced_token_is_not_drawn(device):
    "Top-k says which; its log-probability is that of the raw logits, and a broken row has none."
    rng = np.random.default_rng(5)
    x, forced = logits_of(rng, 4, 70), [0, 69, 33, 5]
    x[1], x[2, 33], x[3, 9] = -1.5, -np.inf, np.nan
    table = settings_of([SamplingParams(temperature=0, seed=0)] * 4, [0] * 4)
    table[:, 3] = -1 - np.array(forced)
    outs = sample_tokens(on(device, x), on(device, table))
    Tensor.realize(*outs)
    ids, parts = (t.numpy() for t in outs)
    assert ids.tolist() == forced[:3] + [-1]
    for i in range(3):
        want = log_softmax(x[i].astype(np.float64))[forced[i]]
        np.testing.assert_allclose(parts[i, 0] - np.log(parts[i, 1]), want, rtol=1e-5)


@every_width
def test_extreme_logits_and_the_last_token():
    x = np.float32([[-3e38, 3e38, 0] + [-1e30] * 20, [-3e38] * 23, [0] * 22 + [80]])
    params = [SamplingParams(seed=1), SamplingParams(seed=2, top_p=0.5), SamplingParams(seed=3, temperature=2)]
    table = settings_of(params, [0] * 3)
    table[:, 4] = 1 - 2**-24
    assert sample_tokens(on('CPU', x), on('CPU', table))[0].tolist() == [1, 11, 22]


@every_width
def test_a_vocabulary_of_49152_and_its_last_id():
    rng = np.random.default_rng(3)
    x = rng.standard_normal((4, 49152)).astype(np.float32) * 2
    x[0, -1] = 40
    params = [SamplingParams(temperature=t, top_k=k, top_p=p, seed=5, logprobs=20)
              for t, k, p in ((0, 0, 1), (1, 50, 1), (1, 0, 0.9), (0.7, 1000, 0.95))]
    check(x, params)


def test_tokens_come_as_often_as_they_should():
    logits, n = np.float32([3, 2.5, 2.5, 2, 1, 1, 0, 0, -1, -1, -2, -np.inf]), 20_000
    params = SamplingParams(top_p=0.97, temperature=0.8, top_k=9)
    table = np.tile(np.float32(pack_sampling_params(params)), (n, 1))
    table[:, 4] = [draw_uniform(seed, 0) for seed in range(n)]
    seen = np.bincount(sample_tokens(on('CPU', np.tile(logits, (n, 1))), on('CPU', table))[0].numpy(), minlength=12)
    exact = softmax(process_logits(logits.astype(np.float64), params, set(), {}))
    kept = exact > 0
    assert not seen[~kept].any()
    assert ((seen - n * exact)[kept] ** 2 / (n * exact[kept])).sum() < 30    # 1 in 1,000 for 10 degrees


@pytest.mark.parametrize('simds', [1, 3])
def test_any_number_of_simdgroups(simds):
    rng = np.random.default_rng(4)
    x, params = logits_of(rng, 3, 70), [params_of(rng) for _ in range(3)]
    ids, logprobs, tops, _ = sample_rows(x, params, 'METAL', simds=simds)
    want = [Sampler(p)(row).token_id for p, row in zip(params, x)]
    assert ids.tolist() == want


# --- mutants of the Metal text --------------------------------------------------------------------------

MUTANTS = {
    'sample': [
        ('b >> 31 ? ~b', 'b >> 31 ? b'),                                 # negatives backwards
        ('~b + (b == 0x80000000u)', '~b'),                               # -0 below 0
        ('> 0x7f800000u ||', '> 0x7fffffffu ||'),                        # NaN passes
        ('high = middle - 1;', 'high = middle - 99;'),
        ('a.count >= count', 'a.count + 1 >= count'),
        ('ties = TOP_K - above(x, w, least + 1 THREAD).count', 'ties = TOP_K'),
        ('a.mass >= mass', '2 * a.mass >= mass'),
        ('least == before ? min_of(ties, need) : need', 'V'),
        ('(x[i] - top) / TEMPERATURE', 'x[i] - top'),
        ('exp(y - higher)', 'exp(x[i] - higher)'),
        ('for (int j = 0; j < int(me); j++) ties -= int(sums[j]);', ''),
        ('before <= goal && goal < before + mine', 'before <= goal'),
        ('float m = 0;', 'float m = lane == 3;'),
        ('  if (lane == 0) part[simd] = result;', '  part[simd] = result + lane;'),
        ('sums[me] = mine;\n    threadgroup_barrier(mem_flags::mem_threadgroup);', 'sums[me] = mine;'),
        ('top > -3.4e38f', 'true'),
        ('if (TOP_K < 0) best', 'if (false) best'),
    ],
    'penalties': [
        ('x > 0 ? x / repetition : x * repetition', 'x / repetition'),
        ('counts[e] ? presence : 0.0f', 'presence'),
        ('begins[row + 1]', 'begins[row] + 1'),
        ('threadgroup_barrier(mem_flags::mem_device);', ''),
    ],
    'top_tokens': [('k == last && i > after', 'false'), ('- top;', ';'), ('i > after)) first', 'true)) first')],
}


def trial(kernel):
    "Checks that no mutant of this kernel passes."
    rng = np.random.default_rng(6)
    x = np.round(rng.standard_normal((4, 70)) * 2).astype(np.float32)
    x[3, ::3] = -0.0
    x[1, :50] = -np.inf
    params = [SamplingParams(top_k=5, seed=1, temperature=0.5, logprobs=20),
              SamplingParams(top_p=0.6, top_k=30, seed=2, logprobs=20),
              SamplingParams(min_p=0.1, seed=8, logprobs=20, presence_penalty=1, frequency_penalty=0.5),
              SamplingParams(temperature=0, seed=4, logprobs=20, repetition_penalty=1.5)]
    prompts, outputs = [[60, 61], [62], [5, 9], [1, int(x[3].argmin())]], [[60, 60], [], [9, 11], [int(x[3].argmax())]]
    if kernel != 'penalties':
        check(x, params, 'METAL')
    if kernel != 'top_tokens':
        check(x, params, 'METAL', prompts, outputs)
    if kernel == 'penalties':
        got, want = (apply_penalties(on(d, x), *(on(d, e, np.int32) for e in entries_of(prompts, outputs)),
                              on(d, settings_of(params, [7] * 4))).numpy() for d in ('METAL', 'CPU'))
        np.testing.assert_allclose(got, want, rtol=1e-6)
    if kernel == 'sample':
        table = settings_of(params, [7] * 4)
        for number in (0.0, 1 - 2**-24):
            table[:, 4] = number
            got, want = (sample_tokens(on(d, x), on(d, table))[0].tolist() for d in ('METAL', 'CPU'))
            assert got == want
        slope = np.tile(np.float32(0.001) * np.arange(70, dtype=np.float32), (2, 1))
        cuts = [SamplingParams(top_k=5, seed=0), SamplingParams(top_p=0.6, seed=0)]
        kept = (process_logits(slope[1].astype(np.float64), cuts[1], set(), {}) > -np.inf).sum()
        table = settings_of(cuts, [0, 0])
        table[:, 4] = 0    # the first that is kept
        assert sample_tokens(on('METAL', slope), on('METAL', table))[0].tolist() == [65, 70 - kept]
        ties = np.zeros((2, 70), np.float32)
        ties[:, ::2] = -0.0
        table[0, 3] = -1 - 41
        assert sample_tokens(on('METAL', slope), on('METAL', table))[0].tolist()[0] == 41
        greedy, broken = [SamplingParams(temperature=0, seed=0)] * 2, ties.copy()
        assert sample_rows(ties, greedy, 'METAL')[0].tolist() == [0, 0]
        broken[0, 9], broken[1] = -np.nan, -np.inf
        assert sample_rows(broken, greedy, 'METAL')[0].tolist() == [-1, -1]


@simulated
def test_the_kernels_survive_the_trial():
    for kernel in MUTANTS:
        with counting() as launches:
            trial(kernel)
        assert kernel in {launch.name for launch in launches}    # it was on trial


@simulated
@pytest.mark.parametrize('kernel,change', [(k, c) for k, changes in MUTANTS.items() for c in changes],
                         ids=lambda x: x if isinstance(x, str) else x[0][:30])
def test_a_mutant_is_caught(kernel, change, monkeypatch):
    module = dict(sample=sampler, penalties=penalties, top_tokens=top_tokens)[kernel]
    original = getattr(module, kernel.upper())
    assert change[0] in original.metal
    monkeypatch.setattr(module, kernel.upper(), Kernel(original.metal.replace(*change), c=original.c))
    with pytest.raises((AssertionError, MetalError)):
        trial(kernel)
