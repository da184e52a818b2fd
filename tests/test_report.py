"`tinyvllm doctor --report`: one file, valid at every moment, completed by the next run, and rows that are made of it."
import configparser
import json
import platform
import re
import signal
import subprocess
import sys
from dataclasses import fields, replace
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from support.command_line import run_doctor
from tinygrad import Device

from tinyvllm.cli import doctor, report, report_sections
from tinyvllm.cli.main import parser
from tinyvllm.cli.measurements import Workload
from tinyvllm.cli.report import FORMAT, ISSUES, VERSION, OutOfTime, format_summary, remove_private, write_report
from tinyvllm.cli.report_sections import SECTIONS, Plan, Section, counting_syncs, identity, unusual
from tinyvllm.device import MetalGPU
from tinyvllm.errors import BadInput
from tinyvllm.measure import LadderRow, read_rows
from tinyvllm.reference.generate import answer_logits, generate

ROOT = Path(__file__).resolve().parents[1]
PLAN = Plan('CPU')
UNHURRIED = tuple(replace(section, seconds=1e6) for section in SECTIONS)    # however busy the machine is


def read(path):
    "The report in a file; NaN is no JSON."
    def refuse(constant): raise ValueError(constant)
    return json.loads(path.read_text(), parse_constant=refuse)


def checks(name):
    return [check for check in doctor.CHECKS if check.name == name]


def sections(calls, seconds=60, **parts):
    "A section `work` whose parts return, or raise, what is given; `calls` collects their names."
    def run_part(name, result, tick):
        calls.append(name)
        if isinstance(result, BaseException): raise result
        return result(tick) if callable(result) else result
    listed = {name: lambda tick, name=name, result=result: run_part(name, result, tick) for name, result in parts.items()}
    return Section('work', lambda plan: listed, seconds),


# --- a whole report ----------------------------------------------------------------------------------------

def make_goldens(model, path):
    "The greedy answer of a model to a prompt, as `data/smollm2_golden.json` has them."
    prompt = [7, 300, 12]
    tokens = list(generate(model, prompt, 3))
    logits = answer_logits(model, prompt, tokens).astype(np.float64)
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    best = np.sort(logprobs)[:, ::-1]
    item = dict(name='three', prompt_ids=prompt, greedy_ids=tokens, top1_logprob=best[:, 0].tolist(),
                top1_top2_margin=(best[:, 0] - best[:, 1]).tolist())
    path.write_text(json.dumps(dict(items=[item])))


@pytest.fixture(scope='module')
def plan(folder, tmp_path_factory):
    "The tiny model and as little work as there can be."
    goldens = tmp_path_factory.mktemp('report') / 'goldens.json'
    plan = Plan('CPU', str(folder), goldens, cases=1, golden_tokens=3, batches=(1,), work=Workload(4, 4),
                rungs=(('10c', 2, 1),))
    make_goldens(plan.portable, goldens)
    return plan


@pytest.fixture(scope='module')
def whole(plan, tmp_path_factory):
    "A whole report: all sections, two kernels, probes of a small memory."
    path = tmp_path_factory.mktemp('whole') / 'mac.json'
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report_sections, 'checks_for', lambda device: checks('cpu.kv_write'))
        patch.setattr(report_sections, 'record_engines', lambda *_: SimpleNamespace(names=['kv_write']))
        patch.setattr(report_sections, 'read_bandwidth', lambda threads=2: 10e9 * threads)
        patch.setattr(report_sections, 'product_bandwidth', lambda dtype: 5e9)
        patch.setattr(report_sections, 'layer_kernels', lambda *_: 6)
        patch.setattr(doctor, 'measure_launch', lambda *_: (12.5, 8.0))
        patch.setattr('tinyvllm.measure.bandwidth', lambda *_: 10e9)
        write_report(path, plan, sections=UNHURRIED)
    return path


def test_all_sections_are_there_and_right(whole, plan):
    content = read(whole)
    assert content['format'] == FORMAT and content['version'] == VERSION and content['about'] == identity(plan)
    assert list(content['sections']) == [s.name for s in SECTIONS]
    for section, parts in content['sections'].items():
        for name, result in parts.items():
            assert result['ok'] and result['seconds'] >= 0 and 'skipped' not in result, (section, name, result)
    found = content['sections']
    assert list(found['bandwidth']) == ['read, 1 thread', 'read, all cores', 'product, float32', 'product, float16']
    assert found['kernels']['cpu.kv_write float32']['us'] == 12.5 and found['kernels']['cpu.kv_write float32']['cases'] == 1
    assert found['goldens']['three']['tokens'] == 3 and found['goldens']['three']['max_logprob_error'] < 1e-4
    assert list(found['engines']) == list(map(str, report_sections.KINDS))
    assert found['counts']['decode x1']['kernels_per_token'] > 5 > found['counts']['decode x1']['launches_per_token']
    assert found['rungs']['10c x2']['requests'] == 2 and found['rungs']['10c x2']['decode_tok_s'] > 0


def test_nothing_private_is_in_it(whole):
    text = whole.read_text()
    assert str(Path.home()) not in text and str(ROOT) not in text and str(whole.parent) not in text
    assert not [line for line in text.splitlines() if f'"{platform.node()}' in line]


def test_the_time_of_all_sections_is_ten_minutes_and_the_page_says_so():
    page = (ROOT / 'nbs/mac.ipynb').read_text()
    assert sum(section.seconds for section in SECTIONS) <= 600
    assert all(re.search(rf'\| `{s.name}` \|[^|]*\| {s.seconds} \|', page) for s in SECTIONS)


def test_the_page_explains_every_field(whole):
    page = (ROOT / 'nbs/mac.ipynb').read_text()
    content = read(whole)
    of_ladder = content['sections'].pop('rungs')['10c x2'].keys() - {'ok', 'seconds'}
    names = {key for parts in content['sections'].values() for result in parts.values() for key in result}
    names |= {*content, *content['sections'], 'attempts', 'error', 'wrong', 'stopped', 'skipped', 'warnings'}
    assert not [name for name in names if f'`{name}`' not in page]
    assert of_ladder == {field.name for field in fields(LadderRow)} and '`LadderRow`' in page


# --- interrupted, failing, late ----------------------------------------------------------------------------

def test_an_interrupted_run_is_completed(tmp_path):
    path, first, second = tmp_path / 'mac.json', [], []
    with pytest.raises(KeyboardInterrupt):
        write_report(path, PLAN, sections=sections(first, a={}, b={}, c=KeyboardInterrupt(), d={}))
    assert list(read(path)['sections']['work']) == ['a', 'b', 'c']
    write_report(path, PLAN, sections=sections(second, a={}, b={}, c={}, d={}))
    assert first == ['a', 'b', 'c'] and second == ['c', 'd']
    assert list(read(path)['sections']['work']) == ['a', 'b', 'c', 'd']


KILLED = """
import json, os, signal, sys
from tinyvllm.cli import report
from tinyvllm.cli.report_sections import Plan, Section
report.identity = lambda plan: json.loads(sys.argv[2])    # files may have changed since this test was loaded
parts = {'a': lambda tick: {}, 'b': lambda tick: os.kill(os.getpid(), signal.SIGKILL)}
report.write_report(sys.argv[1], Plan('CPU'), sections=(Section('work', lambda plan: parts, 60),))
"""


def test_a_killed_run_leaves_a_valid_file(tmp_path):
    path, calls = tmp_path / 'mac.json', []
    done = subprocess.run([sys.executable, '-c', KILLED, path, json.dumps(identity(PLAN))], capture_output=True)
    assert done.returncode == -signal.SIGKILL and read(path)['sections']['work']['a']['ok']
    assert read(path)['sections']['work']['b'] == dict(attempts=1)
    found = write_report(path, PLAN, sections=sections(calls, a={}, b={}))
    assert calls == ['b'] and not found.wrong and [p.name for p in tmp_path.iterdir()] == ['mac.json']


def test_a_part_that_ends_the_program_twice_is_left_out(tmp_path):
    path, calls = tmp_path / 'mac.json', []
    crashing = sections(calls, a=KeyboardInterrupt(), b={})
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            write_report(path, PLAN, sections=crashing)
    for _ in range(2):
        found = write_report(path, PLAN, sections=crashing)
        assert calls == ['a', 'a', 'b'] and 'ended 2 times' in found.wrong['work, a']


def test_a_failure_is_written_down_and_the_rest_goes_on(tmp_path):
    def broken(plan): raise RuntimeError('no list')
    failing = sections([], right={}, wrong=dict(ok=False, wrong='error 0.2'), raises=RuntimeError('gone')) + (
        Section('broken', broken, 5), Section('last', lambda plan: {'z': lambda tick: {}}, 5))
    found = write_report(tmp_path / 'mac.json', PLAN, sections=failing)
    assert found.wrong == {'work, wrong': 'error 0.2', 'work, raises': 'gone', 'broken, all': 'no list'}
    assert found.content['sections']['last']['z']['ok']
    text, again = format_summary(found), []
    assert 'wrong: work, raises: gone' in text and ISSUES in text.splitlines()[-2] and 'mac.json' in text.splitlines()[-2]
    write_report(tmp_path / 'mac.json', PLAN, sections=sections(again, right={}, wrong={}, raises={}))
    assert again == ['raises']     # what is wrong is a result; what could not run is none


def test_what_is_no_number_becomes_null(tmp_path):
    write_report(tmp_path / 'mac.json', PLAN, sections=sections([], a=dict(ok=False, error_size=float('nan'))))
    assert read(tmp_path / 'mac.json')['sections']['work']['a']['error_size'] is None


def test_a_warning_is_kept(tmp_path):
    import warnings
    calls = sections([], a=lambda tick: warnings.warn('attention runs in portable operations') or {})
    found = write_report(tmp_path / 'mac.json', PLAN, sections=calls)
    assert found.content['sections']['work']['a']['warnings'] == ['attention runs in portable operations']


def test_a_section_ends_with_its_time_and_the_next_run_goes_on(tmp_path, monkeypatch):
    "The clock counts how often it was read. A section of 10 leaves what it does not need to the next."
    monkeypatch.setattr(report.time, 'monotonic', count().__next__)

    def long(tick):
        while True: tick()
    path, calls = tmp_path / 'mac.json', []
    found = write_report(path, PLAN, sections=sections(calls, seconds=10, a={}, b=long, c={}))
    results = found.content['sections']['work']
    assert calls == ['a', 'b'] and found.stopped == ['work, b', 'work, c'] and not found.wrong
    assert results['a']['ok'] and 'after' in results['b']['stopped'] and 'goes on there' in format_summary(found)
    write_report(path, PLAN, sections=sections(calls, a={}, b={}, c={}))
    assert calls == ['a', 'b', 'b', 'c'] and not report.Report(path, identity(PLAN)).stopped


@pytest.mark.parametrize('part', ['kernel', 'rung'])
def test_time_ends_a_kernel_and_a_rung_in_the_middle(plan, part):
    ticks = count(1)

    def tick():
        if next(ticks) == 2: raise OutOfTime
    with pytest.raises(OutOfTime):
        if part == 'kernel':
            check, = checks('cpu.kv_write')
            report_sections.check_kernel(replace(plan, cases=3), check, 'float32', tick)
        report_sections.measure_one_rung(plan, '01', 1, 1, tick)
    assert next(ticks) == 3


# --- files that cannot be used -----------------------------------------------------------------------------

def stored(**changes):
    "The text of a report with changes in what it is about."
    content = dict(format=FORMAT, version=VERSION, date='2026-12-01', about=identity(PLAN), sections={})
    about = {key: value for key, value in changes.items() if key in content['about']}
    return json.dumps(content | {key: value for key, value in changes.items() if key not in about} | dict(
        about=content['about'] | about))


WRONG = {'no JSON': ('{"format"', 'no JSON'), 'a list': ('[]', 'no report'), 'something else': ('{"a": 1}', 'no report'),
         'another version': (lambda: stored(version=99), 'version 99'),
         'another machine': (lambda: stored(machine='Apple M1, 8 cores'), 'machine was Apple M1, 8 cores, is '),
         'another commit': (lambda: stored(commit='1234567', source='0'), 'commit was 1234567, is '),
         'another tinygrad': (lambda: stored(tinygrad='0.1'), 'tinygrad was 0.1, is ')}


@pytest.mark.parametrize('what', WRONG)
def test_a_file_that_is_not_of_this_run_is_left_alone(tmp_path, what):
    text, says = WRONG[what]
    text, path = text() if callable(text) else text, tmp_path / 'mac.json'
    path.write_text(text)
    with pytest.raises(BadInput, match=says) as refused:
        write_report(path, PLAN, sections=())
    assert 'mac.json' in str(refused.value) and path.read_text() == text
    if what.startswith('another') and what != 'another version':
        assert '--restart' in str(refused.value)
        write_report(path, PLAN, restart=True, sections=())
        assert read(path)['about'] == identity(PLAN)
    else:    # what is no report is never overwritten
        with pytest.raises(BadInput):
            write_report(path, PLAN, restart=True, sections=())


@pytest.mark.parametrize('args, says', [
    (['--report', 'no/folder/mac.json'], 'no/folder/mac.json cannot be written'), (['--report', '.'], 'no report'),
    (['--restart'], '--report'), (['--report', 'x.json', '--json'], '--json'), (['--report', 'x.json', '--cases', 3], '--cases'),
    (['--report', 'x.json', '--kernel', 'simd'], '--kernel'), (['--report', 'x.json', '--seed', 0], '--seed'),
    (['--report'], 'expected one argument')])
def test_a_mistake_is_one_line_and_exit_2(capsys, monkeypatch, tmp_path, args, says):
    monkeypatch.chdir(tmp_path)
    code, out, err = run_doctor(capsys, *args)
    assert code == 2 and out == '' and says in err and err.count('\n') == 1 and not list(tmp_path.iterdir())


@pytest.mark.parametrize('result, code', [({}, 0), (dict(ok=False, wrong='no'), 1), (RuntimeError('gone'), 1)])
def test_exit_code_and_last_lines(capsys, monkeypatch, tmp_path, result, code):
    monkeypatch.setattr(report.write_report, '__defaults__', (False, sections([], a=result)))
    got, out, err = run_doctor(capsys, '--report', tmp_path / 'mac.json')
    assert got == code and 'Traceback' not in err and out.splitlines()[-2].endswith(ISSUES)


def test_the_address_is_the_repositorys():
    config = configparser.ConfigParser(delimiters=['='], interpolation=None)
    config.read(ROOT / 'settings.ini', encoding='utf-8')
    assert ISSUES == config['DEFAULT']['git_url'] + '/issues/new'


def test_goldens_travel_with_the_package():
    assert report_sections.GOLDENS.read_bytes() == (ROOT / 'tests/golden/smollm2.json').read_bytes()


# --- parts -------------------------------------------------------------------------------------------------

def test_goldens_that_differ_are_wrong_unless_two_tokens_are_equally_likely(plan):
    item, = json.loads(plan.goldens.read_text())['items']
    token, first = item['greedy_ids'][0], replace(plan, golden_tokens=1)
    logits = answer_logits(plan.portable, item['prompt_ids'], [token])[0].astype(np.float64)
    second = int(np.argsort(logits)[-2])
    logprob = float(logits[second] - np.log(np.exp(logits).sum()))
    other = item | dict(greedy_ids=[second], top1_logprob=[logprob])
    table = [(item, True, None), (item | dict(top1_logprob=[item['top1_logprob'][0] + 0.01]), False, None),
             (other, False, 0), (other | dict(top1_top2_margin=[0.0]), True, 0)]
    for golden, ok, difference in table:
        result = report_sections.compare_golden(first, golden, lambda: None)
        assert (result['ok'], result['first_difference']) == (ok, difference) and ('wrong' in result) == (not ok)


def test_syncs_are_counted():
    with counting_syncs('CPU') as syncs:
        Device['CPU'].synchronize()
        Device['CPU'].synchronize()
    Device['CPU'].synchronize()
    assert len(syncs) == 2


FACTS = dict(virtual=False, gpu_graph=True, on_battery=False, busy_percent=3.0)
OLD = 'AMD Radeon Pro 560 is older than Apple7 (M1), the first GPU that runs our kernels; the device is CPU'


@pytest.mark.parametrize('change, no_metal, says', [
    ({}, None, []), (dict(virtual=None, gpu_graph=None, on_battery=None), None, []), (dict(virtual=True), None, ['virtual']),
    ({}, OLD, ['AMD Radeon Pro 560 is older']), (dict(gpu_graph=False), None, ['no graphs']), (dict(on_battery=True), None, ['battery']),
    (dict(busy_percent=80.0), None, ['80 %']), (dict(virtual=True, gpu_graph=False), OLD, ['AMD', 'virtual', 'no graphs'])])
def test_what_is_unusual_about_a_machine_is_said(change, no_metal, says):
    notes = list(unusual(FACTS | change, no_metal))
    assert len(notes) == len(says) and all(word in note for word, note in zip(says, notes))
    assert not any('the device is' in note for note in notes)    # DEV may say otherwise


def test_facts_of_a_mac_come_from_its_own_tools(monkeypatch):
    answers = {('sysctl', '-n', 'hw.perflevel0.physicalcpu'): '8', ('sysctl', '-n', 'hw.perflevel1.physicalcpu'): '2',
               ('sysctl', '-n', 'kern.hv_vmm_present'): '0',
               ('ioreg', '-rc', 'AGXAccelerator', '-d1'): '+-o AGXAcceleratorG13X  <class ...>\n  "gpu-core-count" = 16\n'}
    monkeypatch.setattr(report_sections, '_output', lambda *command: answers[command])
    monkeypatch.setattr(platform, 'mac_ver', lambda: ('12.7', ('', '', ''), 'arm64'))
    monkeypatch.setattr(report_sections, 'probe_metal', lambda: MetalGPU('Apple M1 Pro', True))
    facts = report_sections.machine_facts('CPU')
    assert (facts['performance_cores'], facts['efficiency_cores'], facts['gpu_cores']) == (8, 2, 16)
    assert facts['virtual'] is False and facts['gpu'] == 'Apple M1 Pro' and facts['macos'] == '12.7'
    assert facts['notes'][0].startswith('macOS 12.7 is older than 13')


def test_messages_lose_folders_and_names(monkeypatch):
    monkeypatch.setenv('HOME', '/Users/jane')
    monkeypatch.setattr(Path, 'cwd', lambda: Path('/Users/jane doe'))
    monkeypatch.setenv('USER', 'jane')
    monkeypatch.setattr(platform, 'node', lambda: 'janes-mac.local')
    for text, clean in [
            ('/Users/jane/tinyvllm/kernels/cpu.py:3: no', 'cpu.py:3: no'), ('/Users/jane doe/x.c:1', 'x.c:1'), ('"/private/var/folders/x1/a.metal", line 2', '"a.metal", line 2'),
            ('in ~/work/x.py', 'in x.py'), ('jane on janes-mac.local', 'NAME on NAME'), ('error 0.2, 3/4 of 16 KB/s', 'error 0.2, 3/4 of 16 KB/s'),
            ('see https://example.org/a/b', 'see https://example.org/a/b'), ('janet stays', 'janet stays')]:
        assert remove_private(text) == clean


@pytest.mark.skipif(sys.platform != 'linux', reason='a Mac has the real one')
def test_simulated_metal_has_no_times(tmp_path, monkeypatch):
    monkeypatch.setattr(report_sections, 'checks_for', lambda device: checks('simd.kv_write'))
    found = write_report(tmp_path / 'mac.json', Plan('METAL', cases=1), sections=UNHURRIED)
    assert found.content['about']['simulated'] and not found.wrong
    results = {name: result for parts in found.content['sections'].values() for name, result in parts.items()}
    assert not [key for result in results.values() for key in result if key.endswith('_s') or key == 'seconds']
    assert results['simd.kv_write float16']['us'] is None and results['simd.kv_write float16']['gbps'] is None
    parts = found.content['sections']
    assert all('skipped' in parts[name]['all'] for name in ('bandwidth', 'engines', 'goldens', 'counts', 'rungs'))
    assert 'rungs      skipped: METAL is simulated here' in format_summary(found)
    assert results['machine']['gpu_family'].startswith('Apple')


# --- from a report to rows ---------------------------------------------------------------------------------

def from_report(*args):
    return subprocess.run([sys.executable, ROOT / 'benchmarks/from_report.py', *args], capture_output=True, text=True)


def test_rows_are_made_of_a_report_once(whole, tmp_path):
    content = read(whole)
    content['about'] |= dict(commit='abc1234', machine='Apple M9, 10 cores')
    content['date'] = '2027-01-02'
    content['sections']['kernels']['cpu.kv_write float16'] |= dict(ok=False, wrong='error 1')
    path, ladder, results = tmp_path / 'mac.json', tmp_path / 'ladder.jsonl', tmp_path / 'results'
    path.write_text(json.dumps(content))
    args = path, '--ladder', ladder, '--results', results
    assert from_report(*args, '--show').returncode == 0 and not ladder.exists() and not results.exists()
    assert '7 new rows' in from_report(*args).stderr and '0 new rows, 7 were there' in from_report(*args).stderr
    assert {(r.rung, r.requests) for r in read_rows(ladder)} == {('10c', 2)}
    for name, wanted in ('bandwidth', 4), ('doctor', 2):
        rows = [json.loads(line) for line in (results / f'{name}.jsonl').read_text().splitlines()]
        assert len(rows) == wanted and all(row['machine'] == 'Apple M9, 10 cores' and row['commit'] == 'abc1234' for row in rows)
        assert all(row['date'] == '2027-01-02' and 'from_report.py' in row['command'] for row in rows)


def test_a_report_that_cannot_be_used_gives_no_rows(whole, tmp_path):
    content = read(whole)
    content['about']['simulated'] = True
    for name, text, says in ('sim.json', json.dumps(content), 'simulated'), ('x.json', 'x', 'no JSON'):
        (tmp_path / name).write_text(text)
        done = from_report(tmp_path / name, '--ladder', tmp_path / 'l.jsonl', '--results', tmp_path / 'r')
        assert done.returncode and says in done.stderr and 'Traceback' not in done.stderr and not (tmp_path / 'l.jsonl').exists()


# --- the hosted Mac ----------------------------------------------------------------------------------------

def test_the_workflow_runs_the_command_and_keeps_its_file():
    yaml = pytest.importorskip('yaml')
    workflow = yaml.safe_load((ROOT / '.github/workflows/test.yml').read_text())
    mac = workflow['jobs']['mac']
    command, = [step for step in mac['steps'] if 'doctor' in step.get('run', '')]
    words = command['run'].split()
    args = parser().parse_args(words[1:])
    assert words[0] == 'tinyvllm' and args.report and command.get('if') == 'always()'
    upload, = [step for step in mac['steps'] if step.get('uses', '').startswith('actions/upload-artifact')]
    assert upload['with']['path'] == args.report and upload['if'] == 'always()'
    assert mac['steps'].index(upload) > mac['steps'].index(command)
    inputs = workflow[True]['workflow_dispatch']['inputs']    # YAML reads `on` as true
    assert f"inputs.{next(iter(inputs))} || '{inputs['mac']['default']}'" in mac['runs-on']
