"""Check that notebooks keep the shape of the course: `python tools/nbcheck.py [NOTEBOOK ...]`.

Prints `file:cell: message` for each fault (cells count from 0) and exits 1.
Without arguments it reads all notebooks. The package itself is checked by tests/test_architecture.py.
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
APPENDIX = ['Where we are', 'Build it', 'Same answer?', 'Where this lives elsewhere']  # of plumbing: `# Appendix: ...`
PAGES = {'index', 'architecture', 'mac'}  # no chapters
FLAGS = {'slow', 'metal', 'cuda', 'bench'}  # tst_flags in settings.ini
EXPORTS = {'export', 'exports', 'exporti'}
DIRECTIVES = FLAGS | EXPORTS | {'default_exp', 'hide', 'eval:', 'echo:', 'include:', 'code-fold:',
                                'code-summary:'}
LESSON_LINES, EXPORT_LINES, CLASS_LINES = 10, 40, 120  # a cell with one class or one kernel may be long
PROSE_WORDS, KILOBYTES, COLUMNS, EXERCISES = 120, 400, 100, 3
MODULE_LINES, WORDS_A_LINE = 300, 3  # of a notebook: exported lines at most, words of prose for each at least
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


def is_appendix(cells):
    return bool(cells) and cells[0].source.startswith('# Appendix: ')


def has_sections(cells):
    sections = APPENDIX if is_appendix(cells) else SECTIONS
    found = [(i, h.strip()) for i, c in enumerate(cells) if c.kind == 'markdown'
             for h in re.findall(r'^## (.+)$', c.source, re.M)]
    if [h for _, h in found] == sections:
        return
    if missing := [name for name in sections if name not in [h for _, h in found]]:
        yield 0, 'missing sections: ' + ', '.join(f'`## {name}`' for name in missing)
    for i, name in found:
        if name not in sections:
            yield i, f'`## {name}` is not one of the {len(sections)} sections: use `###`'
    known = [(i, h) for i, h in found if h in sections]
    for (_, before), (i, name) in zip(known, known[1:]):
        if sections.index(name) <= sections.index(before):
            yield i, f'`## {name}` comes after `## {before}`'


def has_prose(cells):
    "A module that can be read in one sitting, and enough words about it."
    lines = sum(c.lines for c in cells if c.exported)
    words = sum(prose_words(c.source) for c in cells if c.kind == 'markdown')
    if lines > MODULE_LINES:
        yield 0, f'{lines} exported lines: at most {MODULE_LINES}; split by noun'
    if words < WORDS_A_LINE * lines:
        yield 0, f'{words} words for {lines} exported lines: at least {WORDS_A_LINE} for each'


def sizes(cells):
    for i, c in enumerate(cells):
        if c.kind == 'markdown':
            if (words := prose_words(c.source)) > PROSE_WORDS:
                yield i, f'{words} words: at most {PROSE_WORDS} in a prose cell'
            continue
        if c.lines > (limit := line_limit(c)):
            yield i, f'{c.lines} lines: at most {limit} here'
        if (columns := max(map(len, c.source.splitlines()), default=0)) > COLUMNS:
            yield i, f'{columns} columns: at most {COLUMNS}'


def prose_words(text):
    "Words outside code blocks, tables, headings, link targets and what tools/chapters.py writes."
    text = re.sub(r'```.*?```', '', text, flags=re.S)
    text = re.sub(r'^(\||#+ |\*\*Next:|\*\*Part |- \d\d\w* \[).*$|\]\([^)]*\)', '', text, flags=re.M)
    return len(re.findall(r"\w[\w'-]*", text))


def line_limit(cell):
    "A class and a kernel's text may be longest; exported, hidden and folded cells, and a lesson's kernel, are next."
    text = len(cell.body) == 1 and holds_text(cell.body[0])
    whole = text or len(cell.body) == 1 and isinstance(cell.body[0], ast.ClassDef)
    folded = 'hide' in cell.directives or cell.directives.get('code-fold:') == 'true'
    if cell.exported and whole:
        return CLASS_LINES
    return EXPORT_LINES if cell.exported or folded or text else LESSON_LINES


def holds_text(statement):
    "Is it `NAME = ...` with a string of several lines, such as the source of a kernel?"
    value = getattr(statement, 'value', None)
    return any(isinstance(n, ast.Constant) and isinstance(n.value, str) and '\n' in n.value for n in ast.walk(value)) if value else False


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


def linked_names(cells):
    for i, c in enumerate(cells):
        if c.kind == 'markdown' and (found := re.search(r'\[[^\]\[]*`[^\]]*\]\([^)]*\.ipynb[^)]*\)', c.source)):
            yield i, f'{found[0]}: the site links `names` itself, and a link in a link breaks both'


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


EVERY = [sizes, directives, imports_alone, package_first, ends_with_export, outputs, executed, unfinished, linked_names]
COURSE = [has_title, has_sections, has_prose]  # of chapters and appendices
CHAPTER = [exercises, figures]


def check_notebook(path):
    "All faults of one notebook."
    path, cells = Path(path), read_cells(Path(path))
    if (size := path.stat().st_size) > KILOBYTES * 1024:
        yield 0, f'{size // 1024} KB: at most {KILOBYTES}'
    rules = [] if path.stem in PAGES else COURSE if is_appendix(cells) else COURSE + CHAPTER
    for rule in EVERY + rules:
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


def main(args):
    paths = [Path(a) for a in args] or sorted((ROOT / 'nbs').glob('*.ipynb'))
    faults = [(p, i, m) for p in paths for i, m in check_notebook(p)] + list(check_owners(paths))
    for path, i, message in faults:
        print(f'{path.relative_to(ROOT) if path.is_relative_to(ROOT) else path}:{i}: {message}')
    print(f'{len(paths)} notebooks, {len(faults)} faults')
    return 1 if faults else 0


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
