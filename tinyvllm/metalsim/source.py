"What the text of Metal kernels says: their signatures, function constants, threadgroup variables."
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

# Attributes of kernel parameters, and the fields of `msl_thread` (msl.h) they stand for.
POSITIONS = {'thread_position_in_grid': 'gid', 'threadgroup_position_in_grid': 'tg',
             'thread_position_in_threadgroup': 'lid', 'threads_per_threadgroup': 'tgsz',
             'dispatch_threads_per_threadgroup': 'tgsz', 'threadgroups_per_grid': 'ntg', 'threads_per_grid': 'gsz'}
INDICES = {'thread_index_in_simdgroup': 'lane', 'simdgroup_index_in_threadgroup': 'simd',
           'thread_index_in_threadgroup': 'index', 'simdgroups_per_threadgroup': 'nsimd',
           'dispatch_simdgroups_per_threadgroup': 'nsimd'}
SIMD_WIDTH = 'threads_per_simdgroup'
# Attributes that follow from these: what they are in C++.
DERIVED = {SIMD_WIDTH: '32', 'thread_execution_width': '32', 'thread_index_in_quadgroup': 'msl_cur->index % 4',
           'quadgroup_index_in_threadgroup': 'msl_cur->index / 4',
           'quadgroups_per_threadgroup':
               '(msl_cur->tgsz[0] * msl_cur->tgsz[1] * msl_cur->tgsz[2] + 3) / 4'}
DERIVED['dispatch_quadgroups_per_threadgroup'] = DERIVED['quadgroups_per_threadgroup']
COMMENT_OR_STRING = re.compile(r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\])*"', re.DOTALL)
KERNEL = re.compile(r'(?:\bkernel\b(?:\s*\]\])?|\[\[\s*kernel[^\]]*\]\])\s+(?:\[\[.*?\]\]\s*)*void\s+(\w+)\s*\(')
NAMESPACE = re.compile(r'\bnamespace\s+([\w:]+)\s*\{')
HOST_NAME = r'\bhost_name\s*\(\s*"([^"]*)"\s*\)'
INSTANCE = re.compile(rf'\btemplate\s*\[\[\s*{HOST_NAME}[^\]]*\]\]\s*(?:kernel\b|\[\[[^\]]*\]\])?\s*'
                      r'(?:void|decltype\s*\((?:[^()]|\([^()]*\))*\))\s*([\w:]+)\s*(?=<)')
FUNCTION_CONSTANT = re.compile(r'\bconstant\s+(?:const\s+)?([A-Za-z_][\w:]*)\s+(\w+)\s*'
                               r'\[\[\s*function_constant\s*\(\s*(\w+)\s*\)\s*\]\]\s*;')
MAX_THREADS = re.compile(r'max_total_threads_per_threadgroup\s*\(\s*(\d+)\s*\)')
ATTRIBUTE = re.compile(r'\[\[\s*(?!unlikely|likely|fallthrough|maybe_unused)[a-z_]+\s*'
                       r'(?:\([^\]]*\))?\s*(?:,[^\]]*)?\]\]')
THREADGROUP = re.compile(r'(?:\balignas\s*\((?:[^()]|\([^()]*\))*\)\s*)*\bthreadgroup\b(?!_)')
ALIGNMENT = re.compile(r'__attribute__\s*\(\((?:[^()]|\([^()]*\))*\)\)|\balignas\s*\((?:[^()]|\([^()]*\))*\)')
VARIABLE = re.compile(r'\s*(?:const\s+)?(.*?)([A-Za-z_]\w*)\s*((?:\[[^\]]*\]\s*)*)\s*$', re.DOTALL)
class Parameter:
    "One parameter of a kernel: its type, its name, what is bound to it."

    def __init__(self,
        text: str, # such as `device float* o [[buffer(0)]]`
    ):
        inside = [part for m in re.finditer(r'\[\[(.*?)\]\]', text, re.DOTALL) for part in split_commas(m.group(1))]
        found = (re.match(r'\s*(\w+)\s*(?:\(\s*(\w+)\s*\))?', part) for part in inside)
        self.attributes = {m.group(1): m.group(2) for m in found if m}
        body = re.sub(r'\[\[.*?\]\]', ' ', text).strip()
        name = re.search(r'([A-Za-z_]\w*)\s*$', body)
        self.name, self.type = (name.group(1), body[:name.start()].strip()) if name else ('', body)
        self.builtin = next((a for a in self.attributes if a in POSITIONS or a in INDICES or a in DERIVED), None)
        self.is_threadgroup = 'threadgroup' in self.attributes
        self.is_reference = self.type.endswith('&')
        self.index = int(self.attributes['buffer']) if 'buffer' in self.attributes else None
        self.writable = not re.search(r'\bconst(ant)?\b', self.type.rstrip('&* '))

    @property
    def scalar(self) -> str:
        "The type without its address space: `int` of `constant int&`."
        return re.sub(r'\b(constant|device|const|thread)\b|[&*]', '', self.type).strip()

    def argument(self) -> str:
        "The C++ expression that an entry point passes: a buffer, or a number of the current thread."
        if self.builtin in DERIVED:
            return DERIVED[self.builtin]
        if self.builtin in POSITIONS:
            return f'msl_position{{msl_cur->{POSITIONS[self.builtin]}}}'
        if self.builtin:
            return f'msl_position{{&msl_cur->{INDICES[self.builtin]}}}'
        if self.is_threadgroup:
            return f"msl_pointer{{msl_tg_dynamic({self.attributes['threadgroup'] or 0})}}"
        address = 'nullptr' if self.index is None else f'b[{self.index}]'
        return f"msl_{'reference' if self.is_reference else 'pointer'}{{{address}}}"


@dataclass
class Signature:
    "A kernel's name and parameters."
    name: str
    parameters: list[Parameter] = field(default_factory=list)
    max_threads: int = 1024  # in a threadgroup
    function: str = ''  # what C++ calls it, where that is not its name: `ns::k`, or `k<float>`

    @property
    def slots(self) -> dict[int, Parameter]:
        "Buffer index -> parameter."
        return {p.index: p for p in self.parameters if p.index is not None}

    @property
    def call(self) -> str:
        "Statements that run the current thread; a template is chosen before its arguments are seen."
        arguments = ', '.join(p.argument() for p in self.parameters)
        return f'auto kernel_function = &::{self.function or self.name}; kernel_function({arguments})'

    @property
    def symbol(self) -> str:
        "The name as a part of a C function's."
        return re.sub(r'\W', '_', self.name)


def strip_comments(source: str) -> str:
    "The text with its comments blanked out; lines and columns stay where they are."
    def blank(match: re.Match) -> str:
        text = match.group(0)
        return re.sub(r'[^\n]', ' ', text) if text.startswith('/') else text
    return COMMENT_OR_STRING.sub(blank, source)


def split_commas(text: str) -> list[str]:
    "Parts between the commas that are not inside brackets."
    parts, depth = [''], 0
    for c in text:
        depth += (c in '([{<') - (c in ')]}>')
        if c == ',' and depth == 0:
            parts.append('')
        else:
            parts[-1] += c
    return parts


def closing(
    text: str, # any
    start: int, # where the bracket opens
) -> int: # where it closes; the end of the text if it does not
    "The place of the bracket that closes the one at `start`."
    opens, depth = text[start], 0
    closes = {'(': ')', '{': '}', '<': '>'}[opens]
    for i in range(start, len(text)):
        depth += (text[i] == opens) - (text[i] == closes)
        if depth == 0:
            return i
    return len(text)


def signatures(
    source: str, # Metal
    constants: Mapping[str, object] = MappingProxyType({}), # values of function constants, by name
) -> list[Signature]:
    "The kernels of a source, in order; of a template those that are instantiated under a name."
    text, out, templates = strip_comments(source), [], {}
    absent = {name for name in function_constants(text) if not constants.get(name)}
    for m in KERNEL.finditer(text):
        inside = text[m.end():closing(text, m.end() - 1)]
        before = max(text.rfind('}', 0, m.start()), text.rfind(';', 0, m.start()), 0)
        head, function = text[before:m.end()], '::'.join([*namespaces(text, m.start()), m.group(1)])
        limits, names = MAX_THREADS.findall(head), re.findall(HOST_NAME, head)
        limit = int(limits[-1]) if limits else 1024
        if template := re.search(r'\btemplate\s*(?=<)', head):
            templates[m.group(1)] = head[template.end():closing(head, template.end())][1:], inside, limit, function
        else:
            out.append(Signature(names[-1] if names else function, parameters_of(inside, absent), limit, function))
    return out + [instance(m, text, templates, absent) for m in INSTANCE.finditer(text)
                  if m.group(2).split('::')[-1] in templates]


def instance(
    match: re.Match, # of `INSTANCE`
    text: str, # all of it
    templates: dict[str, tuple], # name -> parameters of the template, of the kernel, limit, qualified name
    absent: set[str], # function constants that are false or have no value
) -> Signature:
    "The signature of a template with its arguments put in."
    wanted, inside, limit, function = templates[match.group(2).split('::')[-1]]
    given = text[match.end() + 1:closing(text, match.end())]
    values = [value.strip() for value in split_commas(given)]
    for i, parameter in enumerate(split_commas(wanted)):
        name, _, default = parameter.partition('=')
        value = values[i] if i < len(values) else default.strip()
        inside = re.sub(rf'\b{name.split()[-1]}\b', value, inside)
    return Signature(match.group(1), parameters_of(inside, absent), limit, f'{function}<{given}>')


def namespaces(text: str, at: int) -> list[str]:
    "The namespaces that a place lies in, from outside."
    return [m.group(1) for m in NAMESPACE.finditer(text, 0, at) if closing(text, m.end() - 1) > at]


def function_constants(text: str) -> dict[str, str]:
    "The function constants of a text without comments: name -> index."
    return {m.group(2): m.group(3) for m in FUNCTION_CONSTANT.finditer(text)}


def parameters_of(
    inside: str, # what stands between the brackets of a kernel
    absent: set[str], # function constants that are false or have no value
) -> list[Parameter]:
    "Parameters, with the index of each buffer that there is."
    out = [Parameter(p) for p in split_commas(inside) if p.strip()]
    number([p for p in out if p.attributes.get('function_constant') not in absent])
    for p in out:
        if p.attributes.get('function_constant') in absent:
            p.index = None
    return out


def number(parameters: list[Parameter]) -> None:
    "Give each buffer without an index the next free one, as Metal does."
    used, free = {p.index for p in parameters if p.index is not None}, 0
    for p in parameters:
        if p.builtin or p.is_threadgroup or p.index is not None:
            continue
        while free in used:
            free += 1
        p.index = free
        used.add(free)


def rewritten(source: str) -> str:
    """The source as C++ understands it; every line keeps its number.

    `threadgroup T x[4];` becomes `MSL_TG(x, [4], T);`, storage that the fibers share, with
    `alignas(n)` in front `MSL_TG_ALIGNED(alignas(n), ...);`. The attributes that clang does not know go.
    """
    text = strip_comments(source)
    out, done = [], 0
    for m in THREADGROUP.finditer(text):
        if m.start() < done:
            continue
        end = declaration_end(text, m.end())
        declaration = m.group(0).replace('threadgroup', '') + text[m.end():end]
        storage = threadgroup_storage(declaration) if text[end:end + 1] == ';' else None
        if storage:
            out.append(text[done:m.start()] + storage + '\n' * text.count('\n', m.start(), end + 1))
            done = end + 1
    return ATTRIBUTE.sub(' ', ''.join(out) + text[done:])


def declaration_end(text: str, start: int) -> int:
    "Where the declaration that begins at `start` ends, or turns out to be something else."
    end = start
    while end < len(text) and text[end] not in ';(){=':
        if text.startswith('__attribute__', end):
            end = closing(text, text.index('(', end))
        end += 1
    return end


def threadgroup_storage(declaration: str) -> str | None:
    "The macros for `alignas(16) float x[4], y`; None if it declares a pointer, a reference or a parameter."
    alignment = ' '.join(m.group(0) for m in ALIGNMENT.finditer(declaration))
    plain = ALIGNMENT.sub(' ', declaration)
    bare = re.sub(r'\[[^\]]*\]|<[^<>]*>', '', plain)
    if '*' in bare or '&' in bare or '[[' in plain:
        return None
    first, *others = split_commas(plain)
    found = VARIABLE.match(first)
    if not found or not found.group(1).strip():
        return None
    kind = ' '.join(found.group(1).split())
    macro = f'MSL_TG_ALIGNED({alignment}, ' if alignment else 'MSL_TG('
    variables = [found, *map(VARIABLE.match, others)]
    return ' '.join(f"{macro}{v.group(2)}, {' '.join(v.group(3).split())}, {kind});" for v in variables if v)
