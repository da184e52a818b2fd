"""What Metal's own compiler would refuse, although C++ takes it.

clang reads the source as C++ for OpenCL (opencl.py). Its errors count, and rules about words (lint_words.py),
types (lint_types.py) and kernels (lint_kernels.py); each rule says where it is from.
"""
import json
import warnings
from functools import cache
from pathlib import Path

from tinyvllm.device import short_hash, stamp, writable_dir, write_atomically
from tinyvllm.metalsim import lint_kernels, lint_types, lint_words
from tinyvllm.metalsim.compiler import compiler
from tinyvllm.metalsim.lint_kernels import MAX_BUFFERS
from tinyvllm.metalsim.opencl import HEADER, LINE_DIRECTIVE, Complaints, OpenCLMissing, Unit, read
from tinyvllm.metalsim.source import strip_comments

__all__ = ['MAX_BUFFERS', 'RULES', 'complaints', 'lint']

RULES = (lint_words.forbidden, lint_words.included, lint_words.refused, lint_types.pointers, lint_types.unwritten,
         lint_types.deduced, lint_types.methods, lint_types.halves, lint_types.components, lint_types.derived,
         lint_kernels.names, lint_kernels.parameters, lint_kernels.positions, lint_kernels.buffers, lint_kernels.calls,
         lint_kernels.threadgroup_variables)


def lint(
    source: str, # Metal
    name: str = 'kernel.metal', # of the source, for messages
) -> list[str]: # complaints, each with its line; empty if there are none
    "List what Metal's compiler would refuse. The answer is kept in the cache folder."
    path = writable_dir() / 'metalsim' / f'lint-{short_hash(repr((source, version())))}.json'
    if path.exists():
        found = json.loads(path.read_text())
    else:
        found = list(complaints(source))
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(found))
    return [f'{place(source, line, name)}: {why}' for line, why in found]


def complaints(source: str) -> Complaints:
    "Look at a source with every rule: line and complaint, each once, in the order of lines."
    try:
        unit = read(source)
    except OpenCLMissing as error:
        warn_once(str(error))
        unit = Unit(strip_comments(source), [], [], [])
    yield from sorted({complaint for rule in RULES for complaint in rule(unit)})


def place(
    source: str, # Metal
    line: int, # of it; 0 if unknown
    name: str, # of the source
) -> str: # such as `kernel.metal:3`
    "Name a line as the last `#line` before it says."
    before = source.split('\n')[:max(line - 1, 0)]
    for i in reversed(range(len(before))):
        found = LINE_DIRECTIVE.match(before[i])
        if found:
            return f'{found.group(2) or name}:{line - 2 - i + int(found.group(1))}'
    return f'{name}:{line or "?"}'


@cache
def warn_once(what: str) -> None:
    "Say once in a process why the lint sees less."
    warnings.warn(f'the lint looks at words only: {what}', stacklevel=4)


@cache
def version() -> str:
    "Return what an answer depends on besides the source: the rules, the header and the compiler."
    here = Path(__file__).parent
    others = [here / f'{name}.py' for name in ('opencl', 'source', 'syntax_tree')]
    files = [*sorted(here.glob('lint*.py')), *others, HEADER]
    return short_hash(''.join(path.read_text() for path in files) + stamp(compiler().command))
