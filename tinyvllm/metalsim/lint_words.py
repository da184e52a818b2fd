"""Two kinds of rules: words that Metal lacks, and errors of clang, in Metal's words.

MSL n is a section of Apple's Metal Shading Language Specification, "Apple" a message of Apple's compiler that
others have reported.
"""
import re

from tinyvllm.metalsim.opencl import Complaints, Unit
from tinyvllm.metalsim.syntax_tree import Message

LIBM = ('acosh?|asinh?|atanh?|atan2|cbrt|ceil|copysign|cosh?|erfc?|exp|exp2|exp10|expm1|fabs|fdim|floor|fma|fmax|fmin'
        '|fmod|frexp|hypot|ldexp|lgamma|log|log10|log1p|log2|logb|modf|pow|remainder|rint|round|sinh?|sqrt|tanh?'
        '|tgamma|trunc')
FORBIDDEN = [  # words, what is wrong, where it is from
    (r'\bdouble\b', 'double is not in MSL', 'MSL 2.1'),
    (r'(?<![\w.])(?:\d+\.\d*|\.\d+)[lL]\b', 'long double is not in MSL', 'MSL 2.1'),
    (r'\bsigned_char\d', 'no such vector type (tinygrad int8 vectors)', 'MSL 2.2'),
    (r'\bgoto\b', 'goto is not in MSL', 'MSL 1.4.4'),
    (r'\bnew\b|\bdelete\b(?!\s*;)', 'new/delete are not in MSL', 'MSL 1.4.4'),
    (r'\bthrow\b|\btry\b|\bcatch\b', 'exceptions are not in MSL', 'MSL 1.4.4'),
    (r'\bnoexcept\s*\(', 'noexcept(...) is not in MSL', 'MSL 1.4.4'),
    (r'\bvirtual\b|\bdynamic_cast\b|\btypeid\b', 'virtual/RTTI are not in MSL', 'MSL 1.4.4'),
    (r'\bstd::', 'std:: is not in MSL', 'MSL 1.4.4'),
    (r'\b(?:thread_local|register)\b', 'thread_local and register are not in MSL', 'MSL 1.4.4'),
    (r'\b__(?:global|local|private|constant|generic|kernel)\b', 'a word of OpenCL', 'MSL 4'),
    (r'\b(?:asm|__asm__|__asm)\b', 'assembly is not in MSL', 'Apple'),
    (r'\bprintf\b', 'printf is not in MSL', 'MSL 6'),
    (rf'\b__builtin_(?:{LIBM})[fl]?\b', 'no function of the C library is a builtin', 'Apple: air64 has none')]
TAKEN = [  # errors of clang about what Metal takes: pattern of the message and its notes, where it is from
    (r'scalar operand type has greater rank than the type of the vector element', 'MSL 3.1: it is converted'),
    (r'excess elements in (?:scalar|vector) initializer', 'MSL 2.2.1: vec<T, N>(a, b, c, d)'),
    (r'too few elements in vector initialization', 'MSL 2.2.1: the rest is 0'),
    (r'C-style cast from vector|static_cast from .*vector of', 'MSL 2.2.1: vectors are converted'),
    (r'bit-fields are not supported', 'C++'),
    (r"use of overloaded operator '\[\]' is ambiguous", 'MSL 2.3: a column of a matrix that is in no memory'),
    (r"invalid vector element type 'bool'", 'MSL 2.2: bool2'),
    (r"'[^']*\bbool[234]\b|bool[234]'", 'MSL 2.2: comparisons make vectors of bool, in OpenCL of int'),
    (r"from 'const __constant (\w+)\b[^']*' to '__constant \1 \*", 'MSL 4.3: what is constant is const anyway'),
    (r'(?s)no (?:matching constructor|viable).*__constant', 'MSL 4.3: what is constant may be copied'),
    (r'cannot be used to construct an object in address space', 'MSL 4.7: a constructor for one address space'),
    (r'reference to overloaded function could not be resolved', 'MSL 1.4: a template as the argument of a template'),
    (r'(?s)does not refer to a function template.*explicit instantiation refers here', 'what follows from it'),
    (r'static assertion expression is not an integral constant expression', 'our header computes nothing'),
    (r"undeclared identifier '__(?:metal|METAL)_", "MLX: functions inside of Apple's headers")]
TEXTS = {
    'non-kernel function variable cannot be declared in local address space':
        'a threadgroup variable is declared in a kernel, without an initial value',
    'program scope variable must reside in constant address space': 'program-scope variable must be `constant`',
    'static local variable must reside in constant address space': 'static variable must be `constant`'}
SPACES = {'__global': 'device', '__local': 'threadgroup', '__private': 'thread', '__constant': 'constant',
          'global': 'device', 'local': 'threadgroup', 'private': 'thread', 'generic': 'no'}


def forbidden(unit: Unit) -> Complaints:
    "Find words that the language lacks: see `FORBIDDEN`."
    for pattern, why, _ in FORBIDDEN:
        for m in re.finditer(pattern, unit.source):
            yield line_at(unit.source, m.start()), why


def included(unit: Unit) -> Complaints:
    "Metal's library is there when its header is. MSL 6."
    used = re.search(r'\bmetal\s*(?:::|;)', unit.source)
    if used and not re.search(r'#\s*include\b', unit.source):
        yield line_at(unit.source, used.start()), 'metal is used without #include <metal_stdlib>'


def line_at(text: str, at: int) -> int:
    "Return the line of a place in a text, from 1."
    return text.count('\n', 0, at) + 1


def refused(unit: Unit) -> Complaints:
    "Pass on clang's errors: address spaces, narrowing, arrays of unknown size, names and overloads that are not there."
    for message in unit.messages:
        whole = '\n'.join([message.text, *message.notes])
        if not any(re.search(pattern, whole) for pattern, _ in TAKEN) and not is_taken_here(unit, message):
            yield message.line, in_words_of_metal(message.text)


def is_taken_here(unit: Unit, message: Message) -> bool:
    "Is it about `float4 x(y)`, which converts y (MSL 2.2.1), or about a sampler outside of functions (MSL 2.10)?"
    here = unit.lines[message.line - 1] if message.line else ''
    if message.text.startswith('cannot initialize a variable'):
        return re.search(r'\b[a-z]+[234]\s+\w+\s*\(', here) is not None
    return message.text.startswith('program scope variable') and re.search(r'\bsampler\b', here) is not None


def in_words_of_metal(text: str) -> str:
    "Name address spaces and vectors as Metal does."
    text = re.sub(r"static assertion failed due to requirement '.*': ", '', TEXTS.get(text, text))
    text = re.sub(r'__generic\s*| ?\(vector of \d[^)]*\)', '', text)
    text = re.sub(r' __attribute__\(\(ext_vector_type\((\d)\)\)\)', r'\1', text)
    return re.sub(r'__(?:global|local|private|constant)\b|\b(?:local|private|global|generic)(?= address space)',
                  lambda m: SPACES[m.group()], text)
