"A batch of prompts: order, errors by line, resuming. Most of it on an engine whose runner is a line of Python."
import json
import os
import resource
import signal
import subprocess
import sys
import time
from itertools import count

import pytest
from hypothesis import given, settings, strategies as st
from test_cli import in_process

from tinyvllm.cli.batchfile import HELD, BatchRun, as_line, run_batch
from tinyvllm.core.blocks import BlockManager
from tinyvllm.engine.llm import LLMEngine
from tinyvllm.engine.core import EngineCore
from tinyvllm.errors import BadInput
from tinyvllm.models.llama import model_config
from tinyvllm.sampling.params import SamplingParams
from tinyvllm.sampling.sampler import Sampled
from tinyvllm.core.scheduler import Scheduler
from tinyvllm.models.tokenizer_files import load_tokenizer
from tinyvllm.models.weights import save_safetensors, tiny_checkpoint

GREEDY = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)


def runner(batch):
    "The next token is a function of all tokens before; a prompt that ends in 13 fails."
    def speak(seq):
        if seq.token_ids[seq.num_prompt - 1] == 13: return FloatingPointError('the model\nis ill')
        token = sum((i + 1) * t for i, t in enumerate(seq.token_ids)) % 97
        return [Sampled(token, -1.0, None if seq.params.logprobs is None else {token: -1.0})]
    return [speak(seq) if batch.samples[i] else [] for i, seq in enumerate(batch.seqs)]


@pytest.fixture(scope='module')
def load(folder):  # noqa: F811
    "A function that makes an engine."
    tokenizer, config = load_tokenizer(folder), model_config(tiny_checkpoint(seed=0)[0])
    return lambda run=runner, seqs=2, blocks=40: LLMEngine(
        EngineCore(Scheduler(BlockManager(blocks), seqs, 16), run), config, tokenizer)


def written(path, *lines):
    path.write_bytes(b'\n'.join(l.encode() if isinstance(l, str) else l if isinstance(l, bytes)
                                else json.dumps(l).encode() for l in lines))
    return path


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def lines_of(n):
    "Prompts of different lengths with answers of different lengths: the first is the longest."
    return [{'prompt_token_ids': [i + 20] * (1 + i % 5), 'max_tokens': 30 if i % 10 == 0 else 1 + i % 4, 'id': f'q{i}'}
            for i in range(n)]


def test_answers_come_in_order_although_lengths_differ(tmp_path, load, capsys):
    asked = lines_of(25)
    prompts, out = written(tmp_path / 'p', *asked), tmp_path / 'o'
    assert run_batch(prompts, out, GREEDY, load) == 0
    records = read(out)
    assert [r['id'] for r in records] == [a['id'] for a in asked] and [r['line'] for r in records] == [*range(1, 26)]
    for given_, record in zip(asked, records):
        assert record['prompt_token_ids'] == given_['prompt_token_ids'] and record['finish_reason'] == 'length'
        assert len(record['token_ids']) == given_['max_tokens'] and record['prompt_tokens'] == len(given_['prompt_token_ids'])
        ids = [*given_['prompt_token_ids'], *record['token_ids']]
        assert ids[-1] == sum((i + 1) * t for i, t in enumerate(ids[:-1])) % 97
    err = capsys.readouterr().err
    assert '25 lines, 0 failed' in err and f'{sum(a["max_tokens"] for a in asked)} tokens' in err


def test_the_whole_record(tmp_path, load):
    prompts = written(tmp_path / 'p', {'prompt': 'Grüße', 'max_tokens': 2},
                      {'messages': [{'role': 'user', 'content': 'a'}], 'id': 7, 'max_tokens': 1, 'n': 2, 'logprobs': 1},
                      {'prompt_token_ids': [50], 'stop_token_ids': [50], 'max_tokens': 4}, {'prompt': 'z', 'max_tokens': 0})
    assert run_batch(prompts, tmp_path / 'o', GREEDY, load) == 0
    first, second, third, fourth = read(tmp_path / 'o')
    assert list(first) == ['line', 'prompt', 'text', 'token_ids', 'finish_reason', 'stop_reason', 'prompt_tokens']
    assert first['prompt'] == 'Grüße' and first['prompt_tokens'] == 7 and 'Grüße' in (tmp_path / 'o').read_text()
    answer = second['outputs'][0]
    assert set(second) == {'line', 'id', 'messages', 'outputs', 'prompt_tokens'} and len(second['outputs']) == 2
    assert answer['logprobs'] == [{str(answer['token_ids'][0]): -1.0}] and answer['cumulative_logprob'] == -1.0
    assert second['prompt_tokens'] == len('user:a;') and second['id'] == 7
    assert (third['finish_reason'], third['stop_reason'], third['token_ids']) == ('stop', 50, [50])
    assert (fourth['text'], fourth['token_ids']) == ('', [])


BAD = [('not json', 'not JSON'), ('[1]', 'JSON object'), ('7', 'JSON object'), ({}, 'no prompt'), ({'id': 3}, 'no prompt'),
       ({'prompt': 'a', 'colour': 1}, "'colour'"), ({'prompt': 'a', 'messages': []}, 'prompt and messages'),
       ({'prompt': 7}, 'prompt must be text'), ({'prompt': ''}, 'empty'), ({'prompt_token_ids': []}, 'empty'),
       ({'prompt_token_ids': 'ab'}, 'list of integers'), ({'prompt_token_ids': [1.5]}, '1.5'),
       ({'prompt_token_ids': [True]}, 'True'), ({'prompt_token_ids': [-1]}, '-1'), ({'prompt_token_ids': [10**9]}, 'vocabulary'),
       ({'messages': []}, 'messages'), ({'messages': 'hello'}, 'messages'), ({'messages': [{'role': 'user'}]}, 'content'),
       ({'prompt': 'a', 'temperature': -1}, 'temperature'), ({'prompt': 'a', 'n': 0}, 'n must be'),
       ({'prompt': 'a', 'max_tokens': None}, 'max_tokens'), ('{"prompt": "a", "top_p": NaN}', 'top_p'),
       ({'prompt': 'a' * 5000}, '5000 tokens'), ({'prompt_token_ids': [1] * 100, 'max_tokens': 150}, 'pool'),
       ({'prompt_token_ids': [4, 13]}, 'the model is ill'), (b'{"prompt": "\xff"}', 'UTF-8 at byte 13'),
       ('{"prompt": "\\ud800"}', 'U+D800'), ('[' * 100_000, 'JSON'), ('{"prompt": ' + '9' * 5000 + '}', 'JSON')]


def test_bad_lines_are_named_and_the_rest_still_runs(tmp_path, load, capsys):
    good, lines = {'prompt': 'ok'}, []
    for bad, _ in BAD: lines += [bad, good, '']   # a blank line counts, and has no answer
    assert run_batch(written(tmp_path / 'p', *lines), tmp_path / 'o', GREEDY, lambda: load(blocks=12)) == len(BAD)
    err, records = capsys.readouterr().err.splitlines(), read(tmp_path / 'o')
    assert len(records) == 2 * len(BAD) and f'{len(records)} lines, {len(BAD)} failed' in err[-1]
    assert len({json.dumps(r['token_ids']) for r in records[1::2]}) == 1
    for i, (bad, names) in enumerate(BAD):
        failed, answered = records[2 * i:2 * i + 2]
        assert (failed['line'], answered['line']) == (3 * i + 1, 3 * i + 2)
        assert names in failed['error'] and 'text' not in failed, (bad, failed)
        assert failed.get('id') == (bad.get('id') if isinstance(bad, dict) else None)
        assert err[i].startswith(f'line {3 * i + 1}: ') and names in err[i]


KINDS = [{'prompt': 'abc', 'max_tokens': 5}, {'prompt_token_ids': [9, 8], 'n': 2}, '', 'not json', {'prompt_token_ids': [13]},
         {'prompt': 'ü', 'id': 'ö', 'max_tokens': 9}, {'id': None}, '   ', {'prompt': 'x', 'max_tokens': 1}]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(KINDS), max_size=14), st.integers(1, 4), st.data())
def test_a_run_that_was_cut_anywhere_goes_on_to_the_same_file(tmp_path_factory, load, lines, seqs, data):
    path = tmp_path_factory.mktemp('cut')
    prompts, out = written(path / 'p', *lines), path / 'o'
    failed = run_batch(prompts, out, GREEDY, lambda: load(seqs=seqs))
    whole = out.read_bytes()
    assert whole.count(b'\n') == sum(bool(not isinstance(l, str) or l.strip()) for l in lines)
    out.write_bytes(whole[:data.draw(st.integers(0, len(whole)))])
    assert run_batch(prompts, out, GREEDY, load) == failed
    assert out.read_bytes() == whole


def test_what_is_done_needs_no_engine(tmp_path, load, capsys):
    def broken(): raise AssertionError('there is nothing to compute')
    empty, out = written(tmp_path / 'e', '', '  '), tmp_path / 'o'
    assert run_batch(empty, out, GREEDY, broken) == 0 and out.read_bytes() == b''
    prompts = written(tmp_path / 'p', {'prompt': 'a'}, '{')
    assert run_batch(prompts, out, GREEDY, load) == 1
    capsys.readouterr()
    assert run_batch(prompts, out, GREEDY, broken) == 1      # the failed line is still in the file
    assert capsys.readouterr().err == '2 lines, 1 failed; 2 were there before\n'
    with prompts.open('a') as file: file.write('\n{"prompt": "b"}')
    assert run_batch(prompts, out, GREEDY, load) == 1 and [r['line'] for r in read(out)] == [1, 2, 3]


def test_answers_to_other_prompts_are_refused_and_left_alone(tmp_path, load):
    prompts = written(tmp_path / 'p', {'prompt': 'a', 'id': 1}, {'prompt': 'b'}, 'bad')
    out = tmp_path / 'o'
    run_batch(prompts, out, GREEDY, load)
    one, two, three = out.read_bytes().splitlines(keepends=True)
    foreign = [b'my only copy', b'my notes\n', b'\x00' * 9, b'{"line": 2, "prompt"', two, two + one, one + three, one + one,
               one.replace(b'"a"', b'"A"'), one.replace(b'"id": 1', b'"id": 2'), one.replace(b'"line": 1', b'"line": 0'),
               one + two + three + three, one + two + three + b'{"line": 4,', one + b'\n' + two, b'{"line": 1}\n', one + b'[]\n']
    for content in foreign:
        out.write_bytes(content)
        with pytest.raises(BadInput, match='does not (answer|hold answers)') as error:
            run_batch(prompts, out, GREEDY, load)
        assert out.read_bytes() == content, content
        assert str(out) in str(error.value) and 'another --out' in str(error.value) and '\n' not in str(error.value)
    if os.path.exists('/dev/full'):    # reads as zeros without end
        with pytest.raises(BadInput, match='does not hold'):
            run_batch(prompts, '/dev/full', GREEDY, load)


def test_files_that_cannot_be_used(tmp_path, load):
    prompts = written(tmp_path / 'p', {'prompt': 'a'})
    os.link(prompts, tmp_path / 'link')
    (tmp_path / 'locked').mkdir(mode=0o500)
    cases = [('missing', 'o', 'missing'), ('p', 'p', 'holds the prompts'), ('p', 'link', 'holds the prompts'),
             ('p', 'no/o', 'cannot be written'), ('p', '.', 'cannot be written'), ('.', 'o2', 'directory')]
    if os.geteuid(): cases.append(('p', 'locked/o', 'Permission denied'))    # root may write anywhere
    for source, target, names in cases:
        with pytest.raises(BadInput, match=names):
            run_batch(tmp_path / source, tmp_path / target, GREEDY, load)
    assert prompts.read_bytes() == b'{"prompt": "a"}' and not (tmp_path / 'o').exists() and not (tmp_path / 'o2').exists()


def test_two_runs_do_not_write_the_same_file(tmp_path, load):
    prompts, out = written(tmp_path / 'p', {'prompt': 'a'}), tmp_path / 'o'

    def meanwhile():
        with pytest.raises(BadInput, match='another run'):
            run_batch(prompts, out, GREEDY, load)
        return load()
    assert run_batch(prompts, out, GREEDY, meanwhile) == 0 and len(read(out)) == 1


def test_ctrl_c_leaves_a_file_that_goes_on(tmp_path, load, capsys):
    prompts, out = written(tmp_path / 'p', *lines_of(25)), tmp_path / 'o'
    run_batch(prompts, tmp_path / 'whole', GREEDY, load)
    for stop in (1, 20, 40):
        steps = count()

        def interrupted(batch):
            if next(steps) == stop: raise KeyboardInterrupt
            return runner(batch)
        with pytest.raises(KeyboardInterrupt):
            run_batch(prompts, out, GREEDY, lambda: load(interrupted))
        assert (tmp_path / 'whole').read_bytes().startswith(out.read_bytes()) and 'goes on' in capsys.readouterr().err
    run_batch(prompts, out, GREEDY, load)
    assert out.read_bytes() == (tmp_path / 'whole').read_bytes()


def test_a_full_disk_ends_the_run_and_it_goes_on(tmp_path, load):
    prompts, out = written(tmp_path / 'p', *lines_of(25)), tmp_path / 'o'
    run_batch(prompts, tmp_path / 'whole', GREEDY, load)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
        with pytest.raises(OSError): run_batch(prompts, out, GREEDY, load)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert len(out.read_bytes()) == 1000 and not out.read_bytes().endswith(b'\n')
    run_batch(prompts, out, GREEDY, load)
    assert out.read_bytes() == (tmp_path / 'whole').read_bytes()


def test_memory_is_bounded_however_long_the_file_is(load):
    engine, taken = load(seqs=3), count()
    lines = ((i + 1, as_line({'prompt_token_ids': [1 + i % 90], 'max_tokens': 1 if i else 200}))
             for i in taken if i < 2000)
    run = BatchRun(engine, lines, SamplingParams(temperature=0, ignore_eos=True))
    records, most = iter(run), 0
    while len(run.queue) < HELD * run.window - 2:      # a slow first line holds the others back
        run.fill()
        for out in engine.step():
            if out.finished: run.finish(run.running.pop(out.request_id), out)
        most = max(most, len(run.queue))
        assert len(run.running) <= run.window == 6 and len(engine.requests) <= 6
    assert next(records)['line'] == 1
    for expected, record in zip(range(2, 300), records):
        most = max(most, len(run.queue))
        assert record['line'] == expected
    assert 40 < most <= HELD * run.window and next(taken) < 300 + HELD * run.window


def test_a_record_is_one_line_of_utf8():
    for text in ('Grüße', '\u2028', '\ud800', 'a\nb', '\x00'):
        line = as_line({'line': 1, 'text': text})
        assert line.endswith(b'\n') and line.count(b'\n') == 1 and json.loads(line.decode())['text'] == text


@pytest.fixture(scope='module')
def thin(folder, tmp_path_factory):  # noqa: F811
    "The tiny model with one layer: this file is about lines."
    thin = tmp_path_factory.mktemp('thin')
    save_safetensors(thin, *tiny_checkpoint(seed=0, num_hidden_layers=1))
    for name in ('tokenizer.json', 'tokenizer_config.json'):
        (thin / name).write_bytes((folder / name).read_bytes())
    return thin


def batch_args(folder, prompts, out):  # noqa: F811
    return ['generate', '--prompts', prompts, '--out', out, '--model', folder, '--ignore-eos',
            '--max-num-seqs', 2, '--num-blocks', 9, '--max-num-batched-tokens', 4]


def test_kill_9_in_the_middle_then_the_same_command(thin, tmp_path, capsys):
    lines = [{'prompt_token_ids': [i, i + 1], 'max_tokens': 3 if i < 5 else 38 + i % 3} for i in range(1, 17)]
    prompts, whole, out = written(tmp_path / 'p', *lines, '{"prompt": 3}'), tmp_path / 'whole', tmp_path / 'o'
    process = subprocess.Popen([sys.executable, '-m', 'tinyvllm', *map(str, batch_args(thin, prompts, out))],
                               stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 200
    while not (out.exists() and out.read_bytes().count(b'\n') >= 2) and time.monotonic() < deadline:
        time.sleep(0.002)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    before = out.read_bytes()
    assert 2 <= before.count(b'\n') < 16
    out.write_bytes(before[:-20])      # as if the last write had been torn
    code, printed, err = in_process(capsys, *batch_args(thin, prompts, out))
    assert code == 1 and printed == '' and 'line 17: prompt must be text' in err and '17 lines, 1 failed' in err
    assert f'{before.count(bytes([10])) - 1} were there before' in err
    assert in_process(capsys, *batch_args(thin, prompts, whole))[0] == 1
    assert out.read_bytes() == whole.read_bytes() and whole.read_bytes().startswith(before)


def test_options_of_the_command_line(folder, tmp_path, capsys, monkeypatch):  # noqa: F811
    prompts, out = written(tmp_path / 'p', {'prompt': 'a'}, {'prompt': 'a', 'max_tokens': 2}), tmp_path / 'o'
    made = []
    def engine(*args, **sizes): made.append(sizes); raise BadInput('stop here')
    monkeypatch.setattr('tinyvllm.engine.defaults.load_engine', engine)
    code, printed, err = in_process(capsys, *batch_args(folder, prompts, out))
    assert made == [dict(dtype='auto', quantization=None, max_num_seqs=2, num_blocks=9, max_num_batched_tokens=4)]
    assert code == 2 and printed == '' and err == 'tinyvllm: error: stop here\n'
    for args, names in ((['--prompts', tmp_path / 'missing', '--out', out], 'missing'), (['--prompts', prompts, '--out', prompts], 'holds'),
                        (['--prompts', prompts], '--out'), (['x', '--prompts', prompts, '--out', out], 'not both'),
                        (['x', '--out', out], '--prompts'), (['x', '--num-blocks', 4], '--num-blocks needs --prompts'),
                        (['--prompts', prompts, '--out', out, '--json'], '--json'), (['--prompts', '', '--out', out], 'No such file'),
                        (['--prompts', prompts, '--out', out, '--max-num-seqs', 0], 'max_num_seqs'),
                        (['--prompts', prompts, '--out', out, '--top-p', 7], 'top_p')):
        code, printed, err = in_process(capsys, 'generate', *args)
        assert code == 2 and printed == '' and names in err and err.count('\n') == 1, (args, err)
