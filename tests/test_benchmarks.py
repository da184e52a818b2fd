"The benchmarks' table is up to date, names every script, and each script says how it is run."
import ast
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from tools import benchmarks  # noqa: E402

NAMES = [name for names in benchmarks.SUBJECTS.values() for name in names]


def test_the_table_names_every_script_and_is_up_to_date():
    assert sorted(NAMES) == sorted(p.stem for p in benchmarks.FOLDER.glob('*.py') if p.stem != 'common')
    assert (benchmarks.FOLDER / 'README.md').read_text(encoding='utf-8') == benchmarks.readme()


@pytest.mark.parametrize('name', NAMES)
def test_a_script_asks_a_question_and_shows_its_command(name):
    question, command = benchmarks.describe(benchmarks.FOLDER / f'{name}.py')
    assert question[-1] in '?.' and command.startswith(f'python benchmarks/{name}.py')


@pytest.mark.parametrize('path', sorted((ROOT / 'benchmarks/results').glob('*.jsonl')), ids=lambda p: p.stem)
def test_rows_name_commit_day_and_command(path):
    rows = [json.loads(line) for line in path.read_text(encoding='utf-8').splitlines()]
    assert rows and all({'commit', 'date', 'command'} <= row.keys() for row in rows)


def test_rows_are_written_in_one_place():
    writers = [p.stem for p in benchmarks.FOLDER.glob('*.py') for node in ast.walk(ast.parse(p.read_text(encoding='utf-8')))
               if isinstance(node, ast.Call) and getattr(node.func, 'attr', '') == 'open' and "'a'" in ast.unparse(node)]
    assert writers == ['common']
