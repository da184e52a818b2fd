"""Write what follows from the order of the notebooks: `python tools/chapters.py`.

Number order is reading order. So the sidebar in _quarto.yml, the list of chapters in index.ipynb, and two lines
of each chapter (where it stands, and what comes next) are made here, from file names, titles and promises.
"""
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PARTS = {'00': 'Part 0: Foundations', '01': 'Part 1: A prompt becomes text', '02': 'Part 2: Many requests at once',
         '03': 'Part 2: Many requests at once', '04': 'Part 2: Many requests at once',
         '05': 'Part 3: Kernels of our own', '06': 'Part 3: Kernels of our own', '07': 'Part 4: The fast path',
         '08': 'Part 4: The fast path', '09': 'Part 5: A server', '10': 'Part 6: Beyond'}
HERE, NEXT = '**Part ', '**Next:** '


@dataclass(frozen=True)
class Chapter:
    "One numbered notebook."
    path: Path
    number: str   # such as 04a
    title: str
    promise: str  # one line
    module: str   # that it exports, such as core.scheduler; empty if none

    @property
    def part(self):
        return PARTS[self.number[:2]]

    @property
    def link(self):
        return f'[{self.title}]({self.path.name})'


def read_notebook(path):
    return json.loads(path.read_text(encoding='utf-8'))


def write_notebook(path, notebook):
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True) + '\n', encoding='utf-8')


def read_chapter(path):
    "The facts of one notebook."
    cells = [''.join(cell['source']) for cell in read_notebook(path)['cells']]
    title, _, promise = cells[0].partition('\n\n> ')
    module = re.search(r'^#\| default_exp (\S+)$', '\n'.join(cells), re.M)
    return Chapter(path, path.name.partition('_')[0], title.removeprefix('# ').strip(), ' '.join(promise.split()),
                   module[1] if module else '')


def all_chapters(folder=ROOT / 'nbs'):
    "In reading order."
    return [read_chapter(path) for path in sorted(folder.glob('[0-9]*.ipynb'))]


def by_part(chapters):
    "Pairs of a part's name and its chapters."
    names = list(dict.fromkeys(c.part for c in chapters))
    return [(name, [c for c in chapters if c.part == name]) for name in names]


def sidebar(chapters):
    "The lines of _quarto.yml that list all pages."
    lines = ['      - text: "Welcome"', '        href: index.ipynb',
             '      - text: "Architecture"', '        href: architecture.ipynb',
             '      - text: "Your Mac\'s numbers"', '        href: mac.ipynb']
    for name, members in by_part(chapters):
        lines += [f'      - section: "{name}"', '        contents:']
        for c in members:
            lines += [f'          - text: "{c.number} {c.title}"', f'            href: {c.path.name}']
    return '\n'.join(lines)


def course(chapters):
    "The course's table of contents: the source of one cell for each part."
    for i, (name, members) in enumerate(by_part(chapters)):
        heading = '## The course\n\n' if i == 0 else ''
        yield f'{heading}**{name}**\n\n' + '\n'.join(f'- {c.number} {c.link}: {c.promise}' for c in members)


def write_quarto(chapters, path):
    "Replace the contents of the sidebar."
    text = path.read_text(encoding='utf-8')
    head, _, rest = text.partition('    contents:\n')
    tail = rest[rest.index('\nformat:'):]
    path.write_text(f'{head}    contents:\n{sidebar(chapters)}\n{tail}', encoding='utf-8')


def write_index(chapters, path):
    "Replace the cells from `## The course` to the next heading."
    notebook = read_notebook(path)
    cells, sources = notebook['cells'], [''.join(c['source']) for c in notebook['cells']]
    first = next(i for i, text in enumerate(sources) if text.startswith('## The course'))
    last = next(i for i in range(first + 1, len(cells)) if sources[i].startswith('## '))
    new = [dict(cell_type='markdown', id=f'course{i}', metadata={}, source=text.splitlines(keepends=True))
           for i, text in enumerate(course(chapters))]
    notebook['cells'] = cells[:first] + new + cells[last:]
    write_notebook(path, notebook)


def place(chapter, before):
    "Where a chapter stands, as a line of Markdown."
    name, _, what = chapter.part.partition(': ')
    back = f' Before this: {before.link}.' if before else ''
    module = f' This chapter exports `tinyvllm.{chapter.module}`.' if chapter.module else ''
    return f'**{name}, {what}.**{back}{module}'


def with_place(text, line):
    "The section `## Where we are` with its generated first line."
    heading, _, rest = text.partition('\n')
    rest = rest.lstrip('\n')
    if rest.startswith(HERE):
        rest = rest.partition('\n')[2].lstrip('\n')
    return f'{heading}\n\n{line}' + (f'\n\n{rest}' if rest else '')


def with_next(text, chapter):
    "The last section with a generated last line; none after the last chapter."
    text = re.sub(r'\n+' + re.escape(NEXT) + r'.*\Z', '', text, flags=re.S)
    return text + (f'\n\n{NEXT}{chapter.link}: {chapter.promise}' if chapter else '')


def write_chapter(chapter, before, after):
    "Set the two generated lines of a notebook."
    notebook = read_notebook(chapter.path)
    prose = [c for c in notebook['cells'] if c['cell_type'] == 'markdown']
    for cell in prose:
        text = ''.join(cell['source'])
        if text.startswith('## Where we are'):
            cell['source'] = with_place(text, place(chapter, before)).splitlines(keepends=True)
    text = ''.join(prose[-1]['source'])
    prose[-1]['source'] = with_next(text, after).splitlines(keepends=True)
    if notebook != read_notebook(chapter.path):
        write_notebook(chapter.path, notebook)


def write_all(folder=ROOT):
    "Write everything that follows from the order of the notebooks in `folder`/nbs; returns the chapters."
    chapters = all_chapters(folder / 'nbs')
    write_quarto(chapters, folder / '_quarto.yml')
    write_index(chapters, folder / 'nbs/index.ipynb')
    for before, chapter, after in zip([None, *chapters], chapters, [*chapters[1:], None]):
        write_chapter(chapter, before, after)
    return chapters


def main():
    chapters = write_all()
    print(f'{len(chapters)} chapters in {len(by_part(chapters))} parts')


if __name__ == '__main__':
    sys.exit(main())
