"From the text of Metal kernels to C++: their signatures, the few rewrites, the entry points."
import re
from dataclasses import dataclass, field

# Attributes of kernel parameters, and the fields of `msl_thread` (msl.h) they stand for.
POSITIONS = {'thread_position_in_grid': 'gid', 'threadgroup_position_in_grid': 'tg',
             'thread_position_in_threadgroup': 'lid', 'threads_per_threadgroup': 'tgsz',
             'dispatch_threads_per_threadgroup': 'tgsz', 'threadgroups_per_grid': 'ntg', 'threads_per_grid': 'gsz'}
INDICES = {'thread_index_in_simdgroup': 'lane', 'simdgroup_index_in_threadgroup': 'simd',
           'thread_index_in_threadgroup': 'index', 'simdgroups_per_threadgroup': 'nsimd',
           'dispatch_simdgroups_per_threadgroup': 'nsimd'}
SIMD_WIDTH = 'threads_per_simdgroup'
COMMENT_OR_STRING = re.compile(r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\])*"', re.DOTALL)
KERNEL = re.compile(r'(?:\bkernel\b(?:\s*\]\])?|\[\[\s*kernel[^\]]*\]\])\s+(?:\[\[.*?\]\]\s*)*void\s+(\w+)\s*\(')
MAX_THREADS = re.compile(r'max_total_threads_per_threadgroup\s*\(\s*(\d+)\s*\)')
# Whatever makes the threads of a kernel meet, or share memory.
MEETING = re.compile(r'\b(simd_\w+|simdgroup_\w+|quad_\w+|threadgroup_barrier|make_filled_simdgroup_matrix)\s*[(<]'
                     r'|\bthreadgroup\b\s+[A-Za-z_]|simdgroup_\w+8x8|simdgroup_matrix')
ATTRIBUTE = re.compile(r'\[\[\s*(?!unlikely|likely|fallthrough|maybe_unused)[a-z_]+\s*'
                       r'(?:\([^\]]*\))?\s*(?:,[^\]]*)?\]\]')
THREADGROUP = re.compile(r'(?:\balignas\s*\((?:[^()]|\([^()]*\))*\)\s*)*\bthreadgroup\b(?!_)')
ALIGNMENT = re.compile(r'__attribute__\s*\(\((?:[^()]|\([^()]*\))*\)\)|\balignas\s*\((?:[^()]|\([^()]*\))*\)')
VARIABLE = re.compile(r'\s*(?:const\s+)?(.*?)([A-Za-z_]\w*)\s*((?:\[[^\]]*\]\s*)*)\s*$', re.DOTALL)
FLAT = '''extern "C" void msl_flat_{name}(void* const* b, const uint* n, const uint* t, const uint* o) {{
  msl_thread c;
  c.nsimd = (t[0] * t[1] * t[2] + 31) / 32;
  c.active = ~0u;
  for (int k = 0; k < 3; k++) {{ c.tgsz[k] = t[k]; c.ntg[k] = n[k]; c.gsz[k] = n[k] * t[k]; }}
  for (uint z = o[2]; z < n[2]; z++) for (uint y = o[1]; y < n[1]; y++) for (uint x = o[0]; x < n[0]; x++) {{
    c.tg[0] = x; c.tg[1] = y; c.tg[2] = z; c.index = 0;
    for (uint lz = 0; lz < t[2]; lz++) for (uint ly = 0; ly < t[1]; ly++)
      for (uint lx = 0; lx < t[0]; lx++, c.index++) {{
        c.lid[0] = lx; c.lid[1] = ly; c.lid[2] = lz;
        c.lane = c.index % 32; c.simd = c.index / 32;
        c.gid[0] = x * t[0] + lx; c.gid[1] = y * t[1] + ly; c.gid[2] = z * t[2] + lz;
        {call};
      }}
  }}
}}'''


class Parameter:
    "One parameter of a kernel: its type, its name, what is bound to it."

    def __init__(self,
        text: str, # such as `device float* o [[buffer(0)]]`
    ):
        found = re.finditer(r'\[\[\s*(\w+)\s*(?:\(\s*(\w+)\s*\))?\s*\]\]', text)
        self.attributes = {m.group(1): m.group(2) for m in found}
        body = re.sub(r'\[\[.*?\]\]', ' ', text).strip()
        name = re.search(r'([A-Za-z_]\w*)\s*$', body)
        self.name, self.type = (name.group(1), body[:name.start()].strip()) if name else ('', body)
        self.builtin = next((a for a in self.attributes if a in POSITIONS or a in INDICES or a == SIMD_WIDTH), None)
        self.is_threadgroup = 'threadgroup' in self.attributes
        self.is_reference = self.type.endswith('&')
        self.index = int(self.attributes['buffer']) if 'buffer' in self.attributes else None
        self.writable = not re.search(r'\bconst(ant)?\b', self.type.rstrip('&* '))

    @property
    def scalar(self) -> str:
        "The type without its address space: `int` of `constant int&`."
        return re.sub(r'\b(constant|device|const|thread)\b|[&*]', '', self.type).strip()

    def thread_field(self) -> str:
        "The address of the current thread's numbers: three for a position, one for an index."
        if self.builtin in POSITIONS:
            return f'msl_cur->{POSITIONS[self.builtin]}'
        return f'&msl_cur->{INDICES[self.builtin]}'

    def argument(self) -> str:
        "The C++ expression that an entry point passes: a buffer, or a number of the current thread."
        if self.builtin == SIMD_WIDTH:
            return f'({self.type})32'
        if self.builtin:
            plain = self.type.replace('const', '').strip()
            return f'msl_arg<{plain}>({self.thread_field()})'
        if self.is_threadgroup:
            return f"({self.type})msl_tg_dynamic({self.attributes['threadgroup'] or 0})"
        if self.is_reference:
            return f'*({self.type[:-1]}*)b[{self.index}]'
        return f'({self.type})b[{self.index}]'


@dataclass
class Signature:
    "A kernel's name and parameters."
    name: str
    parameters: list[Parameter] = field(default_factory=list)
    max_threads: int = 1024  # in a threadgroup

    @property
    def slots(self) -> dict[int, Parameter]:
        "Buffer index -> parameter."
        return {p.index: p for p in self.parameters if p.index is not None}

    @property
    def call(self) -> str:
        "The call that runs the current thread."
        return f"{self.name}({', '.join(p.argument() for p in self.parameters)})"


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
    "The place of the parenthesis that closes the one at `start`."
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == '(') - (text[i] == ')')
        if depth == 0:
            return i
    return len(text)


def signatures(source: str) -> list[Signature]:
    "The kernels of a source, in order."
    text, out = strip_comments(source), []
    for m in KERNEL.finditer(text):
        inside = text[m.end():closing(text, m.end() - 1)]
        parameters = [Parameter(p) for p in split_commas(inside) if p.strip()]
        number(parameters)
        before = max(text.rfind('}', 0, m.start()), text.rfind(';', 0, m.start()), 0)
        limits = MAX_THREADS.findall(text[before:m.end()])
        out.append(Signature(m.group(1), parameters, int(limits[-1]) if limits else 1024))
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


def needs_fibers(source: str) -> bool:
    "Do its threads meet or share memory? Else they may run one after the other, in plain loops."
    return MEETING.search(strip_comments(source)) is not None


def translation(
    source: str, # Metal
    name: str, # of the file, for the compiler's messages
    flat: bool = False, # with entry points that run all threads in plain loops too
) -> str: # C++
    "The whole translation unit: the kernels, and one or two entry points for each."
    kernels = signatures(source)
    lines = ['#include <metal_stdlib>', f'#line 1 "{name}"', rewritten(source), '#line 1 "entry points"']
    lines += [f'extern "C" MSL_NOHOOK void msl_entry_{k.name}(void* const* b) {{ {k.call}; }}' for k in kernels]
    if flat:
        lines += [FLAT.format(name=k.name, call=k.call.replace('msl_cur->', 'c.')) for k in kernels]
    return '\n'.join(lines) + '\n'
