"`tinyvllm bench decode | prefill | serve-trace`: the numbers, and what they are made of."
import importlib
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from tinyvllm.cli import measurements as bench
from tinyvllm.cli.measurements import (Load, Run, Trace, layer_kernels, open_model, open_reference, percentiles, random_state,
                            speed, traffic)
from tinyvllm.cli.main import main, parser
from tinyvllm.errors import BadInput
from tinyvllm.models.llama import Llama, kv_bytes, model_config, weight_bytes
from tinyvllm.measure import Stopwatch, commit
from tinyvllm.models.weights import tiny_checkpoint

FIELDS = {'kind', 'model', 'quant', 'dtype', 'batch', 'context', 'tokens', 'tok_s', 'ms_per_step', 'host_us_per_step',
          'kernels_per_layer', 'bytes_per_token', 'bytes_over_minimum', 'bandwidth_share', 'bandwidth_gb_s',
          'median_of', 'device', 'machine', 'tinygrad', 'commit', 'date'}
CHECKED = {'greedy_equal', 'greedy_share', 'greedy_gap'}
LATENCIES = {'ttft_ms', 'between_ms', 'end_to_end_ms'}


def run(capsys, *args):
    "Exit code, standard output and standard error of `tinyvllm bench`."
    try:
        code = main(['bench', *map(str, args)])
    except SystemExit as stop:
        code = stop.code
    return code, *capsys.readouterr()


@pytest.fixture
def roof(monkeypatch):
    "Ten gigabytes per second, at no cost."
    monkeypatch.setattr(bench, 'bandwidth', lambda *a: 10e9)


@pytest.fixture
def model():
    config, state = tiny_checkpoint(seed=0)
    return Llama(model_config(config), state)


def test_decode_as_json_a_line_for_each_batch(folder, capsys, roof):
    code, out, err = run(capsys, 'decode', '--model', folder, '--batch', 1, 3, '--context', 5, '--tokens', 4,
                         '--repeat', 1, '--check', 3, '--json')
    rows = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and [r['batch'] for r in rows] == [1, 3]
    for row in rows:
        assert set(row) == FIELDS | CHECKED and row['greedy_equal'] and row['kind'] == 'decode'
        assert (row['context'], row['tokens'], row['median_of'], row['model']) == (5, 4, 1, folder.name)
        assert row['tok_s'] == pytest.approx(1e3 * row['batch'] / row['ms_per_step'], rel=1e-3)
        assert 1 < row['kernels_per_layer'] < 40 and 1 < row['bytes_over_minimum'] < 3
        assert 0 < row['bandwidth_share'] < 1 and row['commit'] == commit() and row['device'] == 'CPU'
    assert rows[1]['bytes_per_token'] < rows[0]['bytes_per_token']     # weights are shared


def test_prefill_as_text_with_a_figure(folder, capsys, roof, tmp_path):
    code, out, err = run(capsys, 'prefill', '--model', folder, '--batch', 2, '--context', 9, '--repeat', 1,
                         '--plot', tmp_path / 'speed.png')
    numbers = dict(line.split(maxsplit=1) for line in out.splitlines())
    assert code == 0 and set(numbers) == FIELDS | {'tflop_s'} and numbers['context'] == '9' and numbers['quant'] == '-'
    assert numbers['tok_s'].endswith(' tok/s') and (tmp_path / 'speed.png').stat().st_size > 5000


def test_a_trace_against_one_at_a_time(folder, capsys, roof, tmp_path):
    code, out, err = run(capsys, 'serve-trace', '--model', folder, '--scale', 0.02, '--batch', 4, '--sequential',
                         '--no-warmup', '--no-count', '--json', '--plot', tmp_path / 'trace.png')
    row = json.loads(out)
    assert code == 0 and FIELDS | LATENCIES < set(row) and set(row['sequential']) == LATENCIES
    assert row['kernels_per_layer'] is None and row['requests'] == 5 and row['context'] == row['tokens'] == 20 and row['batch'] == 4
    drawn = Trace().scaled(0.02).draw(512)
    assert row['generated_tokens'] == sum(n for *_, n in drawn) and row['prompt_tokens'] == sum(len(p) for _, p, _ in drawn)
    assert row['tok_s'] == pytest.approx(row['generated_tokens'] / row['seconds'], rel=1e-2)
    for name in LATENCIES:
        assert 0 <= row[name]['p50'] <= row[name]['p90'] <= row[name]['p99'] <= 1e3 * row['seconds']
    assert row['over_sequential'] == pytest.approx(row['tok_s'] / row['sequential_tok_s'], rel=1e-2)
    assert (tmp_path / 'trace.png').stat().st_size > 5000


BAD = [
    (['decode', '--batch', '0'], '--batch'), (['decode', '--batch', '4', '-1'], '--batch'),
    (['decode', '--context', '0'], '--context'), (['decode', '--tokens', '1'], '--tokens'),
    (['decode', '--repeat', '0'], '--repeat'), (['decode', '--batch', 'many'], '--batch'),
    (['decode', '--check', '-1'], '--check'), (['decode', '--max-num-batched-tokens', '0'], 'batched-tokens'),
    (['prefill', '--tokens', '2048'], '--context'), (['decode', '--model', 'nosuch'], 'nosuch'),
    (['decode', '--model', 'tinyllama-1.1c'], 'tinyllama-1.1c'), (['decode', '--plot', 'speed.txt'], 'speed.txt'),
    (['decode', '--plot', 'no/such/folder.png'], 'folder'), (['decode', '--dtype', 'int3'], 'int3'),
    (['serve-trace', '--scale', '0'], '--scale'), (['serve-trace', '--scale', 'nan'], '--scale'),
    (['serve-trace', '--rate', '-1'], '--rate'), (['serve-trace', '--batch', '0'], '--batch'),
    (['serve-trace', '--requests', '0'], '--requests'), (['decode', '--num-scheduler-steps', '0'], 'scheduler-steps'), (['serve-trace', '--tokens', '1'], '--tokens'),
    (['dance'], 'dance'), (['--tokens', '4', 'decode'], 'decode'),
]


@pytest.mark.parametrize('args, names', BAD, ids=[' '.join(a) for a, _ in BAD])
def test_a_mistake_is_one_line_and_exit_2(capsys, args, names):
    code, out, err = run(capsys, *args)
    assert code == 2 and out == '' and names in err
    assert err.count('\n') == 1 and err.startswith('tinyvllm')


def test_loads_beyond_the_context_are_refused_before_any_work(folder, capsys):
    for args, names in ((['decode', '--context', 250, '--tokens', 20], 'context is 256'),
                        (['decode', '--batch', 1, 64, '--context', 200, '--tokens', 39, '--max-num-batched-tokens', 100],
                         'context is 256'), (['serve-trace'], '2048 tokens')):
        code, out, err = run(capsys, *args, '--model', folder)
        assert code == 2 and out == '' and names in err and err.count('\n') == 1


def test_unknown_quantisation_is_one_line(folder, capsys):
    code, out, err = run(capsys, 'decode', '--model', folder, '--context', 4, '--quant', 'int5')
    assert code == 2 and out == '' and 'int5' in err and err.count('\n') == 1


def test_bench_alone_is_the_ladder_and_help_names_every_shape(capsys):
    for args in ([], ['--requests', '2'], ['ladder']):
        code, out, err = run(capsys, *args, '--tokens', '1')
        assert code == 2 and '--tokens is 1' in err
    assert [run(capsys, what, '--help')[0] for what in ('ladder', 'decode', 'prefill', 'serve-trace')] == [0] * 4
    args = parser().parse_args(['bench', 'decode'])
    assert args.what == 'decode' and args.model == 'smollm2' and args.batch == [1]
    capsys.readouterr()
    with pytest.raises(SystemExit): parser().parse_args(['bench', 'decode', '--help'])
    text = ' '.join(capsys.readouterr().out.split()).replace('- ', '-')    # lines break after a hyphen
    assert all(name in text for name in bench.SHAPES)


def test_kernels_of_a_layer_times_layers_are_the_step(model):
    config, state = tiny_checkpoint(seed=0, num_hidden_layers=4)
    deep, load = Llama(model_config(config), state), Load(2, 5, 4)
    each = layer_kernels(deep, load, {})
    def step(model):
        with bench.Context(JIT=2):
            engine = bench.make_engine(model, **load.sizes)
            bench.decode(engine, load.prompts(512), load)
            run = bench.decode(engine, load.prompts(512), load)
        return run.kernels / run.steps
    assert step(deep) - step(model) == pytest.approx(2 * each, abs=1) and layer_kernels(model, load, {}) == each
    config, state = tiny_checkpoint(seed=0, num_hidden_layers=1)
    assert layer_kernels(Llama(model_config(config), state), load, {}) is None


def test_what_the_numbers_mean(model, roof):
    least = 4 * weight_bytes(model) + 60 * kv_bytes(model)
    run = Run(tokens=8, steps=4, seen=60, seconds=0.5, kernels=100, nbytes=2 * least, waited=0.4)
    assert speed(run, model) == dict(tok_s=16.0, ms_per_step=125.0, host_us_per_step=25000.0)
    found = traffic(run, model)
    assert found['bytes_per_token'] == round(2 * least / 8) and found['bytes_over_minimum'] == 2
    assert found['bandwidth_share'] == round(least / 0.5 / 10e9, 4)
    assert speed(replace(run, waited=None), model)['host_us_per_step'] is None
    assert percentiles([0.001, 0.003])['p50'] == 2.0 and percentiles([])['p99'] is None


def test_decode_counts_live_tokens_exactly(model):
    load = Load(3, 5, 6)
    engine = bench.make_engine(model, **load.sizes)
    run = bench.decode(engine, load.prompts(512), load)
    assert run.tokens >= 18 and run.steps == run.tokens / 3
    n, before = round(run.steps), [len(a) - round(run.steps) for a in run.answers]
    assert run.seen == sum(sum(5 + b + i for i in range(n)) for b in before)
    assert not engine.has_unfinished_requests() and not engine.scheduler.running
    again = bench.prefill(engine, load.prompts(512), load)
    assert (again.tokens, again.steps, [len(a) for a in again.answers]) == (15, 1, [1, 1, 1])


def test_host_time_is_what_was_not_waited(monkeypatch):
    engine = SimpleNamespace(runner=SimpleNamespace(waited=1.0))
    with bench.metered(engine) as run: engine.runner.waited = 1.25
    assert run.waited == 0.25
    with bench.metered(SimpleNamespace(runner=object())) as run: pass
    assert run.waited is None and run.seconds > 0


def test_agreement_sees_a_wrong_token_and_how_wrong(model):
    prompts = Load(2, 5, 4).prompts(512)
    engine = bench.make_engine(model, max_num_seqs=2, max_model_len=32)
    answers = [a[:] for a in bench.decode(engine, prompts, Load(2, 5, 4)).answers]
    assert bench.agreement(model, prompts, answers) == dict(greedy_equal=True, greedy_share=1.0, greedy_gap=0.0)
    answers[1][-1] = (answers[1][-1] + 1) % 512
    found = bench.agreement(model, prompts, answers)
    assert not found['greedy_equal'] and 0.5 < found['greedy_share'] < 1 and found['greedy_gap'] > 0


def test_random_models_are_seeded(monkeypatch):
    monkeypatch.setitem(bench.SHAPES, 'small', dict(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        head_dim=16, vocab_size=96, max_position_embeddings=64))
    first, second, other = (random_state('small', seed=seed)[1] for seed in (0, 0, 1))
    name = 'model.layers.0.mlp.down_proj.weight'
    assert (first[name].numpy() == second[name].numpy()).all() and (first[name].numpy() != other[name].numpy()).any()
    assert first[name].numpy().std() == pytest.approx(64 ** -0.5, rel=0.1)
    model, plain = open_model('small', quant='int8'), open_reference('small', quant='int8')
    assert bench.stored_as(model) == 'int8' and bench.stored_as(open_model('small')) is None
    again = plain.layers[0].mlp.down.weight.numpy()
    assert 0 < np.abs(again - first[name].numpy()).max() < 0.01 and plain.dtype == 'float32'
    with pytest.raises(BadInput): open_model('nosuch')


def test_traces_are_nano_vllms_and_scale():
    trace = Trace().draw(49152)
    prompts, answers = zip(*((len(p), n) for _, p, n in trace))
    assert len(trace) == 256 and min(prompts + answers) >= 100 and max(prompts + answers) <= 1024
    assert all(t == 0 for t, *_ in trace) and trace == Trace().draw(49152) != Trace(seed=1).draw(49152)
    assert max(max(p) for _, p, _ in Trace(requests=9).draw(512)) < 512
    small = Trace().scaled(1 / 8)
    assert (small.requests, small.shortest, small.longest_prompt, small.longest_answer) == (32, 12, 128, 128)
    times = [t for t, *_ in replace(small, rate=4).draw(512)]
    assert times == sorted(times) and np.mean(np.diff(times)) == pytest.approx(1 / 4, rel=0.5)
    assert Trace().scaled(1e-9).draw(512)[0][2] == 1


def test_latencies_are_read_from_the_stamps():
    watch = Stopwatch()
    watch.stamps = [0, 1, 1.5, 3]
    found = bench.latencies([watch])
    assert [found[k]['p50'] for k in ('ttft_ms', 'between_ms', 'end_to_end_ms')] == [1000, 1000, 3000]


@pytest.fixture
def common(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / 'benchmarks')
    yield importlib.import_module('common')
    sys.modules.pop('common', None)


def test_a_busy_sample_is_taken_again(common, monkeypatch):
    monkeypatch.setattr(common, 'time', SimpleNamespace(sleep=lambda s: None, monotonic=lambda: 0))
    shares, calls = iter([0.3, 0.01, 0.2, 0.01, 0.02]), []
    monkeypatch.setattr(common, 'watched', lambda fn, pids=(): (fn(), next(shares)))
    assert common.quiet_sample(lambda: calls.append(1) or len(calls)) == (2, 0.02)
    with pytest.raises(common.Busy): common.quiet_sample(int, patience=0)


def test_our_own_work_is_not_the_others(common, monkeypatch):
    machine, own, clock = iter([10.0, 13.0]), iter([4.0, 6.0]), iter([0.0, 2.0])
    monkeypatch.setattr(common, 'machine_seconds', lambda: next(machine))
    monkeypatch.setattr(common, 'own_seconds', lambda pids: next(own))
    monkeypatch.setattr(common, 'time', SimpleNamespace(perf_counter=lambda: next(clock)))
    monkeypatch.setattr(common.os, 'cpu_count', lambda: 2)
    assert common.watched(lambda: 'done') == ('done', 0.25)


def test_sides_take_turns_and_one_that_fails_is_left_out(common, monkeypatch):
    monkeypatch.setattr(common, 'quiet_sample', lambda fn, **gate: (fn(), 0.0))
    order = []
    def bad():
        order.append('bad')
        raise common.Failed('no such format')
    medians, notes = common.in_turn({'a': lambda: order.append('a') or 3.0, 'b': bad}, 3)
    assert medians == {'a': 3.0, 'b': None} and order == ['a', 'bad', 'a', 'a']
    assert notes['errors'] == {'b': 'no such format'} and notes['runs'] == {'a': [3.0] * 3, 'b': []}
    with pytest.raises(common.Failed, match='wrong'):
        common.output([sys.executable, '-c', 'raise SystemExit("wrong")'])
