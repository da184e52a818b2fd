"""Check that notebooks keep the shape of the course: `python tools/nbcheck.py [NOTEBOOK ...]`.

Prints `file:cell: message` for each fault (cells count from 0) and exits 1; warnings alone exit 0.
Without arguments it reads all notebooks and the package: functions there stay within 30 lines too.
"""
import ast
import json
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SECTIONS = ['Where we are', 'The problem', 'Measure it', 'The idea', 'Build it', 'Same answer?',
            'Plug it in', 'Measure again', 'What we learned', 'Exercises',
            'Where this lives elsewhere']
FLAGS = {'slow', 'metal', 'cuda', 'bench'}  # tst_flags in settings.ini
EXPORTS = {'export', 'exports', 'exporti'}
DIRECTIVES = FLAGS | EXPORTS | {'default_exp', 'hide', 'eval:', 'echo:', 'include:', 'code-fold:',
                                'code-summary:'}
LESSON_LINES, EXPORT_WARN, EXPORT_LINES, KERNEL_LINES = 10, 20, 30, 40
PROSE_WORDS, CELLS, KILOBYTES, COLUMNS, EXERCISES = 120, 90, 300, 100, 3
PRIVATE = re.compile(r'/(?:tmp|home|root|Users|var/folders)/[\w.-]*|\b0x[0-9a-f]{8,}\b')
LAST_CELL = 'import nbdev; nbdev.nbdev_export()'


@dataclass
class Cell:
    "One cell: its source without directives, its directives, and the `## ` section it stands in."
    kind: str
    source: str
    raw: dict
    section: str = ''
    directives: dict[str, str] = field(default_factory=dict)

    @property
    def exported(self):
        return bool(EXPORTS & self.directives.keys())

    @property
    def runs(self):
        return not FLAGS & self.directives.keys() and self.directives.get('eval:') != 'false'

    @property
    def lines(self):
        return sum(bool(line.strip()) for line in self.source.splitlines())

    @property
    def body(self):
        "The top-level statements, none for prose and for code that does not parse."
        try:
            return ast.parse(self.source).body if self.kind == 'code' else []
        except SyntaxError:
            return []


def read_cells(path):
    "The cells of a notebook file."
    section, cells = '', []
    for raw in json.loads(path.read_text(encoding='utf-8'))['cells']:
        text = ''.join(raw['source'])
        cell = Cell(raw['cell_type'], text, raw)
        if cell.kind == 'code':
            lines = text.splitlines()
            marks = [line for line in lines if line.startswith('#|')]
            words = [mark[2:].split(None, 1) for mark in marks]
            cell.directives = {w[0]: (w[1].strip() if len(w) > 1 else '') for w in words if w}
            cell.source = '\n'.join(line for line in lines if line not in marks)
        elif heading := re.search(r'^## (.+)$', text, re.M):
            section = heading[1].strip()
        cell.section = section
        cells.append(cell)
    return cells


# Each rule takes the cells of one notebook and yields (cell number, message).

def has_title(cells):
    if not cells or not re.match(r'# .+\n\n> .+', cells[0].source):
        yield 0, 'the first cell is `# Title`, an empty line, `> one-line promise`'


def has_sections(cells):
    found = [(i, h.strip()) for i, c in enumerate(cells) if c.kind == 'markdown'
             for h in re.findall(r'^## (.+)$', c.source, re.M)]
    if [h for _, h in found] == SECTIONS:
        return
    if missing := [name for name in SECTIONS if name not in [h for _, h in found]]:
        yield 0, 'missing sections: ' + ', '.join(f'`## {name}`' for name in missing)
    for i, name in found:
        if name not in SECTIONS:
            yield i, f'`## {name}` is not one of the eleven sections: use `###`'
    known = [(i, h) for i, h in found if h in SECTIONS]
    for (_, before), (i, name) in zip(known, known[1:]):
        if SECTIONS.index(name) <= SECTIONS.index(before):
            yield i, f'`## {name}` comes after `## {before}`'


def sizes(cells):
    if len(cells) > CELLS:
        yield 0, f'{len(cells)} cells: at most {CELLS}'
    for i, c in enumerate(cells):
        if c.kind == 'markdown':
            if (words := prose_words(c.source)) > PROSE_WORDS:
                yield i, f'{words} words: at most {PROSE_WORDS} in a prose cell'
            continue
        if c.lines > (limit := line_limit(c)):
            yield i, f'{c.lines} lines: at most {limit} here'
        elif c.exported and limit == EXPORT_LINES and c.lines > EXPORT_WARN:
            yield i, f'warning: {c.lines} lines: {EXPORT_WARN} read better'
        if (columns := max(map(len, c.source.splitlines()), default=0)) > COLUMNS:
            yield i, f'{columns} columns: at most {COLUMNS}'


def prose_words(text):
    "Words outside code blocks, tables, headings and link targets."
    text = re.sub(r'```.*?```', '', text, flags=re.S)
    text = re.sub(r'^(\||#+ ).*$|\]\([^)]*\)', '', text, flags=re.M)
    return len(re.findall(r"\w[\w'-]*", text))


def line_limit(cell):
    "A kernel's source may be longest; exported, hidden and folded cells longer than the lesson."
    if len(cell.body) == 1 and isinstance(getattr(cell.body[0], 'value', None), ast.Constant):
        return KERNEL_LINES
    folded = 'hide' in cell.directives or cell.directives.get('code-fold:') == 'true'
    return EXPORT_LINES if cell.exported or folded else LESSON_LINES


def directives(cells):
    for i, c in enumerate(cells):
        if c.raw.get('metadata'):
            yield i, f'cell metadata {sorted(c.raw["metadata"])}: directives stand in the source'
        for name, value in c.directives.items():
            if name not in DIRECTIVES:
                yield i, f'unknown directive `#| {name}`'
            elif name in EXPORTS and value:
                yield i, f'`#| {name} {value}` writes into another module'
        lines = ''.join(c.raw['source']).splitlines() if c.kind == 'code' else []
        plain = [n for n, line in enumerate(lines) if line.strip() and not line.startswith('#|')]
        if plain and any(line.lstrip().startswith('#|') for line in lines[plain[0]:]):
            yield i, 'a directive below the first line of code does nothing'
        if any(re.match(r'#\s+\|', line) for line in lines):
            yield i, 'write `#|` without a space'


def imports_alone(cells):
    for i, c in enumerate(cells):
        kinds = {isinstance(s, (ast.Import, ast.ImportFrom)) for s in c.body}
        if kinds == {True, False} and c.source.strip() != LAST_CELL:
            yield i, 'imports stand in a cell of their own: the site build runs cells that import'


def package_first(cells):
    "tinyvllm finds the device and the compiler, and tinygrad reads them when it is imported."
    for i, package in imported(cells):
        if package == 'tinygrad':
            yield i, 'imports tinygrad before tinyvllm, which finds the device and the compiler'
        if package in ('tinygrad', 'tinyvllm'):
            return


def imported(cells):
    "(cell number, package) of each import, in the order in which they run."
    for i, c in enumerate(cells):
        nodes = [n for s in c.body for n in ast.walk(s)] if c.runs else []
        imports = [n for n in nodes if isinstance(n, (ast.Import, ast.ImportFrom))]
        for node in sorted(imports, key=lambda n: n.lineno):
            is_from = isinstance(node, ast.ImportFrom)
            for name in [node.module or ''] if is_from else [a.name for a in node.names]:
                yield i, name.split('.')[0]


def ends_with_export(cells):
    if any('default_exp' in c.directives for c in cells):
        last = [c for c in cells if c.kind == 'code'][-1]
        if last.source.strip() != LAST_CELL or 'hide' not in last.directives:
            yield len(cells) - 1, f'the last code cell is `#| hide` and `{LAST_CELL}`'


def outputs(cells):
    for i, c in enumerate(cells):
        for out in c.raw.get('outputs', []):
            if out['output_type'] == 'error':
                yield i, f'an error in the stored output: {out.get("ename")}'
            if found := PRIVATE.search(output_text(out)):
                yield i, f'a path or address of one machine in the stored output: {found[0]}'


def output_text(out):
    "The text of one stored output; pictures aside."
    texts = [v for kind, v in out.get('data', {}).items() if kind.startswith('text/')]
    return '\n'.join(''.join(text) for text in [out.get('text', ''), *texts])


def executed(cells):
    for i, c in enumerate(cells):
        if not c.body or not isinstance(c.body[-1], ast.Expr) or c.source.rstrip().endswith(';'):
            continue
        may_be_none = isinstance(c.body[-1].value, (ast.Call, ast.Await, ast.Constant))
        if c.runs and not may_be_none and not c.raw.get('outputs'):
            yield i, 'ends in a value and stores none: run tools/run_nbs.py'


def unfinished(cells):
    for i, c in enumerate(cells):
        if found := re.search(r'\b(TODO|FIXME|XXX)\b', c.source):
            yield i, f'{found[0]} left'


def exercises(cells):
    solved = [(i, c) for i, c in enumerate(cells) if c.section == 'Exercises' and
              c.directives.get('code-summary:', '').strip('"\'').startswith('Solution')]
    if len(solved) != EXERCISES:
        yield 0, f'{len(solved)} solutions (`#| code-summary: "Solution"`): {EXERCISES} expected'
    for i, c in solved:
        if c.directives.get('code-fold:') != 'true':
            yield i, 'a solution is folded: `#| code-fold: true`'
        if not c.runs or not any(isinstance(n, ast.Assert) for s in c.body for n in ast.walk(s)):
            yield i, 'a solution runs and checks itself with `assert`'


def figures(cells):
    drawn = [c.section for c in cells for out in c.raw.get('outputs', [])
             if any(kind.startswith('image/') for kind in out.get('data', {}))]
    if 'The idea' not in drawn:
        yield 0, 'no figure in `## The idea`'
    if len(drawn) < 2:
        yield 0, f'{len(drawn)} figures: at least two'


EVERY = [sizes, directives, imports_alone, package_first, ends_with_export, outputs, executed, unfinished]
CHAPTER = [has_title, has_sections, exercises, figures]  # not for index.ipynb, the front page


def check_notebook(path):
    "All faults of one notebook."
    path, cells = Path(path), read_cells(Path(path))
    if (size := path.stat().st_size) > KILOBYTES * 1024:
        yield 0, f'{size // 1024} KB: at most {KILOBYTES}'
    for rule in EVERY + (CHAPTER if path.stem != 'index' else []):
        yield from rule(cells)


def check_owners(paths):
    "Two notebooks with one `default_exp` overwrite each other's module."
    owners = {}
    for path in paths:
        for i, c in enumerate(read_cells(path)):
            if module := c.directives.get('default_exp'):
                if module in owners:
                    yield path, i, f'`default_exp {module}` belongs to {owners[module]}'
                owners.setdefault(module, path.name)


def check_module(path):
    "Functions of the package that are longer than a screen."
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            if (lines := node.end_lineno - node.lineno + 1) > EXPORT_LINES:
                yield node.lineno, f'{node.name}: {lines} lines: at most {EXPORT_LINES}'


def main(args):
    paths = [Path(a) for a in args] or sorted((ROOT / 'nbs').glob('*.ipynb'))
    faults = [(p, i, m) for p in paths for i, m in check_notebook(p)] + list(check_owners(paths))
    modules = [] if args else sorted((ROOT / 'tinyvllm').rglob('*.py'))
    faults += [(p, i, m) for p in modules for i, m in check_module(p)]
    for path, i, message in faults:
        print(f'{path.relative_to(ROOT) if path.is_relative_to(ROOT) else path}:{i}: {message}')
    errors = sum(not m.startswith('warning') for _, _, m in faults)
    print(f'{len(paths)} notebooks, {len(modules)} modules: '
          f'{errors} faults, {len(faults) - errors} warnings')
    return 1 if errors else 0


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
