"""No kernel is forgotten: what engines launch, and what the package defines, `tinyvllm doctor` checks.

What the checks launch is found without compiling or running anything: cases are put into a graph that nobody realizes.
"""
import ast
import importlib
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from tinygrad import Tensor

from tinyvllm.cli import checks, coverage, doctor
from tinyvllm.cli.cases.products import FORMAT_NAMES, ProductCases, pack_parts, random_parts, step_of
from tinyvllm.cli.checks import CHECKS, checks_for
from tinyvllm.cli.coverage import KINDS, find_unchecked, record_engines
from tinyvllm.kernels import metal
from tinyvllm.kernels.cases import SIMULATED, relative_error
from tinyvllm.kernels.linear_lanes import PARTS, kind_of
from tinyvllm.kernels.metal import Kernel
from tinyvllm.kernels.recording import RecordedKernels, recording
from tinyvllm.kernels.rows_cpu import READERS
from tinyvllm.kernels.sparse import SparseArray
from tinyvllm.metalsim import capturing, lint
from tinyvllm.quant.formats import format_of

ROOT = Path(__file__).resolve().parents[1]
simulator = pytest.mark.skipif(sys.platform != 'linux', reason='a Mac has the real one')
DEVICES = ['CPU', pytest.param('METAL', marks=simulator)]


@cache
def launched_by_checks(device: str) -> RecordedKernels:
    "The kernels of all cases of all checks."
    with pytest.MonkeyPatch.context() as patch, recording() as launched:
        patch.setattr(metal, 'check_compiles', lambda *_: None)
        for check in checks_for(device):
            for n in range(check.operation.shapes if check.most is None else 0):    # the others launch nothing else
                case = check.operation.make_case(np.random.default_rng(n), n, check.dtypes[0], SIMULATED)
                case.call(check.launcher(), {k: Tensor.empty(*x.shape, dtype=x.dtype.name, device=device)
                                             for k, x in case.inputs.items()})
    return launched


@cache
def run_few(device: str):
    "The kernels of an engine with requests of all kinds, and the sources that METAL compiled and ran for it."
    with capturing() as sources:
        return record_engines(device, KINDS[3:4]), sources


@pytest.mark.parametrize('run', [pytest.param(run_few, id='few'), pytest.param(
    lambda device: (record_engines(device), {}), id='all', marks=pytest.mark.slow)])
@pytest.mark.parametrize('device', DEVICES)
def test_what_engines_launch_is_checked(device, run):
    captured, _ = run(device)
    assert len(captured.names) >= (11 if device == 'CPU' else 14)
    assert find_unchecked(captured, launched_by_checks(device), by_text=True) == []


def module_kernels():
    "Each kernel that a module of the package defines, by its place."
    for path in sorted((ROOT / 'tinyvllm').rglob('*.py')):
        if 'Kernel(' not in path.read_text() or 'metalsim' in path.parts: continue
        module = importlib.import_module('.'.join(path.relative_to(ROOT).with_suffix('').parts))
        yield from ((f'{path.stem}.{name}', kernel) for name, kernel in vars(module).items()
                    if isinstance(kernel, Kernel))


@simulator
def test_what_the_package_defines_is_checked():
    launched = {*launched_by_checks('CPU'), *launched_by_checks('METAL')}
    launched |= {checks.find(check.rung) for check in CHECKS if check.rung}
    defined = dict(module_kernels())
    assert len(defined) >= 20
    assert [place for place, kernel in defined.items() if kernel not in launched] == []


def kernel_makers():
    "Functions that make kernels: their texts differ with the format."
    for path in sorted((ROOT / 'tinyvllm').rglob('*.py')):
        for function in ast.walk(ast.parse(path.read_text())):
            if isinstance(function, ast.FunctionDef) and 'metalsim' not in path.parts:
                calls = [node.func.id for node in ast.walk(function) if isinstance(node, ast.Call)
                         and isinstance(node.func, ast.Name)]
                if 'Kernel' in calls:
                    yield f'{path.stem}.{function.name}'


def test_functions_that_make_kernels_are_known():
    "Their formats are in the next test. A new one needs a check of its own."
    assert sorted(kernel_makers()) == [
        'linear_gpu.rows_kernel', 'linear_lanes.lanes_kernel', 'linear_stream.stream_kernel', 'linear_tiles.tiles_kernel',
        'rows_cpu.compose_kernel']


def test_every_format_that_a_kernel_reads_is_checked():
    formats = {(c.operation.rung, c.operation.format) for c in CHECKS if isinstance(c.operation, ProductCases)}

    def kinds(rung):
        rng = np.random.default_rng(0)
        packed = [pack_parts(f, [Tensor(p) for p in random_parts(rng, f, 2, step_of(f))[0]], step_of(f))
                  for r, f in formats if r == rung and f != 'bf16']
        return {kind_of(w) for w in packed}
    assert kinds('lanes') == set(PARTS) and kinds('tiles') == kinds('stream') == set(PARTS) - {'f32'}
    here = {(format_of(f).bits, format_of(f).scales) for rung, f in formats if rung == ''}
    assert here == set(READERS) and {f for rung, f in formats if rung == ''} == set(FORMAT_NAMES)


def test_a_kernel_without_a_check_is_named(monkeypatch):
    monkeypatch.setattr(doctor, 'record_engines', lambda device: run_few(device)[0])
    row = doctor.run_coverage('CPU', launched_by_checks('CPU'), 20)
    assert row.ok and row.cases >= 11 and 'rope_write' in row.note and row.trouble == ''
    some = RecordedKernels({kernel: sources for kernel, sources in launched_by_checks('CPU').items()
                            if kernel.signature.name not in ('publish', 'sample')})
    for cases in (2, 20):
        row = doctor.run_coverage('CPU', some, cases)
        assert not row.ok and row.trouble == 'no check launches publish, sample'


def test_an_engine_that_fails_is_a_row(monkeypatch):
    def fail(*_): raise RuntimeError('the driver is gone')
    monkeypatch.setattr(coverage, 'run_engine', fail)
    row = doctor.run_coverage('CPU', RecordedKernels(), 20)
    assert not row.ok and row.trouble == 'the driver is gone'


@simulator
def test_every_source_of_an_engine_is_linted():
    _, sources = run_few('METAL')
    ours = {'linear_tiles', 'flash_matrix', 'publish', 'apply_constraints'}
    assert len(sources) >= 30 and ours < set(sources.kernels) and set(sources.kernels) - ours    # tinygrad's, too
    row = doctor.run_lint('METAL', sources)
    assert row.ok and row.cases == len(sources), row.trouble
    bad = next(source for source, names in sources.items() if names == ['publish'])
    row = doctor.run_lint('METAL', {bad.replace('const int step_id', 'const double step_id'): ['publish']})
    assert not row.ok and row.trouble.startswith('publish: ') and 'double' in row.trouble and lint(bad) == []


@pytest.mark.parametrize('device', DEVICES)
def test_sparse_arrays_cost_what_is_touched(device):
    array = SparseArray((2**30, 8), 'float32', {2**32 + 5: np.arange(3), 7: np.ones(2)})
    tensor = array.to_tensor(device)
    assert array.nbytes == tensor.nbytes() == 2**35
    want = SparseArray(array.shape, 'float64', {2**32 + 5: np.array([0, 1, 2.]), 7: np.array([1, 1, 0.])})
    assert relative_error(*doctor.read_output(tensor, want, 0)) == 0
    want.parts[2**32 + 5][1] = 3
    assert relative_error(*doctor.read_output(tensor, want, 0)) > 0.1


def test_too_little_memory_is_a_note(monkeypatch):
    def fail(*_): raise MemoryError('17 GB of address space: no')
    monkeypatch.setattr(SparseArray, 'to_tensor', fail)
    check, = checks_for('CPU', 'cpu.attend[far]')
    row = doctor.run_check(check, 'float16', 'CPU', 20)
    assert row.ok and row.cases == 0 and '17 GB' in row.note and '17 GB' in doctor.format_table([row])
