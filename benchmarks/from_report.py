"""What did `tinyvllm doctor --report` measure on somebody's machine?

    python benchmarks/from_report.py mac.json            # adds rows to nbs/ladder.jsonl and benchmarks/results/
    python benchmarks/from_report.py mac.json --show     # prints them and keeps none

Rungs become rows of the ladder, bandwidths rows of bandwidth.jsonl, kernels and counts rows of doctor.jsonl. A row has
the machine, commit and day of the report. Parts that are wrong or had no time give none, a row that is there already
is not added again, and the report of a simulated device is refused. What is unusual about the machine is printed: keep
no rows of a virtual or a busy one.
"""
import argparse
import json
import sys
from dataclasses import fields
from pathlib import Path

import tinyvllm  # noqa: F401  picks device and compiler before tinygrad looks
from common import RESULTS, write_row
from tinyvllm.cli.report import read_report
from tinyvllm.errors import BadInput
from tinyvllm.measure import LadderRow, append_row

LADDER = Path(__file__).parents[1] / 'nbs/ladder.jsonl'
COMMON = 'machine', 'device', 'tinygrad', 'commit'    # of what a report is about


def good_parts(content: dict, section: str):
    "Pairs of a name and a result, for each part that ran and was right."
    for name, result in content['sections'].get(section, {}).items():
        if result.get('ok') and 'skipped' not in result:
            yield name, {key: value for key, value in result.items() if key not in ('ok', 'seconds', 'warnings')}


def result_rows(content: dict):
    "Pairs of a file's name and a row for it."
    about = {key: content['about'][key] for key in COMMON} | dict(date=content['date'])
    for what, result in good_parts(content, 'bandwidth'):
        yield 'bandwidth.jsonl', dict(what=what, **result) | about
    for section in 'kernels', 'counts':
        for what, result in good_parts(content, section):
            yield 'doctor.jsonl', dict(section=section, what=what, **result) | about


def ladder_rows(content: dict) -> list[LadderRow]:
    "The rows of the ladder."
    names = {field.name for field in fields(LadderRow)}
    return [LadderRow(**{key: value for key, value in result.items() if key in names})
            for _, result in good_parts(content, 'rungs')]


def stored(path: Path) -> list[dict]:
    "The rows of a file without their commands."
    lines = path.read_text(encoding='utf-8').splitlines() if path.exists() else []
    return [{key: value for key, value in json.loads(line).items() if key != 'command'} for line in lines]


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('report', type=Path, help='what `tinyvllm doctor --report` wrote')
    p.add_argument('--ladder', type=Path, default=LADDER)
    p.add_argument('--results', type=Path, default=RESULTS, help='the folder of the other files')
    p.add_argument('--show', action='store_true', help='print the rows and keep none')
    args = p.parse_args()
    try:
        content = read_report(args.report)
    except BadInput as error:
        sys.exit(str(error))
    if content['about']['simulated']:
        sys.exit(f'{args.report} was made where METAL is simulated: it has no times')
    for note in content['sections'].get('facts', {}).get('machine', {}).get('notes', ()):
        print(f'note: {note}', file=sys.stderr)
    writers = [(args.results / name, row, write_row) for name, row in result_rows(content)]
    writers += [(args.ladder, vars(row), lambda path, row: append_row(path, LadderRow(**row)))
                for row in ladder_rows(content)]
    new = [(path, row, write) for path, row, write in writers if row not in stored(path)]
    for path, row, write in new:
        print(f'{path.name}: {json.dumps(row)}')
        if not args.show:
            write(path, row)
    print(f'{len(new)} new rows, {len(writers) - len(new)} were there already', file=sys.stderr)


if __name__ == '__main__':
    main()
