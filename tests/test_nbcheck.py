"The notebook lint finds each fault when it is planted into a notebook without faults."
import copy
import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
spec = importlib.util.spec_from_file_location('nbcheck', ROOT / 'tools' / 'nbcheck.py')
nbcheck = importlib.util.module_from_spec(spec)
spec.loader.exec_module(nbcheck)

PICTURE = {'output_type': 'display_data', 'metadata': {}, 'data': {'image/png': 'AAAA'}}


def md(text):
    return {'cell_type': 'markdown', 'metadata': {}, 'source': text}


def code(text, *outputs):
    return {'cell_type': 'code', 'metadata': {}, 'source': text, 'outputs': list(outputs), 'execution_count': None}


def shown(text):
    return {'output_type': 'execute_result', 'metadata': {}, 'data': {'text/plain': text}, 'execution_count': None}


def chapter():
    "A small notebook that keeps every rule, by name of cell."
    cells = {'title': md('# Title\n\n> Promise.'), 'module': code('#| default_exp toy'),
             'imports': code('#| export\nimport math')}
    for name in nbcheck.SECTIONS:
        cells[name] = md(f'## {name}\n\nSome words.')
        if name == 'The idea':
            cells['figure'] = code('draw()', PICTURE)
        if name == 'Build it':
            cells['function'] = code('#| exports\ndef double(\n    a: int, # a number\n) -> int: # twice that\n'
                                     '    "Double a number."\n    return 2*a')
            cells['value'] = code('double(2), 1', shown('(4, 1)'))
        if name == 'Measure again':
            cells['plot'] = code('plot()', PICTURE)
        if name == 'Exercises':
            for n in 'abc':
                cells[f'stub {n}'] = code(f'#| eval: false\ndef {n}(): ...')
                cells[f'solution {n}'] = code(
                    f'#| code-fold: true\n#| code-summary: "Solution"\ndef {n}(): return 1\nassert {n}() == 1')
    cells['last'] = code('#| hide\nimport nbdev; nbdev.nbdev_export()')
    return cells


def faults(cells, folder, name='00_toy'):
    "The messages about a notebook of these cells."
    path = folder / f'{name}.ipynb'
    nb = {'cells': list(copy.deepcopy(cells).values()), 'metadata': {}, 'nbformat': 4, 'nbformat_minor': 5}
    path.write_text(json.dumps(nb))
    return [message for _, message in nbcheck.check_notebook(path)]


def lines(n, head=''):
    return head + '\n'.join(f'x{i} = {i}' for i in range(n))


def test_a_good_chapter_has_no_faults(tmp_path):
    assert faults(chapter(), tmp_path) == []


def test_the_index_needs_no_sections(tmp_path):
    page = {'title': md('# tinyvllm\n\n> Promise.'), 'run': code('1 + 1', shown('2'))}
    assert faults(page, tmp_path, 'index') == []
    assert faults(page, tmp_path, '00_toy') != []


CHANGES = {
    'no promise': ('title', md('# Title'), 'one-line promise'),
    'long lesson': ('value', code(lines(11)), '11 lines: at most 10'),
    'long export': ('function', code(lines(41, '#| export\n')), '41 lines: at most 40'),
    'long kernel': ('function', code('#| exports\nK = """' + '\n'.join('a' for _ in range(121)) + '"""'), '121 lines: at most 120'),
    'long class': ('function', code('#| exports\nclass A:\n' + '    x = 1\n' * 120), '121 lines: at most 120'),
    'long module': ('function', code('#| exports\nclass A:\n' + '    x = 1\n' * 100), 'words for 102 exported lines'),
    'long folded': ('figure', code(lines(41, '#| code-fold: true\n'), PICTURE), '41 lines: at most 40'),
    'long hidden': ('value', code(lines(41, '#| hide\n')), '41 lines: at most 40'),
    'wide code': ('value', code('x = ' + '1' * 97), '101 columns'),
    'long prose': ('The problem', md('## The problem\n\n' + 'word ' * 121), '121 words: at most 120'),
    'extra section': ('value', md('## Another'), 'not one of the 11 sections'),
    'missing section': ('Plug it in', md('### Plug it in'), 'missing sections: `## Plug it in`'),
    'typo in directive': ('value', code('#| exprot\nx = 1'), 'unknown directive `#| exprot`'),
    'other module': ('function', code('#| export other\nx = 1'), 'writes into another module'),
    'late directive': ('value', code('x = 1\n#| export'), 'below the first line'),
    'spaced directive': ('value', code('# | export\nx = 1'), 'without a space'),
    'metadata': ('value', {**code('x = 1'), 'metadata': {'tags': ['hide']}}, 'directives stand in the source'),
    'mixed imports': ('imports', code('#| export\nimport math\nx = math.pi'), 'imports stand in a cell'),
    'tinygrad first': ('imports', code('#| export\nfrom tinygrad import Tensor\nimport tinyvllm'), 'before tinyvllm'),
    'tinygrad alone': ('imports', code('import tinygrad.helpers, tinyvllm'), 'before tinyvllm'),
    'no last cell': ('last', code('x = 1'), 'the last code cell'),
    'last cell shown': ('last', code('import nbdev; nbdev.nbdev_export()'), 'the last code cell'),
    'error output': ('value', code('1/0', {'output_type': 'error', 'ename': 'ZeroDivisionError'}), 'an error in the stored'),
    'path in stream': ('plot', code('p()', PICTURE, {'output_type': 'stream', 'text': 'in /tmp/abc'}), '/tmp/abc'),
    'path in value': ('value', code('p, 1', shown("'/home/me/x'")), '/home/me'),
    'address': ('value', code('o, 1', shown('<object at 0x7f0123456789>')), '0x7f0123456789'),
    'not executed': ('value', code('double(2), 1'), 'stores none'),
    'unfinished': ('The idea', md('## The idea\n\nTODO'), 'TODO left'),
    'linked name': ('The idea', md('## The idea\n\nSee [`LLM`](04d_llm.ipynb).'), 'links `names` itself'),
    'two solutions': ('solution b', md('no code'), '2 solutions'),
    'open solution': ('solution b', code('#| code-summary: "Solution"\nassert True'), 'a solution is folded'),
    'solution unchecked': ('solution b', code('#| code-fold: true\n#| code-summary: "Solution"\nx = 1'), 'checks itself'),
    'solution not run': ('solution b', code('#| eval: false\n#| code-fold: true\n#| code-summary: "Solution"\nassert True'), 'checks itself'),
    'no figure in the idea': ('figure', code('draw()'), 'no figure in `## The idea`'),
    'one figure': ('plot', code('plot()'), '1 figures'),
}


@pytest.mark.parametrize('fault', CHANGES)
def test_planted_fault_is_found(fault, tmp_path):
    cell, planted, message = CHANGES[fault]
    found = faults({**chapter(), cell: planted}, tmp_path)
    assert any(message in f for f in found), found


@pytest.mark.parametrize('imports', ['import tinyvllm, tinygrad', 'import math\nfrom tinyvllm.core import blocks\nfrom tinygrad import Tensor'])
def test_tinyvllm_before_tinygrad_is_right(imports, tmp_path):
    later = code('from tinygrad import dtypes')
    assert faults({**chapter(), 'imports': code(imports), 'value': later}, tmp_path) == []


def test_sections_out_of_order(tmp_path):
    cells = chapter()
    cells['The problem'], cells['Measure it'] = cells['Measure it'], cells['The problem']
    assert any('comes after' in f for f in faults(cells, tmp_path))


def test_a_notebook_is_not_longer_than_a_sitting(tmp_path):
    cells, last = chapter(), chapter()['last']
    words = {f'words {i}': md('word ' * 100) for i in range(10)}
    fits = {f'class {i}': code('#| exports\nclass A:\n' + '    x = 1\n' * 97) for i in range(3)}
    more = {'one more': code(lines(10, '#| export\n'))}
    del cells['last']
    assert faults({**cells, **words, **fits, 'last': last}, tmp_path) == []
    assert faults({**cells, **words, **fits, **more, 'last': last}, tmp_path) == [
        '310 exported lines: at most 300; split by noun']


def test_an_appendix_needs_four_sections(tmp_path):
    cells = {name: cell for name, cell in chapter().items() if name in (*nbcheck.APPENDIX, 'module', 'imports', 'function', 'value')}
    last = chapter()['last']
    appendix = {'title': md('# Appendix: Toys\n\n> Promise.'), **cells, 'words': md('word ' * 20), 'last': last}
    assert faults(appendix, tmp_path) == []
    assert any('missing sections' in f for f in faults({**appendix, 'title': md('# Toys\n\n> Promise.')}, tmp_path))
    assert any('missing sections' in f for f in faults({**appendix, 'Same answer?': md('nothing')}, tmp_path))


def test_generated_lines_do_not_count_as_prose():
    assert nbcheck.prose_words('**Next:** [A](a.ipynb): one two three\n- 04a [B](b.ipynb): four\n**Part 1, x.** five\nsix') == 1


def test_too_large(tmp_path):
    big = {**PICTURE, 'data': {'image/png': 'A' * 401 * 1024}}
    assert any('KB: at most 400' in f for f in faults({**chapter(), 'plot': code('plot()', big)}, tmp_path))


def test_two_owners_of_a_module(tmp_path, capsys):
    for name in ('00_a', '00_b'):
        faults(chapter(), tmp_path, name)
    assert nbcheck.main([str(tmp_path / '00_a.ipynb')]) == 0
    assert nbcheck.main([str(tmp_path / '00_a.ipynb'), str(tmp_path / '00_b.ipynb')]) == 1
    assert 'belongs to 00_a.ipynb' in capsys.readouterr().out
