"`tinyvllm doctor`: it passes what is right, names what is not, and its cases are as hard as it says."
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support.command_line import run_doctor
from tinygrad import Tensor

from tinyvllm.kernels import cpu

from tinyvllm.cli import doctor
from tinyvllm.cli.doctor import CHECKS, TOLERANCE, Check, guard_allocator, run_check
from tinyvllm.kernels.cases import (DECODE, KV_WRITE, MATVEC, PREFILL_STARTS, REAL, SIMULATED, mixed_shape,
                                    relative_error)

KEYS = ['kernel', 'device', 'cases', 'max_rel_err', 'tolerance', 'ok', 'us', 'gbps', 'note']


@pytest.fixture
def untimed(monkeypatch):
    "Without the seconds that timing takes."
    monkeypatch.setattr(doctor, 'measure_launch', lambda *_: (None, None))


def rng(seed=0):
    return np.random.default_rng(seed)


def test_every_kernel_of_the_cpu_is_right(capsys, untimed, monkeypatch):
    monkeypatch.setattr(doctor, 'run_coverage', lambda *_: doctor.Row('engines', 'CPU', 9, None, 0, True))
    code, out, _ = run_doctor(capsys, '--cases', 3, '--json')
    rows = json.loads(out)
    here = [(f'{c.name} {dtype}', min(3, c.most or 3)) for c in CHECKS if 'CPU' in c.devices for dtype in c.dtypes]
    assert code == 0 and [(r['kernel'], r['cases']) for r in rows] == here + [('engines', 9)] and len(here) >= 30
    for row in rows[:-1]:
        assert list(row) == KEYS and row['ok'] and row['device'] == 'CPU'
        assert row['note'] or row['max_rel_err'] <= row['tolerance'] == TOLERANCE[row['kernel'].split()[-1]]


def test_the_table_says_where_and_how_fast(capsys):
    code, out, _ = run_doctor(capsys, '--cases', 2, '--kernel', 'cpu.kv_write', '--seed', 7)
    head, _, titles, rule, *rows = out.splitlines()
    assert code == 0 and all(word in head for word in ('tinyvllm', 'tinygrad', 'CPU on', 'seed 7'))
    assert [x.strip() for x in titles.split('|')[1:-1]] == [
        'kernel', 'device', 'cases', 'max relative error', 'tolerance', 'ok', 'µs', 'GB/s']
    assert len(rows) == 3 and all(row.count('|') == rule.count('|') == 9 and ' yes ' in row for row in rows)
    us, gbps = (float(x) for x in rows[0].split('|')[-3:-1])
    assert us > 0 and gbps > 0


def with_constants(kernel, **change):
    "The kernel with constants that are a little off: functions of what they should be."
    return lambda *args, **c: kernel(*args, **c | {name: f(c[name]) for name, f in change.items()})


BROKEN = {
    'scale': ('ATTEND', dict(SCALE=lambda x: x * 1.05), 'cpu.attend', 'error'),
    'group': ('ATTEND', dict(SLOTS=lambda x: x - 1), 'cpu.attend', 'error'),
    'tokens': ('ATTEND', dict(TOKENS=lambda x: x - 1), 'cpu.attend', 'error inf'),
    'one row more': ('MATMUL', dict(N=lambda x: x + 1), 'cpu.matvec', 'behind a buffer'),
    'one column less': ('MATMUL', dict(K=lambda x: x - 1), 'cpu.matvec', 'error'),
    'a token forgotten': ('KV_WRITE', dict(TOKENS=lambda x: x - 1), 'cpu.kv_write', 'error'),
    'half a row': ('KV_WRITE', dict(ROW=lambda x: x // 2), 'cpu.kv_write', 'error'),
    'no number': ('KV_WRITE', dict(ROW=lambda x: 'oops'), 'cpu.kv_write', 'does not compile'),
}


@pytest.mark.parametrize('what', BROKEN)
def test_a_broken_kernel_is_named(capsys, untimed, monkeypatch, what):
    kernel, change, name, says = BROKEN[what]
    monkeypatch.setattr(cpu, kernel, with_constants(getattr(cpu, kernel), **change))
    code, out, err = run_doctor(capsys, '--cases', 4, '--kernel', name)
    assert code == 1 and '**NO**' in out and f'{name} float' in out and 'Traceback' not in out + err
    assert says in out[out.rindex('**NO**'):]


def test_json_of_a_broken_kernel_is_json(capsys, untimed, monkeypatch):
    monkeypatch.setattr(cpu, 'KV_WRITE', with_constants(cpu.KV_WRITE, TOKENS=lambda x: x - 1))
    code, out, err = run_doctor(capsys, '--cases', 2, '--kernel', 'cpu', '--json')
    failed = [row for row in json.loads(out) if not row['ok']]
    assert code == 1 and {row['kernel'] for row in failed} == {
        'cpu.kv_write float16', 'cpu.kv_write float32', 'cpu.kv_write[far] float16'}
    assert 'cpu.kv_write float16: case 0, ' in err


class WrongLaunchers:
    "Launchers that are wrong in ways a constant cannot be."
    @staticmethod
    def nothing(w, x):
        return Tensor.empty(w.shape[0], dtype=w.dtype, device=w.device)

    @staticmethod
    def raises(w, x):
        raise RuntimeError('the driver\nis gone')

    @staticmethod
    def short(w, x):
        return cpu.matvec(w, x).reshape(-1, 1)


@pytest.mark.parametrize('launcher, says', [('nothing', 'error inf'), ('raises', 'the driver\nis gone'),
                                            ('short', 'wrong shape'), ('missing', "has no attribute 'missing'")])
def test_a_launcher_that_fails_is_a_row(monkeypatch, launcher, says):
    monkeypatch.setitem(sys.modules, 'tinyvllm.kernels.own', WrongLaunchers)
    row = run_check(Check(f'own.{launcher}', MATVEC, ('CPU',)), 'float32', 'CPU', 2)
    assert not row.ok and row.max_rel_err is None and row.us is None and says in row.trouble


def test_guards_leave_the_allocator_as_it_was():
    with guard_allocator('CPU') as guards:
        inside = Tensor.zeros(100, device='CPU').contiguous().realize()
        assert guards.find_damage() == '' and np.isnan(Tensor.empty(7, device='CPU').numpy()).all()
    outside = Tensor.zeros(100, device='CPU').contiguous().realize()
    assert len(guards.guarded) == 1 and (inside.numpy() == outside.numpy()).all()
    del inside
    assert not guards.guarded


@pytest.mark.parametrize('args, says', [(['--kernel', 'softmax.dance'], 'softmax.dance'), (['--cases', '0'], '--cases'),
                                        (['--seed', '-1'], '--seed'), (['--cases', 'many'], '--cases')])
def test_a_mistake_is_one_line_and_exit_2(capsys, args, says):
    code, out, err = run_doctor(capsys, *args)
    assert code == 2 and out == '' and says in err and err.count('\n') == 1


def test_a_device_without_kernels_says_so():
    args = [sys.executable, '-m', 'tinyvllm', 'doctor', '--device', 'PYTHON']
    done = subprocess.run(args, capture_output=True, text=True)
    assert done.returncode == 2 and 'PYTHON' in done.stderr and 'nothing to check' in done.stderr
    assert done.stderr.count('\n') == 1 and done.stdout == ''


def test_help_has_examples(capsys):
    code, out, _ = run_doctor(capsys, '--help')
    assert code == 0 and out.count('tinyvllm doctor ') >= 5 and 'exit code' in out


def test_the_oracle_against_loops():
    for operation in DECODE, PREFILL_STARTS:
        for n in range(6):
            case = operation.make_case(rng(n), n, 'float32', SIMULATED)
            q, k, v, tables, owners, positions, *starts = case.inputs.values()
            S, group = k.shape[1], q.shape[1] // k.shape[2]
            for t in range(len(q)):
                for h in range(q.shape[1]):
                    at = [(tables[owners[t], p // S], p % S, h // group) for p in range(positions[t] + 1)]
                    scores = [float(q[t, h].astype(float) @ k[i].astype(float)) / q.shape[2]**0.5 for i in at]
                    weights = np.exp(np.array(scores) - max(scores))
                    mean = sum(w * v[i].astype(float) for w, i in zip(weights, at)) / weights.sum()
                    padding = bool(starts) and t >= starts[0][-1]
                    assert np.allclose(case.want[0][t, h], 0 if padding else mean, rtol=1e-9, atol=1e-12)


def test_shapes_cover_the_menu():
    first, full = [mixed_shape(n) for n in range(4)], {mixed_shape(n)[:2] + mixed_shape(n)[3:] for n in range(48)}
    assert {s[0] for s in first} == {64, 80, 96, 128} and {s[1] for s in first} == {1, 3, 4, 8}
    assert {s[3] for s in first} == {8, 16, 32} and len(full) == 48
    sixteen = [mixed_shape(n) for n in range(16)]
    assert len({s[:2] for s in sixteen}) == 16 and len({(s[0], s[3]) for s in sixteen}) == 12


def test_cases_are_hard():
    "Contexts of one token and of whole blocks, blocks out of order, NaN where no kernel may read, padding."
    contexts, ordered = [], []
    for n in range(40):
        case = PREFILL_STARTS.make_case(rng(n), n, 'float16', REAL).inputs
        S, k, tables = case['k'].shape[1], case['k'], case['tables']
        assert np.isnan(k[0]).all() and not tables[-1].any() and (case['starts'][-2:] <= len(case['q'])).all()
        for s in range(len(tables) - 1):
            last = case['positions'][case['starts'][s + 1] - 1]
            used = tables[s, :last // S + 1]
            contexts.append((last + 1) / S)
            ordered.append(len(used) > 1 and (np.diff(used) == 1).all())
            assert np.isfinite(k[used].reshape(-1, *k.shape[2:])[:last + 1]).all() and len(set(used)) == len(used)
            assert np.isnan(k[used].reshape(-1, *k.shape[2:])[last + 1:]).all()
    assert {1 / 8, 1} < set(contexts) and any(c > 1 and c % 1 == 0 for c in contexts)
    assert sum(ordered) < len(ordered) / 10
    write = KV_WRITE.make_case(rng(), 1, 'float32', REAL).inputs
    assert (write['slots'] == 0).any() and len(set(write['slots'][write['slots'] > 0])) == (write['slots'] > 0).sum()


def test_relative_error():
    nan, want = np.nan, np.array([1.0, -4.0, np.nan])
    assert relative_error(np.array([1.0, -4.0, nan]), want) == 0
    assert relative_error(np.array([1.5, -4.0, nan], np.float16), want) == 0.125
    for got in ([1, nan, nan], [1, -4, 0], [np.inf, -4, nan], [1, -4]):
        assert relative_error(np.array(got, float), want) == float('inf')


BENCHMARK = Path(__file__).resolve().parents[1] / 'benchmarks' / 'kernels.py'


@pytest.mark.skipif(sys.platform != 'linux', reason='a Mac has the real one')
def test_the_benchmark_runs_in_the_simulator(tmp_path):
    out = tmp_path / 'rows.jsonl'
    args = [sys.executable, BENCHMARK, '--device', 'METAL', '--only', 'matvec', 'decode', '--quick', '--out', out]
    done = subprocess.run(args, capture_output=True, text=True)
    assert done.returncode == 0 and 'Traceback' not in done.stderr, done.stderr
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    kernels = {(row['kernel'], row['rung']): row['kernels'] for row in rows}
    assert kernels['copy', 'tinygrad'] == kernels['matvec', 'rows'] == kernels['decode', 'decode'] == 1
    assert kernels['decode', 'decode_split'] == 2 < kernels['decode', 'tinygrad']
    assert all(row['us'] > 0 and row['share'] is not None and row['machine'] and row['commit'] for row in rows)
    assert '| 64x64 |' in done.stdout and 'off by' not in done.stdout


FEW_FORMATS = 'f16', 'int4-g32', 'q6_k'


def is_rare(check):
    "A format whose reader is the only difference to others: tested in full with --slow."
    return getattr(check.operation, 'format', FEW_FORMATS[0]) not in FEW_FORMATS


@pytest.mark.skipif(sys.platform != 'linux', reason='a Mac has the real one')
@pytest.mark.parametrize('check', [pytest.param(c, id=c.name, marks=[pytest.mark.slow] * is_rare(c)) for c in CHECKS
                                   if 'METAL' in c.devices])
def test_metal_kernels_in_the_simulator(check):
    row = run_check(check, check.dtypes[0], 'METAL', 2)
    assert row.ok, row.trouble
    assert row.us is None and row.gbps is None and row.cases == min(2, check.most or 2)
