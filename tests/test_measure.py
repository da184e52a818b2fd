"The instruments: what they count is exact, what they time is plausible, what they refuse is named."
import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, strategies as st
from tinygrad import Tensor

from tinyvllm.errors import BadInput
from tinyvllm.measure import (LadderRow, Roof, Stopwatch, Timing, append_row, bandwidth, counting, ladder_row,
                              ladder_table, measure_stream, measured_roof, peak_memory, plot_ladder, read_bandwidth,
                              read_rows, timed)

ROW = LadderRow('01', '01_greedy', 'abacus', 'CPU', 'tiny', 'float32', '8+8', 0.5, 2.0, 60, 700_000,
                20., 37., 0.054, 3, True, commit='none', date='2026-01-01')


def test_counts_are_the_shapes():
    a, b = (Tensor.ones(64, 64).contiguous().realize() for _ in range(2))
    with counting() as c:
        (a + b).realize()
    assert (c.kernels, c.nbytes, c.flops) == (1, 3 * 64 * 64 * 4, 64 * 64)
    with counting() as again:
        (a + b).realize()
    assert again.compiled == 0 and again.nbytes == c.nbytes


def test_nothing_is_counted_for_a_promise():
    with counting() as c:
        Tensor.ones(8, 8).contiguous() @ Tensor.ones(8, 8).contiguous()
    assert c.kernels == 0


def test_timed_realises_and_keeps_only_measured_runs():
    x, calls = Tensor.ones(16).contiguous().realize(), []
    with counting() as c:
        timing = timed(lambda: calls.append(1) or x + 1, repeat=3, warmup=2)
    assert len(timing.runs) == 3 and len(calls) == 5 and c.kernels == 5
    assert timed(lambda: time.sleep(0.01), repeat=2, warmup=0).median >= 0.01


def test_timing_median_and_spread():
    t = Timing([3.0, 1.0, 2.0])
    assert t.median == 2.0 and t.spread == 1.0


@given(st.integers(1, 10**12), st.integers(0, 10**9), st.integers(1, 512), st.floats(1e6, 1e13))
def test_roof(weights, kv, batch, bandwidth):
    roof = Roof(bandwidth, weights, kv, batch)
    assert roof.tok_s == pytest.approx(batch * bandwidth / (weights + batch * kv))
    assert roof.share(roof.tok_s) == pytest.approx(1)
    assert Roof(bandwidth, weights, kv, batch + 1).tok_s >= roof.tok_s * (1 - 1e-9)


def test_bandwidth_probe_reads_what_it_says():
    assert 1e8 < read_bandwidth(nbytes=2**22, threads=1, repeat=2) < 1e13


def test_peak_memory_sees_an_allocation():
    before = peak_memory()
    held = np.ones(before // 2 + 64_000_000, np.uint8)
    assert before + 32_000_000 < peak_memory() + before // 2 and held.nbytes > 0
    assert peak_memory() > 10_000_000


def test_stopwatch():
    watch = Stopwatch()
    assert watch.ttft_s is None and watch.decode_tok_s is None
    watch.stamps = [0.0, 2.0]
    assert watch.ttft_s == 2.0 and watch.decode_tok_s is None
    watch.stamps += [2.5, 3.0]
    assert watch.decode_tok_s is None      # two steps, of which the last may have been computed before
    watch.stamps += [3.01]
    assert watch.decode_tok_s == 2.0


def test_tokens_that_came_together_are_one_step(monkeypatch):
    seconds = iter([0.0, 1.0, 3.0, 5.0, 5.1])
    monkeypatch.setattr('tinyvllm.measure.time.perf_counter', lambda: next(seconds))
    watch = Stopwatch()
    for tokens in (3, 4, 4):
        watch.lap(tokens)
    assert watch.ttft_s == 1.0 and watch.decode_tok_s is None and len(watch.stamps) == 12
    watch.lap()
    assert watch.decode_tok_s == 2.0       # eight tokens between the first step and the last but one


def test_measure_stream_counts_the_last_token_only():
    x = Tensor.ones(4).contiguous().realize()

    def stream():
        for n in (3, 1, 4, 2):
            for _ in range(n):
                (x + n).realize()
            yield n
    result = measure_stream(stream)
    assert result.tokens == [3, 1, 4, 2] and result.kernels_per_token == 2 and result.bytes_per_token == 2 * 32
    with pytest.raises(ValueError, match='3 items; a speed needs four'):
        measure_stream(lambda: iter([7, 7, 7]))


@pytest.mark.parametrize('steps, tokens', [
    ([[1, 2], [3, 4], [5, 6], [7, 8]], 4), ([[1], [2, 3, 4], [5], [6, 7]], 4), ([1, 2, 3, 4], 2), ([1, 2, 3, 4, 5], 3)])
def test_measure_stream_counts_all_tokens_between_the_first_item_and_the_last(steps, tokens, monkeypatch):
    seconds = iter(range(100))
    monkeypatch.setattr('tinyvllm.measure.time.perf_counter', lambda: float(next(seconds)))
    result = measure_stream(lambda: iter(steps))
    assert result.decode_tok_s == tokens / (len(steps) - 2) and result.ttft_s == 1
    assert result.tokens == [t for step in steps for t in (step if isinstance(step, list) else [step])]


def test_requests_share_the_kernels_of_a_step():
    def stream(n):
        x = Tensor([1] * n).contiguous().realize()
        for _ in range(4):
            for _ in range(4):
                y = (x + 1).realize()
            yield y.tolist()
    one, four = measure_stream(lambda: stream(1)), measure_stream(lambda: stream(4))
    assert (one.kernels_per_token, four.kernels_per_token) == (4, 1)
    assert one.bytes_per_token == four.bytes_per_token == 4 * 2 * 4


def test_ladder_round_trip_and_newest_row_wins(tmp_path):
    path = tmp_path / 'ladder.jsonl'
    together = replace(ROW, requests=16, decode_tok_s=20.0, roof_tok_s=500.)
    for row in (together, ROW, replace(ROW, rung='01c'), replace(ROW, decode_tok_s=9.0)):
        append_row(path, row)
    rows = read_rows(tmp_path / 'absent.jsonl', path)
    assert [(r.rung, r.requests, r.decode_tok_s) for r in rows] == [('01', 1, 9.), ('01', 16, 20.), ('01c', 1, 2.)]
    assert read_rows(path, path) == rows
    lines = ladder_table(rows).splitlines()
    assert len(lines) == 5 and '| 1 | 9.00 |' in lines[2] and '| 16 | 20.00 | 500 |' in lines[3]
    assert len({line.count('|') for line in lines}) == 1


def test_plot_names_what_ran_together():
    rows = [ROW, replace(ROW, requests=16), replace(ROW, machine='other')]
    first, second = plot_ladder(rows).axes
    assert [t.get_text() for t in first.get_xticklabels()] == ['01', '01\n×16'] and len(first.patches) == 2
    assert first.patches[0].get_facecolor() != first.patches[1].get_facecolor()
    assert second.get_title() == 'other' and len(plot_ladder([]).axes) == 1


def test_the_ladder_of_the_checkout_can_be_read():
    path = Path(__file__).resolve().parents[1] / 'nbs/ladder.jsonl'
    assert {row.rung for row in read_rows(path)} >= {'01', '01c'}


@pytest.mark.parametrize('line', ['{', '[]', '{"rung": "01"}', '7', '{"colour": 1}'])
def test_a_broken_ladder_line_is_named(tmp_path, line):
    path = tmp_path / 'ladder.jsonl'
    append_row(path, ROW)
    path.write_text(path.read_text() + line + '\n')
    with pytest.raises(BadInput, match='line 2'):
        read_rows(path)


def test_ladder_row_takes_the_median_run(monkeypatch):
    monkeypatch.setattr('tinyvllm.measure.bandwidth', lambda *a: 10e9)
    runs = [replace(measure_stream(lambda: iter([1, 2, 3, 4])), decode_tok_s=v) for v in (5.0, 1.0, 2.0)]
    row = ladder_row(runs, weights=10**9, kv=0, rung='01', notebook='n', model='m', dtype='float32',
                     workload='1+2', greedy_equal=True)
    assert (row.decode_tok_s, row.roof_tok_s, row.roof_share, row.median_of) == (2.0, 10.0, 0.2, 3)
    assert row.commit and row.machine and json.dumps(row.__dict__)
    together = ladder_row(runs, weights=10**9, kv=10**8, requests=10, rung='04a', notebook='n', model='m',
                          dtype='float32', workload='1+2', greedy_equal=True)
    assert (together.requests, together.roof_tok_s) == (10, 50.0) and row.requests == 1


@pytest.mark.parametrize('tok_s, limit', [(5.0, 10.0), (10.0, 10.0), (30.0, 30.0)])
def test_a_run_never_exceeds_its_limit(tok_s, limit, monkeypatch):
    "What a run reads, the machine can read: a slower probe was disturbed, or the weights are in a cache."
    monkeypatch.setattr('tinyvllm.measure.bandwidth', lambda *a: 10e9)
    roof = measured_roof(tok_s, weights=10**9)
    assert roof.tok_s == pytest.approx(limit) and roof.share(tok_s) == pytest.approx(tok_s / limit)
    assert measured_roof(tok_s, 9 * 10**8, kv=10**8, batch=2).share(tok_s) <= 1 and Roof(1e9, 10**9).share(28.3) == 1


def test_the_limit_of_a_cpu_is_what_the_cores_in_use_can_read(monkeypatch):
    asked = []
    monkeypatch.setattr('tinyvllm.measure.read_bandwidth', lambda threads: asked.append(threads) or 1e10)
    assert bandwidth('CPU') == 1e10 and asked == [1]
