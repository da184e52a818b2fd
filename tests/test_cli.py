"The command line as a user meets it: a process, its output, its exit code."
import json
import signal
import subprocess
import sys

import pytest

from tinyvllm import LLM, SamplingParams
from tinyvllm.cli.measurements import Workload, measure_rung
from tinyvllm.cli.generate import reply
from tinyvllm.cli.main import main
from tinyvllm.models.llama import Llama, model_config
from tinyvllm.core.sequence import Sequence
from tinyvllm.models.tokenizer_files import load_tokenizer
from tinyvllm.models.weights import save_safetensors, tiny_checkpoint
from tinyvllm.models.hub import resolve


def tinyvllm(*args, **options):
    options = dict(capture_output=True, text=True, timeout=300) | options
    return subprocess.run([sys.executable, '-m', 'tinyvllm', *map(str, args)], **options)


def in_process(capsys, *args):
    "Exit code, standard output and standard error of a command run here: no start-up time."
    try:
        code = main([str(a) for a in args])
    except SystemExit as stop:
        code = stop.code
    out = capsys.readouterr()
    return code, out.out, out.err


def test_json_has_every_field_and_streams_join_to_it(folder, capsys):
    code, out, err = in_process(capsys, 'generate', 'abc', '--model', folder, '--max-tokens', 6, '--json')
    result = json.loads(out)
    assert code == 0 and set(result) == {'text', 'token_ids', 'prompt_token_ids', 'finish_reason', 'metrics'}
    assert set(result['metrics']) == {'ttft_s', 'decode_tok_s', 'prompt_tokens', 'generated_tokens',
                                      'peak_memory_bytes'}
    assert len(result['token_ids']) == 6 == result['metrics']['generated_tokens']
    assert result['metrics']['prompt_tokens'] == len(result['prompt_token_ids']) == 3
    assert result['metrics']['peak_memory_bytes'] > 10_000_000 and result['metrics']['ttft_s'] > 0
    code, out, err = in_process(capsys, 'generate', 'abc', '--model', folder, '--max-tokens', 6)
    assert code == 0 and out == result['text'] + '\n' and 'tok/s' in err and '%' in err


def test_stdin_seed_and_stop(folder):
    args = ('generate', '-', '--model', folder, '--max-tokens', 12, '--temperature', 1.2, '--seed', 3, '--json')
    first, second = (json.loads(tinyvllm(*args, input='abc').stdout) for _ in range(2))
    assert first['token_ids'] == second['token_ids'] and first['prompt_token_ids'] == second['prompt_token_ids']
    piece = first['text'][-1]
    stopped = json.loads(tinyvllm(*args, f'--stop={piece}', input='abc').stdout)
    assert stopped['finish_reason'] == 'stop' and stopped['text'] == first['text'][:first['text'].index(piece)]


BAD = [
    (['generate', ''], 'prompt is empty'), (['generate', 'x', '--temperature', '-1'], 'temperature'),
    (['generate', 'x', '--temperature', 'nan'], 'temperature'), (['generate', 'x', '--top-p', '0'], 'top_p'),
    (['generate', 'x', '--top-p', '1.5'], 'top_p'), (['generate', 'x', '--top-p', 'inf'], 'top_p'),
    (['generate', 'x', '--max-tokens', '-1'], 'max_tokens'), (['generate', 'x', '--max-tokens', 'many'], 'max-tokens'),
    (['generate', 'x', '--min-p', '2'], 'min_p'), (['generate', 'x', '--top-k', '-5'], 'top_k'),
    (['generate', 'x', '--stop', ''], 'stop'), (['generate', 'x', '--model', '/no/such/file.gguf'], '/no/such/file.gguf'),
    (['generate', 'x', '--model', 'nosuch'], 'nosuch'), (['generate', 'x', '--dtype', 'int8'], 'dtype'),
    (['generate'], 'PROMPT'), (['dance'], 'dance'), ([], 'COMMAND'), (['pull', 'nosuch'], 'nosuch'),
    (['bench', '--tokens', '3'], '--tokens'), (['bench', '--repeat', '0'], '--repeat'), (['bench', '--rung', '99'], '99'),
    (['bench', '--requests', '4', '0'], '--requests'), (['bench', '--rung', '01c', '--requests', '2'], '--rung 04a'),
    (['generate', 'x', '--out', 'o.jsonl'], '--prompts'), (['generate', 'x', '--prompts', 'p.jsonl', '--out', 'o.jsonl'], 'not both'),
    (['generate', '--prompts', 'no/such.jsonl', '--out', 'o.jsonl'], 'no/such.jsonl'),
]


@pytest.mark.parametrize('args, names', BAD, ids=[' '.join(a) or 'nothing' for a, _ in BAD])
def test_a_mistake_is_one_line_and_exit_2(capsys, args, names):
    code, out, err = in_process(capsys, *args)
    assert code == 2 and out == '' and names in err
    assert err.count('\n') == 1 and 'Traceback' not in err and err.startswith('tinyvllm')


def test_damaged_models_are_one_line_and_exit_2(folder, tmp_path, capsys):
    weights, config = (folder / 'model.safetensors').read_bytes(), (folder / 'config.json').read_text()
    for change, names in (({'model.safetensors': weights[:-8]}, 'safetensors'), ({'config.json': '{'}, 'config.json'),
                          ({'config.json': config.replace('"llama"', '"gpt2"')}, 'gpt2'),
                          ({'tokenizer.json': '[]'}, 'tokenizer'), ({'model.gguf': b'GGUX' + bytes(60)}, 'model.gguf')):
        broken = tmp_path / names.replace('/', '')
        broken.mkdir()
        for file in folder.iterdir():
            (broken / file.name).write_bytes(file.read_bytes())
        for name, data in change.items():
            (broken / name).write_bytes(data if isinstance(data, bytes) else data.encode())
        path = broken / 'model.gguf' if 'model.gguf' in change else broken
        code, out, err = in_process(capsys, 'generate', 'x', '--model', path)
        assert code == 2 and out == '' and names in err and err.count('\n') == 1, (names, err)


def test_weights_that_compute_nan_are_one_line_and_exit_2(folder, tmp_path, capsys):
    config, state = tiny_checkpoint(seed=0)
    save_safetensors(tmp_path / 'nan', config, {**state, 'model.norm.weight': state['model.norm.weight'] * float('nan')})
    for name in ('tokenizer.json', 'tokenizer_config.json'):
        (tmp_path / 'nan' / name).write_bytes((folder / name).read_bytes())
    code, out, err = in_process(capsys, 'generate', 'x', '--model', tmp_path / 'nan', '--json')
    assert code == 2 and out == '' and err.count('\n') == 1 and 'NaN' in err


def test_a_prompt_longer_than_the_context_is_refused(folder, capsys):
    context = json.loads((folder / 'config.json').read_text())['max_position_embeddings']
    code, _, err = in_process(capsys, 'generate', 'x' * (context + 1), '--model', folder)
    assert code == 2 and f'{context + 1} tokens' in err and str(context) in err


def test_unusable_device_is_named():
    run = tinyvllm('generate', 'x', '--device', 'FOO')
    assert run.returncode == 2 and run.stderr.count('\n') == 1 and 'FOO' in run.stderr


def test_chat_remembers_resets_and_exits(folder):
    args = ('chat', '--model', folder, '--max-tokens', 3)
    run = tinyvllm(*args, input='a\nb\n/reset\na\n/exit\nnever read\n')
    assert run.returncode == 0, run.stderr
    assert run.stdout.endswith('\n') and 'never' not in run.stdout
    alone, again = (tinyvllm(*args, input=text).stdout for text in ('a\n', 'b\n/reset\na\n'))
    assert run.stdout.startswith(alone) and run.stdout.endswith(alone) and again.endswith(alone)


def hear_ctrl_c():
    "A program that a script starts in the background ignores Ctrl-C, and so would its children."
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_ctrl_c_stops_the_answer_and_not_the_program(folder):
    process = subprocess.Popen([sys.executable, '-u', '-m', 'tinyvllm', 'chat', '--model', str(folder),
                                '--max-tokens', '200', '--ignore-eos'], stdin=subprocess.PIPE,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=hear_ctrl_c)
    process.stdin.write(b'abc\n')
    process.stdin.flush()
    assert process.stdout.read(1)          # it answers, and is done in a fraction of a second
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(b'/exit\n', timeout=120)
    assert process.returncode == 0 and b'Traceback' not in err and b' ...' in out


def test_ctrl_c_aborts_the_request(folder, capsys, monkeypatch):
    llm = LLM(folder, max_num_seqs=1, max_model_len=32)
    pieces = []

    def interrupted(*text, **how):
        pieces.append(''.join(text))
        if len(pieces) == 3: raise KeyboardInterrupt
    monkeypatch.setattr('builtins.print', interrupted)
    text = reply(llm.stream('abc', SamplingParams(max_tokens=20, temperature=0, ignore_eos=True)))
    monkeypatch.undo()
    scheduler = llm.engine.scheduler
    assert text == ''.join(pieces[:3]) and pieces[3] == ' ...' and len(pieces) == 5
    assert not scheduler.running and scheduler.blocks.num_free == 2


@pytest.mark.parametrize('tokens', [1, 2, 3])
def test_no_speed_from_fewer_than_two_steps(tokens, folder, capsys):
    code, _, err = in_process(capsys, 'generate', 'abc', '--model', folder, '--max-tokens', tokens, '--ignore-eos')
    assert code == 0 and 'tok/s' not in err and '%' not in err and f'{tokens} token' in err


def test_no_share_above_the_limit(folder, capsys, monkeypatch):
    monkeypatch.setattr('tinyvllm.measure.bandwidth', lambda *a: 1.0)    # a byte per second
    code, _, err = in_process(capsys, 'generate', 'abc', '--model', folder, '--max-tokens', 8, '--ignore-eos')
    assert code == 0 and ' tok/s: 100.0% of the ' in err


def test_a_conversation_that_outgrows_the_context_says_so(folder, capsys, monkeypatch):
    monkeypatch.setattr('tinyvllm.cli.generate.CHAT_CONTEXT', 30)
    lines = iter(['a' * 40, 'a', '/reset', '/exit'])
    monkeypatch.setattr('tinyvllm.cli.generate.read_line', lambda: next(lines))
    code, out, err = in_process(capsys, 'chat', '--model', folder, '--max-tokens', 2)
    assert code == 0 and err.count('/reset forgets it') == err.count('\n') == 1 and 'context is 30' in err
    assert out.count('\n') == 1      # the second question was answered


def test_bench_appends_a_row_and_prints_it(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr('tinyvllm.measure.bandwidth', lambda *a: 10e9)
    ladder = tmp_path / 'ladder.jsonl'
    for args, label in ((['--rung', '01'], '01'), (['--rung', '01c'], '01c'), (['--rung', '08', '--requests', 1, 2], '08'),
                        (['--rung', '07'], '07'), (['--requests', 2], '10c')):
        code, out, err = in_process(capsys, 'bench', *args, '--model', folder, '--tokens', 4,
                                    '--prompt-tokens', 4, '--repeat', 1, '--ladder', ladder)
        assert code == 0 and str(ladder) in err
        assert f'| {label} |' in out and '| smollm2 float32 |' in out
    rows = [json.loads(line) for line in ladder.read_text().splitlines()]
    assert [(r['rung'], r['requests']) for r in rows] == [('01', 1), ('01c', 1), ('08', 1), ('08', 2),
                                                              ('07', 1), ('10c', 2)]
    assert all(r['greedy_equal'] and r['workload'] == '4+4' and r['model'] == folder.name for r in rows)
    alone, both, graph, fused = rows[2:]
    assert both['roof_tok_s'] > 1.5 * alone['roof_tok_s'] and both['kernels_per_token'] < 0.7 * alone['kernels_per_token']
    assert graph['kernels_per_token'] > 0.5 * alone['kernels_per_token'] > fused['kernels_per_token'] > 5
    code, _, err = in_process(capsys, 'bench', '--model', folder, '--tokens', 4, '--repeat', 1,
                              '--prompt-tokens', 4, '--ladder', tmp_path / 'no' / 'folder.jsonl')
    assert code == 2 and 'folder.jsonl' in err and err.splitlines()[-1].startswith('tinyvllm: error')
    code, _, err = in_process(capsys, 'bench', '--model', folder, '--prompt-tokens', 250, '--tokens', 7)
    assert code == 2 and '250+7 tokens are 257' in err and '256' in err and err.count('\n') == 1


def test_wrong_tokens_are_seen(monkeypatch):
    config, state = tiny_checkpoint(seed=0, num_hidden_layers=1)
    model = Llama(model_config(config), state)
    monkeypatch.setattr('tinyvllm.measure.bandwidth', lambda *a: 10e9)
    work = Workload(prompt_tokens=4, tokens=4, requests=2)
    assert measure_rung('04a', model, work, repeat=1).greedy_equal and measure_rung('08', model, work, repeat=1).greedy_equal
    sample = Sequence.append_tokens    # the second request says something else once
    monkeypatch.setattr(Sequence, 'append_tokens', lambda seq, tokens: sample(seq, [
        t._replace(token_id=(t.token_id + 1) % 9) if seq.id == (1, 0) and len(seq.sampled) == 1 else t for t in tokens]))
    assert not measure_rung('04a', model, work, repeat=1).greedy_equal


def test_info_and_help_tell_what_there_is():
    run = tinyvllm('info')
    for word in ('device', 'compiler', 'tinygrad', 'bandwidth', 'cache', 'model'):
        assert f'\n{word}' in f'\n{run.stdout}'
    text = tinyvllm('generate', '--help').stdout
    for word in ('"messages"', '"prompt_token_ids"', '"error"', 'exit code is 1', '--max-num-seqs'):
        assert word in text
    for command in ('pull', 'generate', 'chat', 'bench', 'info'):
        assert 'examples:' in tinyvllm(command, '--help').stdout


@pytest.mark.skipif(sys.platform == 'darwin', reason='METAL is simulated elsewhere')
def test_info_names_the_family_of_a_metal_gpu():
    run = tinyvllm('info', '--device', 'METAL')
    assert '\ngpu family Apple' in run.stdout and 'simulated' in run.stdout


def test_closed_pipe_is_no_error(folder):
    shell = f'"{sys.executable}" -m tinyvllm generate abc --model "{folder}" --max-tokens 40 | head -c 1; echo "${{PIPESTATUS[0]}}"'
    run = subprocess.run(['bash', '-c', shell], capture_output=True, text=True, timeout=300)
    assert 'Traceback' not in run.stderr and run.stdout.endswith('0\n')


def test_the_default_model_answers():
    run = tinyvllm('generate', 'The capital of France is', '--max-tokens', 2, '--json')
    result = json.loads(run.stdout)
    assert result['text'] == ' Paris.' and result['token_ids'] == [7042, 30]
    assert load_tokenizer(resolve('smollm2')).encode('The capital of France is') == result['prompt_token_ids']
