"From Metal to C++: the few things that clang would not understand, and the entry points of the kernels."
import re
from collections.abc import Mapping
from types import MappingProxyType

from tinyvllm.metalsim.source import FUNCTION_CONSTANT, closing, namespaces, rewritten, signatures, strip_comments

# Whatever makes the threads of a kernel meet, or share memory.
MEETING = re.compile(r'\b(simd_\w+|simdgroup_\w+|quad_\w+|threadgroup_barrier|make_filled_simdgroup_matrix)\s*[(<]'
                     r'|\bthreadgroup\b\s+[A-Za-z_]|simdgroup_\w+8x8|simdgroup_matrix')
HEADERS = {f'metal_{name}' for name in (
    'array assert atomic command_buffer common compute config cooperative_tensor extended_vector geometric graphics '
    'imageblocks integer limits logging math matrix mesh numeric pack packed_vector pull_model_interpolation quadgroup '
    'raytracing relational simdgroup simdgroup_matrix stdlib tensor tessellation texture type_traits types uniform '
    'visible_function_table').split()} | {'simd/simd.h'}
SCALAR = 'bool|bfloat|half|float|u?(?:char|short|int|long)'
VECTOR = rf'\b(?:packed_)?(?:{SCALAR})[234]\b|\bvec\s*<'
ALIAS = re.compile(r'\busing\s+(\w+)\s*=([^;{}]*);|\btypedef\s+([^;{}()]*?)\b(\w+)\s*;')
TYPE_PARAMETER = re.compile(r'[<,]\s*(?:typename|class)\s+(\w+)')
TOP_LEVEL = re.compile(r'\b(?:struct|class|enum|union)\b[^;{}()]*\{|\b(\w+)\s*\(')
SPACE = re.compile(r'\b(?:device|threadgroup|thread)\b')
NEXT_VARIABLE = re.compile(r'\s*,\s*(\w+)\s*\(')
BFLOAT_NUMBER = re.compile(r'(\b\d+\.\d*(?:[eE][+-]?\d+)?|(?<!\w)\.\d+(?:[eE][+-]?\d+)?|\b\d+[eE][+-]?\d+)bf\b')
COHERENT = re.compile(r'\bcoherent\s*(?:\(\s*\w+\s*\))?(?=\s+(?:device|const|volatile)\b)')
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


def to_cpp(
    source: str, # Metal
    constants: Mapping[str, object], # values of function constants, by name
) -> str:
    "The source as C++ understands it; every line keeps its number."
    text = re.sub(r'#\s*include\s*<([\w/.]+)>', lambda m: '' if m.group(1) in HEADERS else m.group(0),
                  strip_comments(source))
    text = BFLOAT_NUMBER.sub(r'bfloat(\1f)', text)
    text = FUNCTION_CONSTANT.sub(lambda m: constant_definition(*m.groups(), constants), text)
    text = re.sub(r'\bis_function_constant_defined\s*\(\s*(\w+)\s*\)', r'msl_is_defined_\1', text)
    text = re.sub(r'\bvec\s*<\s*(bool|bfloat)(?:16_t)?\s*,\s*([234])\s*>', r'\1\2', COHERENT.sub(' ', text))
    return rewritten(constructors(without_twins(text)))


def without_twins(text: str) -> str:
    """Blank out functions that differ from an earlier one by nothing but address spaces: here they are the same.

    Two that also do different things cannot be told apart; clang complains of them.
    """
    at, seen = 0, {}
    while m := TOP_LEVEL.search(text, at):
        at = closing(text, m.end() - 1) + 1
        body = re.match(r'\s*\{', text[at:]) if m.group(1) else None
        if not body:
            continue
        start = max(text.rfind(c, 0, m.start()) for c in ';{}') + 1
        middle, at = at, closing(text, at + body.end() - 1) + 1
        head, whole = (*namespaces(text, start), without_spaces(text[start:middle])), text[start:at]
        if seen.get(head, whole) != whole and without_spaces(seen[head]) == without_spaces(whole):
            text = text[:start] + re.sub(r'[^\n]', ' ', whole) + text[at:]
        seen.setdefault(head, whole)
    return text


def without_spaces(text: str) -> str:
    "The words of a text, one blank between them, as they are without address spaces."
    return ' '.join(re.findall(r'\w+|\S', SPACE.sub(' ', re.sub(r'\bconstant\b', 'const', text))))


def constant_definition(kind: str, name: str, index: str, constants: Mapping[str, object]) -> str:
    "A function constant with its value; zero, and not defined, where it has none."
    value = constants.get(name, 0)
    value = str(value).lower() if isinstance(value, bool) else value
    return f'constant {kind} {name} = ({kind})({value}); constant bool msl_is_defined_{name} = ' \
           f'{str(name in constants).lower()};'


def constructors(text: str) -> str:
    """Calls of `msl_mk` for the constructors of vectors that clang lacks.

    Macros of msl.h do that for `float4(x, y)`. Here it is done for `metal::float4(x, y)`, `vec<T, 4>(x, y)`, names
    that the text has given to vectors, parameters of templates, and `float4 v(x, y);`.
    """
    text = re.sub(rf'\b(?:metal|simd)::(?=(?:{SCALAR})[234]\b)', '', text)
    names = '|'.join(sorted(vector_names(text), key=len, reverse=True)) or '(?!)'
    kinds = rf'(?:metal::)?vec\s*<[^<>;(){{}}]*>|(?:{SCALAR})[234]|{names}'
    text = declarations(text, kinds)
    called = rf'(?:metal::)?vec\s*<[^<>;(){{}}]*>|packed_(?:{SCALAR})[24]|\b(?:{names})'
    return re.sub(rf'(?<![\w.>:~])({called})\s*\((?!\s*[*&])', r'msl_mk<\1>(', text)


def vector_names(text: str) -> set[str]:
    "Names that may stand for a vector: of types that are defined so, and of parameters of templates."
    names = {m.group(1) for m in TYPE_PARAMETER.finditer(text)}
    for m in ALIAS.finditer(text):
        name, meaning = m.group(1) or m.group(4), m.group(2) or m.group(3)
        if re.search(VECTOR, meaning) or names & set(re.findall(r'\w+', meaning)):
            names.add(name)
    return names


def declarations(text: str, kinds: str) -> str:
    "`float4 v(x, y);` as `float4 v = msl_mk<float4>(x, y);`, if the brackets do not hold parameters."
    out, done = [], 0
    a_parameter = re.compile(rf'\s*(?:(?:const|constant|device|thread|threadgroup|volatile|void)\b'
                             rf'|(?:{kinds}|{SCALAR}|size_t|u?int\d+_t)\s*(?:[&*,)]|\w))')
    for m in re.finditer(rf'(?<![\w.>:~])({kinds})\s+(\w+)\s*\(', text):
        end = closing(text, m.end() - 1)
        if m.start() < done or text[end + 1:].lstrip()[:1] not in (';', ',') or a_parameter.match(text, m.end()):
            continue
        if text[m.end():end].strip() and not re.search(r'\breturn\s*$|\bnew\s*$', text[:m.start()]):
            kind, name = m.groups()
            out.append(f'{text[done:m.start()]}{kind} {name} = msl_mk<{kind}>{text[m.end() - 1:end + 1]}')
            done = end + 1
            while more := NEXT_VARIABLE.match(text, done):
                end = closing(text, more.end() - 1)
                out.append(f'{text[done:more.end(1)]} = msl_mk<{kind}>{text[more.end() - 1:end + 1]}')
                done = end + 1
    return ''.join(out) + text[done:]


def needs_fibers(source: str) -> bool:
    "Do its threads meet or share memory? Else they may run one after the other, in plain loops."
    return MEETING.search(strip_comments(source)) is not None


def translation(
    source: str, # Metal
    name: str, # of the file, for the compiler's messages
    flat: bool = False, # with entry points that run all threads in plain loops too
    constants: Mapping[str, object] = MappingProxyType({}), # values of function constants, by name
) -> str: # C++
    "The whole translation unit: the kernels, and one or two entry points for each."
    kernels = signatures(source, constants)
    lines = ['#include <metal_stdlib>', f'#line 1 "{name}"', to_cpp(source, constants), '#line 1 "entry points"']
    lines += [f'extern "C" MSL_NOHOOK void msl_entry_{k.symbol}(void* const* b) {{ {k.call}; }}' for k in kernels]
    if flat:
        lines += [FLAT.format(name=k.symbol, call=k.call.replace('msl_cur->', 'c.')) for k in kernels]
    return '\n'.join(lines) + '\n'
