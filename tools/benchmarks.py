"""Write benchmarks/README.md: what each benchmark measures, its command, its newest row: `python tools/benchmarks.py`."""
import ast
import json
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / 'benchmarks'
SUBJECTS = {
    'Memory': ['bandwidth', 'load'],
    'Kernels': ['kernels', 'flash_sweep', 'registers', 'cpu_kernels', 'cpu_linear', 'gpu_linear', 'sampler'],
    'The engine': ['scheduler', 'host', 'runner', 'chunked', 'metrics'],
    'Quality': ['quant_quality', 'json_schemas', 'control'],
    'The server': ['serve_speed', 'serve_load'],
    'Other machines': ['from_report'],
    'Beside others': ['llama_cpp', 'gpt_fast', 'h100', 'trace']}
HEAD = """<!-- Written by tools/benchmarks.py: edit that, and the docstrings. -->

# Benchmarks

Each script answers one question, prints rows, and adds them to a file in `results/`. A row names the machine, the
commit, the day and the command. `common.py` holds what the scripts share: it writes the rows, waits for an idle
machine, and lets two programs run in turn. Compare rows of one run; between runs a machine differs from itself.
"""


def describe(path):
    "The question of a benchmark, and its shortest command."
    lines = ast.get_docstring(ast.parse(path.read_text(encoding='utf-8'))).splitlines()
    command = next(line.split('  #')[0].strip() for line in lines if line.strip().startswith('python benchmarks/'))
    return lines[0], command


def newest(name):
    "The last stored row that this script wrote; None if there is none."
    rows = [json.loads(line) for path in sorted((FOLDER / 'results').glob('*.jsonl'))
            for line in path.read_text(encoding='utf-8').splitlines()]
    mine = [row for row in rows if f'benchmarks/{name}.py' in row.get('command', '')]
    return max(mine, key=lambda row: row['date'], default=None)


def readme():
    "The whole text."
    parts = [HEAD]
    for subject, names in SUBJECTS.items():
        parts += [f'## {subject}\n', '| question | command | last result |\n|---|---|---|']
        for name in names:
            question, command = describe(FOLDER / f'{name}.py')
            row = newest(name)
            last = ', '.join(filter(None, map(row.get, ('date', 'commit', 'machine')))) if row else 'none stored'
            parts.append(f'| {question} | `{command}` | {last} |')
        parts.append('')
    return '\n'.join(parts)


if __name__ == '__main__':
    (FOLDER / 'README.md').write_text(readme(), encoding='utf-8')
