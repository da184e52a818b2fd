"Metal's library and its forms of kernels: each gives the values that numpy, or the specification's words, say."
import json
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from support.metal_cases import TOP

from tinyvllm.metalsim import Library, MetalCompileError, MetalError

pytestmark = pytest.mark.skipif(sys.platform != 'linux', reason='a Mac has the real one')
NUMPY = {'float': np.float32, 'half': np.float16, 'int': np.int32, 'uint': np.uint32, 'short': np.int16,
         'ushort': np.uint16, 'char': np.int8, 'uchar': np.uint8, 'long': np.int64, 'ulong': np.uint64}
VALID = Path(__file__).parent / 'metal' / 'cases' / 'valid.json'


def evaluate(expressions, inputs, out=np.float32, kind='float', threads=None, before='', head='', check=True):
    """Values of expressions for each thread, one row each.

    `inputs`: name -> array; an expression finds the thread's element under that name, and `i`, `lane` too.
    """
    n = threads or len(next(iter(inputs.values())))
    types = {name: next(k for k, t in NUMPY.items() if t == a.dtype) for name, a in inputs.items()}
    parameters = ''.join(f', device const {types[name]}* {name}_in' for name in inputs)
    values = ''.join(f'  {types[name]} {name} = {name}_in[i];\n' for name in inputs)
    rows = ''.join(f'  out[{k} * {n} + i] = {kind}({e});\n' for k, e in enumerate(expressions))
    text = (f'{TOP}{head}kernel void k(device {kind}* out{parameters}, uint i [[thread_position_in_grid]],\n'
            f'              uint lane [[thread_index_in_simdgroup]]) {{\n{values}{before}\n{rows}}}\n')
    found = np.zeros((len(expressions), n), out)
    Library(text, check)['k']([found, *inputs.values()], (1,), (n,))
    return found


def test_every_valid_text_of_the_cases_compiles():
    "Textures are not simulated: tinygrad has no way to bind one."
    def error(case):
        try:
            assert Library(case['source']).signatures
        except MetalCompileError as problem:
            return case['name'], str(problem)
    with ThreadPoolExecutor(2) as pool:
        errors = dict(filter(None, pool.map(error, json.loads(VALID.read_text()))))
    assert list(errors) == ['texture2d arg'], errors


# ---------------------------------------------------------------- math and common
def second(function, index):
    return lambda x, y, z: function(x)[index]


def smoothstep(x, y, z):
    t = np.clip((y - 0.25) / 0.5, 0, 1)
    return t * t * (3 - 2 * t)


# of x in -2..2, y in 0.1..0.9 and z in 1.1..3
MATH = {
    'exp(x)': lambda x, y, z: np.exp(x), 'exp2(x)': lambda x, y, z: np.exp2(x), 'exp10(x)': lambda x, y, z: 10.0 ** x,
    'log(y)': lambda x, y, z: np.log(y), 'log2(y)': lambda x, y, z: np.log2(y),
    'log10(y)': lambda x, y, z: np.log10(y), 'sin(x)': lambda x, y, z: np.sin(x), 'cos(x)': lambda x, y, z: np.cos(x),
    'tan(y)': lambda x, y, z: np.tan(y), 'sinpi(x)': lambda x, y, z: np.sin(np.pi * x),
    'cospi(x)': lambda x, y, z: np.cos(np.pi * x), 'tanpi(y * 0.5)': lambda x, y, z: np.tan(np.pi * y / 2),
    'asin(y)': lambda x, y, z: np.arcsin(y), 'acos(y)': lambda x, y, z: np.arccos(y),
    'atan(x)': lambda x, y, z: np.arctan(x), 'atan2(x, y)': lambda x, y, z: np.arctan2(x, y),
    'sinh(x)': lambda x, y, z: np.sinh(x), 'cosh(x)': lambda x, y, z: np.cosh(x), 'tanh(x)': lambda x, y, z: np.tanh(x),
    'asinh(x)': lambda x, y, z: np.arcsinh(x), 'acosh(z)': lambda x, y, z: np.arccosh(z),
    'atanh(y)': lambda x, y, z: np.arctanh(y), 'sqrt(z)': lambda x, y, z: np.sqrt(z),
    'rsqrt(z)': lambda x, y, z: z ** -.5, 'pow(y, x)': lambda x, y, z: y ** x, 'powr(z, x)': lambda x, y, z: z ** x,
    'floor(x)': lambda x, y, z: np.floor(x), 'ceil(x)': lambda x, y, z: np.ceil(x),
    'round(x * 4)': lambda x, y, z: np.trunc(x * 4 + np.copysign(0.5, x)), 'rint(x * 4)': lambda x, y,
    z: np.rint(x * 4),
    'trunc(x)': lambda x, y, z: np.trunc(x), 'fract(x)': lambda x, y, z: x - np.floor(x),
    'fabs(x)': lambda x, y, z: np.abs(x), 'abs(x)': lambda x, y, z: np.abs(x),
    'fmin(x, y)': lambda x, y, z: np.minimum(x, y), 'fmax(x, y)': lambda x, y, z: np.maximum(x, y),
    'min3(x, y, z)': lambda x, y, z: np.minimum(np.minimum(x, y), z),
    'max3(x, y, z)': lambda x, y, z: np.maximum(np.maximum(x, y), z),
    'fmin3(z, x, y)': lambda x, y, z: np.minimum(np.minimum(x, y), z),
    'fmax3(z, x, y)': lambda x, y, z: np.maximum(np.maximum(x, y), z),
    'median3(z, x, y)': lambda x, y, z: np.median([x, y, z], 0), 'fmedian3(x, z, y)': lambda x, y,
    z: np.median([x, y, z], 0),
    'fmod(z, y)': lambda x, y, z: np.fmod(z, y), 'fdim(x, y)': lambda x, y, z: np.maximum(x - y, 0),
    'copysign(z, x)': lambda x, y, z: np.copysign(z, x), 'divide(x, z)': lambda x, y, z: x / z,
    'fma(x, y, z)': lambda x, y, z: x * y + z, 'ldexp(x, 3)': lambda x, y, z: x * 8,
    'ilogb(z * 8)': lambda x, y, z: np.floor(np.log2(z * 8)),
    'clamp(x, y, z)': lambda x, y, z: np.minimum(np.maximum(x, y), z), 'saturate(x)': lambda x, y, z: np.clip(x, 0, 1),
    'sign(x)': lambda x, y, z: np.sign(x), 'mix(x, z, y)': lambda x, y, z: x + (z - x) * y,
    'step(y, x)': lambda x, y, z: (x >= y) * 1.0, 'smoothstep(T(0.25), T(0.75), y)': smoothstep,
    'modf(x, part)': second(np.modf, 0), '(modf(x, part), part)': second(np.modf, 1),
    'frexp(x, power)': second(np.frexp, 0), '(frexp(x, power), power)': second(np.frexp, 1),
    'sincos(x, part)': lambda x, y, z: np.sin(x), '(sincos(x, part), part)': lambda x, y, z: np.cos(x),
    'precise::exp(x)': lambda x, y, z: np.exp(x), 'fast::exp2(x)': lambda x, y, z: np.exp2(x),
    'metal::precise::sqrt(z)': lambda x, y, z: np.sqrt(z), 'fast::max(x, y)': lambda x, y, z: np.maximum(x, y),
    'select(x, y, x < 0)': lambda x, y, z: np.where(x < 0, y, x), 'any(x < y)': lambda x, y, z: x < y,
}


TOLERANCE = {'float': (3e-6, 4e-6), 'half': (4e-3, 4e-3)}  # relative, absolute


def floats(kind, n=64):
    rng = np.random.default_rng(0)
    return {name: rng.uniform(*span, n).astype(NUMPY[kind]) for name, span in
            dict(x=(-2, 2), y=(.1, .9), z=(1.1, 3)).items()}


@pytest.mark.parametrize('kind', ['float', 'half'])
def test_math_agrees_with_numpy(kind):
    inputs, head = floats(kind), f'typedef {kind} T;\n'
    wide = {name: a.astype(np.float64) for name, a in inputs.items()}
    found = evaluate(MATH, inputs, before='  T part; int power;', head=head)
    for (expression, answer), row in zip(MATH.items(), found):
        np.testing.assert_allclose(row, answer(**wide), *TOLERANCE[kind], err_msg=expression)


def test_math_of_vectors_is_that_of_their_elements():
    inputs, n = floats('float'), 63
    names = [e for e in MATH if not any(word in e for word in ('part', 'power', 'ilogb', 'ldexp', 'any', 'metal'))]
    before = ''.join(f'  const float3 {v}{v} = float3({v}_in[i / 3 * 3], {v}_in[i / 3 * 3 + 1], '
                     f'{v}_in[i / 3 * 3 + 2]);\n' for v in 'xyz')
    doubled = ['({})[i % 3]'.format(re.sub(r'\b([xyz])\b', r'\1\1', e)) for e in names]
    inputs = {name: a[:n] for name, a in inputs.items()}
    vectors = evaluate(doubled, inputs, before=before, head='typedef float3 T;\n')
    for expression, one, three in zip(names, evaluate(names, inputs, head='typedef float T;\n'), vectors):
        np.testing.assert_array_equal(one, three, expression)


# ---------------------------------------------------------------- integers
def bits(x, kind):
    return x & ((1 << 8 * NUMPY[kind]().itemsize) - 1)


def wrap(x, kind):
    "As a number of the type holds it."
    size = 8 * NUMPY[kind]().itemsize
    x = bits(x, kind)
    return x - (1 << size) if kind[0] != 'u' and x >> (size - 1) else x


def saturate(x, kind):
    limits = np.iinfo(NUMPY[kind])
    return max(int(limits.min), min(int(limits.max), x))


def size(kind):
    return 8 * NUMPY[kind]().itemsize


def low24(x, kind):
    return (x & 0xffffff) - (1 << 24 if kind == 'int' and x & 0x800000 else 0)


# of x, y and z; the type; Python's integers
INTEGERS = {
    'popcount(x)': lambda x, y, z, t: bin(bits(x, t)).count('1'),
    'clz(x)': lambda x, y, z, t: size(t) - bits(x, t).bit_length(),
    'ctz(x)': lambda x, y, z, t: (bits(x, t) & -bits(x, t)).bit_length() - 1 if x else size(t),
    'reverse_bits(x)': lambda x, y, z, t: int(f'{bits(x, t):0{size(t)}b}'[::-1], 2),
    'rotate(x, T(3))': lambda x, y, z, t: bits(x, t) << 3 | bits(x, t) >> (size(t) - 3),
    'rotate(x, T(0))': lambda x, y, z, t: x,
    'mulhi(x, y)': lambda x, y, z, t: x * y >> size(t), 'madhi(x, y, z)': lambda x, y, z, t: (x * y >> size(t)) + z,
    'addsat(x, y)': lambda x, y, z, t: saturate(x + y, t), 'subsat(x, y)': lambda x, y, z, t: saturate(x - y, t),
    'madsat(x, y, z)': lambda x, y, z, t: saturate(x * y + z, t), 'hadd(x, y)': lambda x, y, z, t: x + y >> 1,
    'rhadd(x, y)': lambda x, y, z, t: x + y + 1 >> 1, 'T(absdiff(x, y))': lambda x, y, z, t: abs(x - y),
    'extract_bits(x, 2, 5)':
        lambda x, y, z, t: (bits(x, t) >> 2 & 31) - (32 if t[0] != 'u' and bits(x, t) >> 6 & 1 else 0),
    'extract_bits(x, 0, 0)': lambda x, y, z, t: 0,
    'insert_bits(x, y, 2, 5)': lambda x, y, z, t: bits(x, t) & ~124 | (y & 31) << 2,
    'min(x, y)': lambda x, y, z, t: min(x, y), 'max(x, y)': lambda x, y, z, t: max(x, y),
    'min3(x, y, z)': lambda x, y, z, t: min(x, y, z), 'max3(x, y, z)': lambda x, y, z, t: max(x, y, z),
    'median3(x, y, z)': lambda x, y, z, t: sorted([x, y, z])[1],
    'clamp(x, T(3), T(90))': lambda x, y, z, t: max(3, min(90, x)),
    'numeric_limits<T>::max()': lambda x, y, z, t: int(np.iinfo(NUMPY[t]).max),
    'numeric_limits<T>::min()': lambda x, y, z, t: int(np.iinfo(NUMPY[t]).min),
    'numeric_limits<T>::digits': lambda x, y, z, t: size(t) - (t[0] != 'u'),
    'select(x, y, x > y)': lambda x, y, z, t: y if x > y else x,
    'as_type<T>(as_type<make_unsigned_t<T>>(x))': lambda x, y, z, t: x,
}
OF_32 = {'mul24(x, y)': lambda x, y, z, t: low24(x, t) * low24(y, t),
         'mad24(x, y, z)': lambda x, y, z, t: low24(x, t) * low24(y, t) + z}


@pytest.mark.parametrize('kind', ['char', 'ushort', 'int', 'uint', 'long', 'ulong'])
def test_functions_of_integers_agree_with_python(kind):
    limits, rng = np.iinfo(NUMPY[kind]), np.random.default_rng(1)
    inputs = {name: rng.integers(limits.min, limits.max, 64, NUMPY[kind], endpoint=True) for name in 'xyz'}
    inputs['x'][:4], inputs['y'][:4] = [0, limits.max, limits.min, 5], [1, limits.max, limits.min, limits.min]
    table = INTEGERS | (OF_32 if kind in ('int', 'uint') else {})
    plain = [e for e in table if 'numeric' not in e and 'as_type' not in e and kind in ('int', 'ushort')]
    doubled = ['({})[i & 1]'.format(re.sub(r'\b([xyz])\b', r'\1\1', e).replace('T', 'T2')) for e in plain]
    before = ''.join(f'  const {kind}2 {v}{v} = {kind}2({v}_in[i & ~1u], {v}_in[i | 1]);\n' for v in 'xyz')
    found = evaluate([*table, *doubled], inputs, NUMPY[kind], kind, before=before,
                     head=f'typedef {kind} T;\ntypedef {kind}2 T2;\n')
    for expression, row in zip([*table, *plain], found):
        answer = [wrap(table[expression](*map(int, v), kind), kind) for v in zip(*inputs.values())]
        assert row.tolist() == answer, expression


# ---------------------------------------------------------------- vectors and what is asked of them
VECTORS = {
    'float4(1, float2(2, 3), 4).z': 3, 'float4(7).w': 7, 'metal::float4(1, 2, 3, 4).y': 2,
    'vec<float, 4>(1, 2, 3, 4).w': 4,
    'metal::vec<int, 3>(1, 2, 3).z': 3, 'H4(1, 2, 3, 4).x': 1, 'U2(float2(3.7f, 1)).x': 3, 'made<float4>(5).w': 5,
    'float4{1, 2, 3, 4}.zw.y': 4, 'direct(2)': 11, 'int4(char4(-3)).y': -3, 'any(float2(1, 2) > float2(3, 1))': 1,
    'all(float2(1, 2) > float2(3, 1))': 0, 'any(b)': 1, 'all(b)': 0, 'all(!b || b)': 1, 'any(b && !b)': 0, 'b.z': 1,
    'b[1]': 0, 'float4(b).x': 1, 'sizeof(bool4)': 4, 'sizeof(bool3)': 4, 'select(float4(1), float4(2), b).x': 2,
    'select(float4(1), float4(2), b).y': 1, 'select(int2(1), int2(2), int2(0, 5) < int2(1, 2)).x': 2,
    'vec<bool, 2>(true, false).y': 0, 'isnan(float2(NAN, 1)).x': 1, 'any(isinf(half2(1, INFINITY)))': 1,
    'isfinite(INFINITY)': 0, 'isnormal(1.0f)': 1, 'isnormal(6e-8h)': 0, 'isordered(1.0f, NAN)': 0,
    'isunordered(float2(1, NAN), float2(1)).y': 1, 'signbit(-0.0f)': 1, 'signbit(half3(1, -1, 1)).y': 1,
    'dot(float3(1, 2, 3), float3(4, 5, 6))': 32, 'cross(float3(1, 0, 0), float3(0, 1, 0)).z': 1,
    'length(float2(3, 4))': 5, 'length_squared(float2(3, 4))': 25, 'distance(float2(1, 1), float2(4, 5))': 5,
    'distance_squared(float2(1, 1), float2(4, 5))': 25, 'normalize(float2(0, 5)).y': 1,
    'reflect(float2(1, -1), float2(0, 1)).y': 1, 'refract(float2(0, -1), float2(0, 1), 0.5f).y': -1,
    'faceforward(float2(1, 2), float2(0, 1), float2(0, 1)).y': -2,
    'packed_float3(1, 2, 3).z': 3, 'float3(p3).y': 6, '(p3 * 2.0f).x': 10, 'sizeof(packed_float3)': 12,
    'sizeof(packed_half4)': 8, 'alignof(packed_half4)': 2, 'float4(packed_uchar4(1, 2, 3, 4)).w': 4,
    'sizeof(packed_short3)': 6, 'sizeof(float3)': 16, 'bfloat4(1, 2, 3, 4).y': 2, '(bfloat4(2) * bfloat4(3)).w': 6,
    'bfloat(1.00390625f)': 1, '1.00390625bf + 2.5e-1bf': 1.25,
    '0x1bf': 447, 'bfloat(257.0f) + bfloat(1)': 256, 'is_same_v<decltype(bfloat(1) * 2.0f), float>': 1,
    'unpack_unorm4x8_to_float(0xff000000u).w': 1, 'unpack_snorm2x16_to_float(0x8001u).x': -1,
    'pack_float_to_unorm4x8(float4(1, 0, 0, 0.5f)) == 0x800000ffu': 1,
    'pack_half_to_snorm2x16(half2(-1, 1)) == 0x7fff8001u': 1,
    'as_type<uint>(half2(1, 2)) == 0x40003c00u': 1, 'numbers.size() + numbers[1]': 4, 'total(numbers)': 3,
    'enumerated': 7,
    'is_same_v<conditional_t<true, int, float>, int>': 1, 'is_floating_point_v<half>': 1,
    'is_integral<uchar>::value': 1,
    'is_signed_v<uint>': 0, 'is_unsigned<ushort>::value': 1, 'is_vector_v<half4>': 1, 'is_pointer_v<thread int*>': 1,
    'is_same<remove_cv_t<const int>, int>()': 1, 'is_same_v<decay_t<const int&>, int>': 1, 'true_type::value': 1,
    'numeric_limits<half>::max()': 65504, 'numeric_limits<float>::lowest() == -FLT_MAX': 1,
    'HALF_EPSILON == 0.0009765625h': 1,
    'numeric_limits<float>::infinity() == INFINITY': 1, 'numeric_limits<half>::epsilon() == HALF_EPSILON': 1,
    'numeric_limits<bfloat>::epsilon()': 2.0 ** -7, 'MAXHALF == HALF_MAX': 1, 'SHRT_MIN': -32768, 'UCHAR_MAX': 255,
    'CHAR_BIT * (LONG_MAX > UINT_MAX)': 8, 'M_SQRT2_F': np.float32(2 ** .5), 'M_1_PI_H': np.float16(1 / np.pi),
    'twice(4)': 8, 'Counter{3}.next()': 4, '__METAL_VERSION__ >= 300': 1, 'sum4(2)': 8, 'f(1.0f)': 2,
    '[](float x) { return x + 1; }(2)': 3,
    'simd::float4(1).x': 1,
}
HEAD = """using H4 = vec<half, 4>; typedef metal::uint2 U2; enum Kind : uint { A = 7 };
template <typename V> V made(int n) { return V(n, n, n, n); }
float direct(float n) { float4 v(n, 1.0f, 3, 4), w(0), u(v.xy, 1, 1); return v.x + v.y + v.z + v.w + w.x + u.w; }
METAL_FUNC float twice(float x) { return x * 2; }
struct Counter { int n; int next() thread { return ++n; } };
template <typename T, enable_if_t<is_floating_point_v<T>, bool> = true> T f(T x) { return x + 1; }
template <typename T, enable_if_t<is_integral_v<T>, bool> = true> T f(T x) { return x - 1; }
template <int N> float sum4(float x) { float s = 0; for (int i = 0; i < N; i++) s += x; return s; }
float sum4(float x) { return sum4<4>(x); }
template <typename A> float total(thread const A& a) { float s = 0; for (auto x : a) s += x; return s; }
"""


def test_vectors_types_and_constants():
    before = """  bool4 b = float4(1, 2, 3, 4) != float4(2, 2, 2, 4); packed_float3 p3 = float3(5, 6, 7);
  array<float, 2> numbers = {1, 2}; const Kind enumerated = A; (void)x;"""
    found = evaluate(VECTORS, {'x': np.zeros(1, np.float32)}, before=before, head=HEAD)
    assert {e: float(v) for e, v in zip(VECTORS, found[:, 0])} == {e: float(v) for e, v in VECTORS.items()}


MATRIX = """
  const float2x3 a = float2x3(float3(1, 2, 3), float3(4, 5, 6)); const float3x2 c = float3x2(1, 0, 2, 1, 0, 3);
  const float2x2 m = a_times(c, a); float3x3 d(2.0f); d[1][2] = 5; float4x4 e = float4x4(1); e[3][0] = 7; e[1].y = 3;
"""
MATRICES = {
    'a[1][2]': 6, '(a * float2(1, 2)).y': 12, '(float3(1, 0, 1) * a).x': 4, '(c * a)[0].x': 5, 'm[1].y': 23,
    'transpose(a)[2][1]': 6, '(a + a)[0].z': 6, '(a - a * 2.0f)[1].x': -4, '(3.0f * a)[0].y': 6, '(-a)[0][0]': -1,
    'determinant(d)': 8, 'determinant(e)': 3, 'determinant(m)': 5 * 23 - 11 * 14, 'float(a == a)': 1,
    'float(a != a)': 0,
    'float(half2x3(a)[1].y)': 5, '(e * float4(1, 2, 3, 4)).x': 29, '(float4x4(2) * e)[3].x': 14,
}


def test_matrices_of_a_thread():
    a, c = np.array([[1, 4], [2, 5], [3, 6]]), np.array([[1, 2, 0], [0, 1, 3]])
    product = c @ a
    wanted = MATRICES | {'(c * a)[0].x': product[0, 0], 'm[1].y': product[1, 1],
                         'determinant(m)': np.linalg.det(product)}
    found = evaluate(MATRICES, {'x': np.zeros(1, np.float32)}, before=MATRIX + '  (void)x;',
                     head='float2x2 a_times(float3x2 c, float2x3 a) { return c * a; }\n')
    np.testing.assert_allclose(found[:, 0], list(wanted.values()), 1e-5)


# ---------------------------------------------------------------- lanes
def scan(x, start, step):
    out, total = [], start
    for v in x:
        out.append(total)
        total = step(total, v)
    return np.array(out)


def by_quad(f):
    return lambda x: np.concatenate([np.broadcast_to(f(q), 4) for q in x.reshape(-1, 4)])


def fill(shift, modulo):
    "What the lanes of x and of -x, behind it or before it, give."
    def answer(x):
        at = np.arange(32) % modulo + shift
        first = np.arange(32) // modulo * modulo
        inside = (at >= 0) & (at < modulo)
        return np.where(inside, x[first + at % modulo], -x[first + at % modulo])
    return answer


LANE = np.arange(32)
LANES = {
    'simd_sum(x)': lambda x: x.sum(), 'simd_product(x % 3 + 1)': lambda x: (x % 3 + 1).prod(), 'simd_max(x)': np.max,
    'simd_min(x)': np.min, 'simd_and(x)': np.bitwise_and.reduce, 'simd_or(x)': np.bitwise_or.reduce,
    'simd_xor(x)': np.bitwise_xor.reduce, 'simd_prefix_inclusive_sum(x)': np.cumsum,
    'simd_prefix_exclusive_sum(x)': lambda x: np.cumsum(x) - x,
    'simd_prefix_exclusive_product(x % 2 + 1)': lambda x: scan(x % 2 + 1, 1, lambda a, b: a * b),
    'simd_prefix_inclusive_product(x % 2 + 1)': lambda x: np.cumprod(x % 2 + 1),
    'simd_shuffle(x, 31 - lane)': lambda x: x[::-1], 'simd_shuffle_xor(x, 5)': lambda x: x[LANE ^ 5],
    'simd_shuffle_down(x, 3) * (lane < 29)': lambda x: np.append(x[3:], [0] * 3),
    'simd_shuffle_up(x, 3) * (lane > 2)': lambda x: np.append([0] * 3, x[:-3]),
    'simd_shuffle_rotate_down(x, 3)': lambda x: np.roll(x, -3), 'simd_shuffle_rotate_up(x, 3)': lambda x: np.roll(x, 3),
    'simd_shuffle_and_fill_down(x, -x, 3)': fill(3, 32), 'simd_shuffle_and_fill_up(x, -x, 3)': fill(-3, 32),
    'simd_shuffle_and_fill_down(x, -x, 1, 8)': fill(1, 8), 'simd_shuffle_and_fill_up(x, -x, 2, 16)': fill(-2, 16),
    'simd_broadcast(x, 7)': lambda x: x[7], 'simd_broadcast_first(x)': lambda x: x[0],
    'simd_is_first()': lambda x: LANE == 0, 'simd_all(x >= 0)': lambda x: (x >= 0).all(),
    'simd_any(x > 90)': lambda x: (x > 90).any(), 'int((ulong)simd_ballot(x > 50))':
        lambda x: int(sum(1 << int(i) for i in np.flatnonzero(x > 50))) - (1 << 32 if x[31] > 50 else 0),
    'simd_ballot(x > 50).any()': lambda x: True, 'simd_ballot(x > 50).all()': lambda x: False,
    'int((simd_vote::vote_t)simd_active_threads_mask() >> 16)': lambda x: 0xffff,
    'simd_sum(int4(x, 1, 2, 3)).z': lambda x: 64, 'simd_max(half2(x, 1)).x': np.max,
    'simd_sum(float3(1, 2, 3)).y': lambda x: 64,
    'quad_sum(x)': by_quad(np.sum), 'quad_product(x % 5)': by_quad(lambda q: (q % 5).prod()),
    'quad_max(x)': by_quad(np.max),
    'quad_min(x)': by_quad(np.min), 'quad_and(x)': by_quad(np.bitwise_and.reduce),
    'quad_or(x)': by_quad(np.bitwise_or.reduce), 'quad_xor(x)': by_quad(np.bitwise_xor.reduce),
    'quad_prefix_inclusive_sum(x)': by_quad(np.cumsum),
    'quad_prefix_exclusive_sum(x)': by_quad(lambda q: np.cumsum(q) - q),
    'quad_prefix_inclusive_product(x % 5)': by_quad(lambda q: np.cumprod(q % 5)),
    'quad_broadcast(x, 2)': by_quad(lambda q: q[2]), 'quad_broadcast_first(x)': by_quad(lambda q: q[0]),
    'quad_shuffle(x, 3 - lane % 4)': by_quad(lambda q: q[::-1]), 'quad_shuffle_xor(x, 1)': lambda x: x[LANE ^ 1],
    'quad_shuffle_rotate_down(x, 1)': by_quad(lambda q: np.roll(q, -1)),
    'quad_shuffle_rotate_up(x, 1)': by_quad(lambda q: np.roll(q, 1)),
    'quad_shuffle_down(x, 1) * (lane % 4 < 3)': by_quad(lambda q: np.append(q[1:], 0)),
    'quad_shuffle_up(x, 1) * (lane % 4 > 0)': by_quad(lambda q: np.append(0, q[:-1])),
    'quad_shuffle_and_fill_down(x, -x, 1)': fill(1, 4), 'quad_shuffle_and_fill_up(x, -x, 3)': fill(-3, 4),
    'quad_any(x > 60)': by_quad(lambda q: (q > 60).any()), 'quad_all(x > 20)': by_quad(lambda q: (q > 20).all()),
    'int((uint)quad_ballot(x > 50))': by_quad(lambda q: ((q > 50) << np.arange(4)).sum()),
    'quad_is_first()': lambda x: LANE % 4 == 0,
}


@pytest.mark.parametrize('check', [True, False], ids=['checked', 'plain'])
def test_lanes_exchange_what_the_specification_says(check):
    x = np.random.default_rng(2).integers(0, 100, 32, np.int32)
    for (expression, answer), row in zip(LANES.items(), evaluate(LANES, {'x': x}, np.int32, 'int', check=check)):
        assert row.tolist() == np.broadcast_to(answer(x), 32).astype(np.int32).tolist(), expression


def test_votes_of_a_simdgroup_that_is_not_full():
    found = evaluate(['simd_all(true)', 'simd_ballot(true).all()', 'int((ulong)simd_active_threads_mask())',
                      'simd_sum(x)'], {'x': np.arange(20, dtype=np.int32)}, np.int32, 'int')
    assert found[:, 0].tolist() == [1, 1, (1 << 20) - 1, 190]


def test_a_product_of_simdgroup_matrices_is_told_by_its_line():
    text = TOP + """kernel void k(device float* o, device const half* a, uint lane [[thread_index_in_simdgroup]]) {
  simdgroup_half8x8 x; simdgroup_load(x, a);
  simdgroup_float8x8 y = make_filled_simdgroup_matrix<float, 8>(0.5f), z(2.0f);
  z = z * y;
  simdgroup_multiply_accumulate(y, x, x, z);
  simdgroup_store(y, o, 8, ulong2(0, 0), true);
}
"""
    a, out = np.random.default_rng(0).integers(-4, 5, (8, 8)).astype(np.float16), np.zeros((8, 8), np.float32)
    Library(text)['k']([out, a], (1,), (32,))
    np.testing.assert_array_equal(out.T, a.astype(np.float32) @ a + 1)
    with pytest.raises(MetalError, match='simdgroup mma at line 6'):
        Library(text.replace('  z = z', '  if (lane < 31) z = z'))['k']([out, a], (1,), (32,))


# ---------------------------------------------------------------- atomics
# operation: type, start, what 64 threads with the values 1..64 leave
ATOMICS = {
    'atomic_fetch_add_explicit(&a[0], v, memory_order_relaxed)': ('int', 5, 2085),
    'atomic_fetch_sub_explicit(&a[0], v, memory_order_relaxed)': ('uint', 5000, 2920),
    'atomic_fetch_max_explicit(&a[0], v, memory_order_relaxed)': ('int', 5, 64),
    'atomic_fetch_min_explicit(&a[0], v, memory_order_relaxed)': ('int', 5, 1),
    'atomic_fetch_and_explicit(&a[0], ~v, memory_order_relaxed)': ('uint', 255, 128),
    'atomic_fetch_or_explicit(&a[0], v, memory_order_relaxed)': ('uint', 256, 383),
    'atomic_fetch_xor_explicit(&a[0], v, memory_order_relaxed)': ('int', 0, 64),
    'atomic_fetch_add_explicit(a, 0.5f, memory_order_relaxed)': ('float', 1, 33),
    'atomic_max_explicit(a, ulong(v) << 40, memory_order_relaxed)': ('ulong', 5, 64 << 40),
    'atomic_min_explicit(a, v, memory_order_relaxed)': ('ulong', 5, 1),
    'atomic_store_explicit(a, 9, memory_order_relaxed)': ('int', 5, 9),
    'if (v == 3) atomic_exchange_explicit(a, 7, memory_order_relaxed)': ('int', 5, 7),
    'T e = atomic_load_explicit(a, memory_order_relaxed);\n'
    '  while (!atomic_compare_exchange_weak_explicit(a, &e, e + v, memory_order_relaxed, memory_order_relaxed)) {}':
        ('int', 5, 2085),
    'atomic_thread_fence(mem_flags::mem_device, memory_order_seq_cst, thread_scope_device);\n'
    '  atomic_fetch_add_explicit(a, 1, memory_order_relaxed)': ('int', 5, 69),
}


@pytest.mark.parametrize('space', ['device', 'threadgroup'])
def test_atomic_operations(space):
    for operation, (kind, start, answer) in ATOMICS.items():
        text = f'{TOP}typedef {kind} T;\nkernel void k(device atomic<T>* o, uint i [[thread_position_in_grid]]) {{\n'
        if space == 'threadgroup':
            text += ('  threadgroup atomic<T> a[1];\n'
                     f'  if (i == 0) atomic_store_explicit(a, {start}, memory_order_relaxed);\n'
                     '  threadgroup_barrier(mem_flags::mem_threadgroup);\n')
        else:
            text += '  device atomic<T>* a = o;\n'
        text += f'  const uint v = i + 1;\n  {operation};\n'
        if space == 'threadgroup':
            text += ('  threadgroup_barrier(mem_flags::mem_threadgroup);\n  if (i == 0) atomic_store_explicit(o, '
                     'atomic_load_explicit(a, memory_order_relaxed), memory_order_relaxed);\n')
        out = np.full(1, start, NUMPY[kind])
        Library(text + '}\n')['k']([out], (1,), (64,))
        assert out[0] == answer, operation


# ---------------------------------------------------------------- forms of kernels
FORMS = TOP + """
#include <metal_math>
#include <metal_simdgroup>
#include <simd/simd.h>
constant int scale [[function_constant(0)]];
constant bool has_more [[function_constant(1)]];
constant float plus [[function_constant(2)]];
constant float offset = is_function_constant_defined(plus) ? plus : 0.5f;
template <typename T, int N = 3, typename U = int>
[[kernel]] void fill(device T* o [[buffer(1)]], constant U& by [[buffer(0)]], uint i [[thread_position_in_grid]]) {
  o[i] = T(by) * N;
}
template [[host_name("fill_f32")]] [[kernel]] decltype(fill<float>) fill<float>;
template [[host_name("fill_i16_5")]] kernel void fill<short, 5, uint>(device short*, constant uint&, uint);
namespace inner { struct Pair { float a, b; };
  kernel void first(device float* o, constant Pair& p, ushort q [[thread_index_in_quadgroup]],
                    uint g [[quadgroup_index_in_threadgroup]], uint w [[thread_execution_width]],
                    uint i [[thread_position_in_grid]]) { o[i] = p.b + q + 10 * g + 1000 * w; } }
[[host_name("renamed"), max_total_threads_per_threadgroup(32)]] kernel void step(
    volatile coherent(system) device float* o, uint i [[thread_position_in_grid]],
    device const float* more [[buffer(1), function_constant(has_more)]]) {
  o[i] = scale + offset; if (has_more) o[i] += more[i];
}
"""


@pytest.mark.parametrize('check', [True, False], ids=['checked', 'plain'])
def test_forms_of_kernels(check):
    library = Library(FORMS, check, constants={0: 4, 'has_more': True})
    assert set(library.signatures) == {'fill_f32', 'fill_i16_5', 'inner::first', 'renamed'}
    floats, shorts = np.zeros(8, np.float32), np.zeros(8, np.int16)
    library['fill_f32']([2, floats], (1,), (8,))
    library['fill_i16_5']([2, shorts], (1,), (8,))
    assert floats.tolist() == [6] * 8 and shorts.tolist() == [10] * 8
    library['inner::first']([floats, np.array([1, 2], np.float32)], (1,), (8,))
    assert floats.tolist() == [32002 + i % 4 + 10 * (i // 4) for i in range(8)]
    library['renamed']([floats, np.arange(8, dtype=np.float32)], (1,), (8,))
    assert floats.tolist() == [4.5 + i for i in range(8)]
    without = Library(FORMS, check, constants={'scale': 4, 1: False, 2: 2.5})['renamed']
    without([floats], (1,), (8,))
    assert floats.tolist() == [6.5] * 8 and without.signature.max_threads == 32


def test_functions_that_differ_by_an_address_space_alone():
    text = TOP + """namespace a { inline float first(const device float* p) { return p[0]; }
inline float first(threadgroup const float* p) { return p[0]; } }
namespace b { inline float first(constant float* p) { return p[0]; } }
template <typename T> void swap(device T* p, uint i) {
  T x = p[i]; p[i] = p[i + 1]; p[i + 1] = x;
}
template <typename T> void swap(threadgroup T* p, uint i) {
  T x = p[i]; p[i] = p[i + 1]; p[i + 1] = x;
}
kernel void k(device float* o, constant float* x) {
  threadgroup float t[2]; t[0] = 1; t[1] = b::first(x); swap(t, 0u); o[0] = a::first(t); o[1] = 5; swap(o, 0u);
  o[2] = a::first(o);
}
"""
    out = np.zeros(3, np.float32)
    Library(text)['k']([out, np.full(1, 7, np.float32)], (1,), (1,))
    assert out.tolist() == [5, 7, 5]
    with pytest.raises(MetalError, match=r'at kernel\.metal:14'):
        Library(text)['k']([out[:2], np.full(1, 7, np.float32)], (1,), (1,))


def test_function_constants_without_a_value():
    with pytest.raises(MetalError, match='function constants without a value: scale, has_more; tinygrad has no way'):
        Library(FORMS)['fill_f32']


def test_lines_stay_where_they_are():
    with pytest.raises(MetalCompileError, match=r'^kernel\.metal:24:\d+: error: .*undeclared identifier .nothing.'):
        Library(FORMS.replace('o[i] = scale +', 'o[i] = nothing +'))
    text = FORMS.replace('o[i] = T(by)', 'o[i + 9] = T(by)')
    with pytest.raises(MetalError, match=r"fill_f32: out-of-bounds write: .* of buffer 'o' .* at kernel\.metal:13"):
        Library(text, constants={0: 1, 1: False})['fill_f32']([2, np.zeros(8, np.float32)], (1,), (8,))
