// Vectors of floats for C kernels: as many as a register holds (LANES = 4, 8 or 16), or as a launch fixes.
//
// `vec` and `ivec` are vectors of LANES floats and ints; `load` reads floats or halves, `store` writes floats, `total`
// adds the lanes of a vector, `totals` those of four. WIDTH is the length of a row that a kernel walks along.
#define JOIN_(A, B) A##B
#define JOIN(A, B) JOIN_(A, B)
#ifndef LANES              // floats in a vector: what a register holds, or what a launch has fixed
#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif
#endif
#if LANES == 16 && WIDTH % 32 != 0      // rows that sixteen lanes do not divide
#undef LANES
#define LANES 8
#endif
#if LANES == 16 && defined(__AVX512F__)
#define WIDE __attribute__((min_vector_width(512)))
#else
#define WIDE
#endif
#define LANED(T) JOIN(T, LANES)
#define MIX(A, B, ...) __builtin_shufflevector(A, B, __VA_ARGS__)
#define OVERLOADED inlined __attribute__((overloadable))
typedef LANED(float) vec;
typedef LANED(int) ivec;

OVERLOADED vec load(const float* p) { return *(const vec*)p; }
OVERLOADED vec load(const half* p) {
  return __builtin_convertvector(*(const LANED(half)*)p, vec);
}
inlined void store(float* p, vec v) { *(vec*)p = v; }
inlined float4 totals(const vec* v) {      // the sums of four vectors' lanes
#if LANES == 4
  float4 a = MIX(v[0], v[1], 0, 4, 2, 6) + MIX(v[0], v[1], 1, 5, 3, 7);
  float4 b = MIX(v[2], v[3], 0, 4, 2, 6) + MIX(v[2], v[3], 1, 5, 3, 7);
  return MIX(a, b, 0, 1, 4, 5) + MIX(a, b, 2, 3, 6, 7);
#else
#if LANES == 16
  float8 a = v[0].lo + v[0].hi, b = v[1].lo + v[1].hi;
  float8 c = v[2].lo + v[2].hi, d = v[3].lo + v[3].hi;
#else
  float8 a = v[0], b = v[1], c = v[2], d = v[3];
#endif
  a = MIX(a, b, 0, 1, 8, 9, 4, 5, 12, 13) + MIX(a, b, 2, 3, 10, 11, 6, 7, 14, 15);
  c = MIX(c, d, 0, 1, 8, 9, 4, 5, 12, 13) + MIX(c, d, 2, 3, 10, 11, 6, 7, 14, 15);
  a = MIX(a, c, 0, 2, 8, 10, 4, 6, 12, 14) + MIX(a, c, 1, 3, 9, 11, 5, 7, 13, 15);
  return a.lo + a.hi;
#endif
}
inlined float total(vec v) {               // the sum of one vector's lanes
#if LANES == 4
  float4 b = v;
#elif LANES == 8
  float4 b = v.lo + v.hi;
#else
  float8 a = v.lo + v.hi;
  float4 b = a.lo + a.hi;
#endif
  return (b.x + b.z) + (b.y + b.w);
}
