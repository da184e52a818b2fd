"The package's shape: imports go one way, the core needs no tensors, classes stand on few others, names are the field's."
import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from tools import architecture, chapters  # noqa: E402

TREES = architecture.sources()
MODULES = sorted(TREES)
CLASSES = {node.name: (name, node) for name, tree in TREES.items() for node in ast.walk(tree)
           if isinstance(node, ast.ClassDef)}


# --- imports -----------------------------------------------------------------------------------------------

def test_no_module_imports_in_a_circle():
    assert architecture.find_cycle(architecture.imports()) is None


def test_a_circle_is_found():
    assert architecture.find_cycle({'a': ['b'], 'b': ['c'], 'c': ['b']}) == ['b', 'c', 'b']


def test_imports_go_down():
    graph = architecture.imports()
    assert not [(name, other) for name, others in graph.items() for other in others
                if architecture.level(other) > architecture.level(name)]


def test_the_core_imports_no_tensor_library():
    names = [name for name in MODULES if name.startswith('core.')]
    assert {'core.blocks', 'core.sequence', 'core.scheduler'} <= set(names)
    code = ('import sys, importlib\n' + '\n'.join(f"importlib.import_module('tinyvllm.{name}')" for name in names)
            + "\nprint([m for m in ('tinygrad', 'torch', 'jax') if m in sys.modules])")
    done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == '[]', done.stderr


def test_chapters_import_what_earlier_ones_built():
    places = {c.module: i for i, c in enumerate(chapters.all_chapters()) if c.module}
    graph = architecture.imports()
    assert not [(name, other) for name, others in graph.items() for other in others
                if name in places and places.get(other, -1) > places[name]]


def test_each_module_has_one_chapter():
    modules = [c.module for c in chapters.all_chapters() if c.module]
    assert len(modules) == len(set(modules)) and set(modules) <= set(MODULES)


def test_what_is_generated_from_the_order_is_up_to_date(tmp_path):
    names = ['_quarto.yml', *(f'nbs/{path.name}' for path in sorted((ROOT / 'nbs').glob('*.ipynb')))]
    (tmp_path / 'nbs').mkdir()
    for name in names:
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    chapters.write_all(tmp_path)
    stale = [name for name in names if (tmp_path / name).read_bytes() != (ROOT / name).read_bytes()]
    assert not stale, 'run python tools/chapters.py'


# --- classes -----------------------------------------------------------------------------------------------

def bases(name):
    "The bases of a class that the package defines, and whether a library's class is among the others."
    module, node = CLASSES[name]
    foreign = {alias.asname or alias.name for i in ast.walk(TREES[module]) if isinstance(i, ast.ImportFrom)
               and not i.level and not i.module.startswith('tinyvllm') for alias in i.names}
    own = [base.id for base in node.bases if isinstance(base, ast.Name) and base.id in CLASSES and base.id not in foreign]
    return own, len(own) < len(node.bases)


def depth(name):
    "Classes of the package in the longest chain that ends here, a library's root counted."
    own, library = bases(name)
    return 1 + max([*map(depth, own), int(library)], default=0)


def root_is_library(name):
    own, library = bases(name)
    return library or any(map(root_is_library, own))


def test_classes_stand_on_few_others():
    deep = {name: depth(name) for name in CLASSES if depth(name) > (3 if root_is_library(name) else 2)}
    assert not deep


def test_a_base_has_more_than_one_child():
    children = {}
    for name in CLASSES:
        for base in bases(name)[0]:
            children.setdefault(base, []).append(name)
    assert not {base: names for base, names in children.items() if len(names) == 1}


# --- names and form ----------------------------------------------------------------------------------------

# Words of the first code base that the field does not use (whole identifiers, then parts of identifiers).
BANNED = set('''Roster Reception Admission Planner Ledger Progress Probe News Asked PostOffice Switchboard Mail Pending
    Page Steering Order Use NotYet Rule Control Foreign Watched Fences Desk Door Envelope Scale Ticket Gone Wire Chatting
    Completing Unread Cursor Calls Speech Launcher Graphs Answer letters bag hand_out announce places turned joined
    stacked care aside dress prove advance steer orders'''.split())
BANNED_PARTS = set('''roster mailbox switchboard desk desks ticket tickets wish wishes chances odds heard hear listens speak
    speaks spoken told crumbs steering settle somebody nobody'''.split())


def identifiers(tree):
    "All names that a module defines or uses: functions, classes, arguments, variables, attributes."
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield node.name, node.lineno
        elif isinstance(node, ast.arg):
            yield node.arg, node.lineno
        elif isinstance(node, ast.Name):
            yield node.id, node.lineno
        elif isinstance(node, ast.Attribute):
            yield node.attr, node.lineno


def words(identifier):
    "The words of snake_case and CamelCase."
    return {w.lower() for w in re.findall(r'[A-Z]+(?![a-z])|[A-Z]?[a-z]+', identifier)}


@pytest.mark.parametrize('name', MODULES)
def test_names_are_the_fields(name):
    found = {(i, line) for i, line in identifiers(TREES[name]) if i in BANNED or words(i) & BANNED_PARTS}
    assert not sorted(found)


def test_banned_words_are_found_in_any_spelling():
    for name in ('hand_out', 'MyMailbox', 'told', 'num_wishes', 'DESKS'):
        assert name in BANNED or words(name) & BANNED_PARTS, name
    assert not words('scheduled_tokens') & BANNED_PARTS


ONE_LINE = (ast.Return, ast.Raise, ast.Continue, ast.Break)


def crowded(text):
    "Lines with a `;`, with a body behind a colon (`if x: return y` is fine), or with a walrus inside an expression."
    tree = ast.parse(text)
    for node in ast.walk(tree):
        for part in ('body', 'orelse', 'finalbody'):
            body = getattr(node, part, None)
            if not isinstance(body, list) or not body:
                continue
            lines = [statement.lineno for statement in body]
            if len(lines) != len(set(lines)):
                yield lines[0], 'two statements on a line'
            fine = isinstance(node, ast.If) and len(body) == 1 and isinstance(body[0], ONE_LINE)
            head = None if isinstance(node, ast.Module) else header_end(node) if part == 'body' else None
            if (head == lines[0] or part != 'body' and same_line(text, part, lines[0])) and not fine:
                yield lines[0], 'a body on the line of its compound statement'
    whole = {id(node.test) for node in ast.walk(tree) if isinstance(node, (ast.If, ast.While, ast.IfExp))}
    whole |= {id(test) for node in ast.walk(tree) if isinstance(node, ast.comprehension) for test in node.ifs}
    for node in ast.walk(tree):
        if isinstance(node, ast.NamedExpr) and id(node) not in whole:
            yield node.lineno, 'a walrus that is not a whole condition'


def same_line(text, part, line):
    "Does a statement stand on the line of its `else` or `finally`?"
    word = 'else' if part == 'orelse' else 'finally'
    return bool(re.match(rf'\s*{word}\s*:\s*\S', text.splitlines()[line - 1]))


def header_end(node):
    "The line on which the header of a compound statement ends: that of its last part before the body."
    parts = [getattr(node, name, None) for name in ('test', 'iter', 'target', 'subject', 'returns', 'type')]
    parts += [item.context_expr for item in getattr(node, 'items', ())] + list(getattr(node, 'bases', ()))
    if isinstance(getattr(node, 'args', None), ast.arguments):
        args = node.args
        parts += [*args.args, *args.kwonlyargs, *args.defaults, *filter(None, [args.vararg, args.kwarg])]
    return max([node.lineno, *(part.end_lineno for part in parts if part is not None)])


@pytest.mark.parametrize('text, wrong', [
    ('if x: return y', 0), ('if x: raise y', 0), ('if x: y = 1', 1), ('for i in x: y()', 1), ('while x: y()', 1), ('a = 1; b = 2', 1),
    ('with x as y: z()', 1), ('def f(): return 1', 1), ('def f(): "Do."', 1), ('class A: pass', 1), ('def f(a,\n  b):\n    return 1', 0),
    ('try: x()\nexcept E:\n    y()', 1), ('if (n := f()) < 2:\n    g()', 1), ('if n := f():\n    g()', 0), ('x = [y for z in w if (y := f(z))]', 0),
    ('f(a := 2)', 1), ('if a:\n    b()\nelse: c()', 1), ('try:\n    x()\nexcept E: y()', 1)])
def test_crowded_lines_are_found(text, wrong):
    body = text if not text.startswith('if x: r') else f'def f():\n    {text}'
    assert bool(list(crowded(body))) == bool(wrong)


@pytest.mark.parametrize('name', MODULES)
def test_one_statement_a_line(name):
    path = ROOT / 'tinyvllm' / (name.replace('.', '/') + '.py')
    path = path if path.exists() else path.with_suffix('') / '__init__.py'
    assert not list(crowded(path.read_text(encoding='utf-8')))


MOST_LINES = 25


def long_functions(tree):
    "Functions whose statements, after the docstring, take more than `MOST_LINES` lines."
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            if body and (lines := body[-1].end_lineno - body[0].lineno + 1) > MOST_LINES:
                yield node.name, lines


@pytest.mark.parametrize('name', MODULES)
def test_functions_are_short(name):
    assert not list(long_functions(TREES[name]))


def undocumented(tree, prefix=''):
    "Public classes, functions and methods without a docstring; those inside functions aside."
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and not node.name.startswith('_'):
            if not ast.get_docstring(node):
                yield prefix + node.name
            if isinstance(node, ast.ClassDef):
                yield from undocumented(node, f'{prefix}{node.name}.')


@pytest.mark.parametrize('name', MODULES)
def test_what_is_public_has_a_docstring(name):
    assert not list(undocumented(TREES[name]))


def test_pages_of_the_site_have_names_of_their_own():
    pages = [path.stem.partition('_')[2] for path in (ROOT / 'nbs').glob('[0-9]*.ipynb')]
    assert len(pages) == len(set(pages))
