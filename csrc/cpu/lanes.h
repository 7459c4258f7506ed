// 32 lanes of float or double, and sums over them that are the same to the last bit on every instruction set.
//
// Element i of a row belongs to lane i % 32. A sum runs over the lanes' accumulators in source order, then halves them:
// lane l += lane l + 16, + 8, ... Registers are PYDEQ_VECTOR_BYTES wide, so 32 lanes are 2 to 16 registers; their width
// does not change the result. Half types are read and written by integer arithmetic, which rounds to nearest even in
// the same way on every CPU.
//
// Included once per instruction set: everything is local to the translation unit, since the linker would otherwise keep
// one copy, of any instruction set, of each function.
#pragma once

#include <cstdint>
#include <cstring>

#include "shared/dispatch.h"

namespace pydeq {
namespace PYDEQ_ISA {
namespace {

constexpr int kLanes = 32;
// Each chunk is summed in the compute type. The sums of chunks are added in double, in order, on any number of threads.
constexpr int64_t kChunk = 4096;
// The fewest elements for which a second thread is faster.
constexpr int64_t kSerialWork = 1 << 16;

template <class A>
struct Lanes {
  static constexpr int kWidth = PYDEQ_VECTOR_BYTES / sizeof(A);  // lanes per register
  static constexpr int kCount = kLanes / kWidth;                 // registers
  typedef A Vector __attribute__((vector_size(PYDEQ_VECTOR_BYTES)));
  Vector v[kCount];
};

#define PYDEQ_UNROLL _Pragma("GCC unroll 16")
// For a function with many loops: otherwise the compiler keeps some bodies as calls, with their registers in memory.
#define PYDEQ_FLATTEN __attribute__((flatten))

template <class A>
inline Lanes<A> splat(A value) {
  Lanes<A> out;
  PYDEQ_UNROLL for (int i = 0; i < out.kCount; ++i) out.v[i] = value - typename Lanes<A>::Vector{};
  return out;
}

template <class A>
inline Lanes<A> operator+(Lanes<A> a, const Lanes<A>& b) {
  PYDEQ_UNROLL for (int i = 0; i < a.kCount; ++i) a.v[i] += b.v[i];
  return a;
}

template <class A>
inline Lanes<A> operator-(Lanes<A> a, const Lanes<A>& b) {
  PYDEQ_UNROLL for (int i = 0; i < a.kCount; ++i) a.v[i] -= b.v[i];
  return a;
}

template <class A>
inline Lanes<A> operator*(Lanes<A> a, const Lanes<A>& b) {
  PYDEQ_UNROLL for (int i = 0; i < a.kCount; ++i) a.v[i] *= b.v[i];
  return a;
}

template <class A>
inline Lanes<A> operator*(A s, Lanes<A> a) {
  PYDEQ_UNROLL for (int i = 0; i < a.kCount; ++i) a.v[i] = s * a.v[i];
  return a;
}

// One register of T as one register of A, and back.
template <class T, class A>
struct Register;

template <class A>
struct Register<A, A> {
  using Vector = typename Lanes<A>::Vector;
  static Vector load(const A* p) {
    Vector v;
    std::memcpy(&v, p, sizeof v);
    return v;
  }
  static void store(A* p, Vector v) { std::memcpy(p, &v, sizeof v); }
};

// Narrow rows that are summed in double.
template <>
struct Register<float, double> {
  using Vector = typename Lanes<double>::Vector;
  typedef float Narrow __attribute__((vector_size(PYDEQ_VECTOR_BYTES / 2)));
  static Vector load(const float* p) {
    Narrow v;
    std::memcpy(&v, p, sizeof v);
    return __builtin_convertvector(v, Vector);
  }
};

typedef uint16_t Bits16 __attribute__((vector_size(PYDEQ_VECTOR_BYTES / 2)));
typedef uint32_t Bits32 __attribute__((vector_size(PYDEQ_VECTOR_BYTES)));

inline Bits32 select(Bits32 mask, Bits32 yes, Bits32 no) { return (yes & mask) | (no & ~mask); }

template <>
struct Register<BFloat16, float> {
  using Vector = typename Lanes<float>::Vector;
  static Vector load(const BFloat16* p) {
    Bits16 h;
    std::memcpy(&h, p, sizeof h);
    return (Vector)(__builtin_convertvector(h, Bits32) << 16);
  }
  static void store(BFloat16* p, Vector v) {
    const Bits32 bits = (Bits32)v;
    const Bits32 rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const Bits32 nan = (Bits32)((bits & 0x7fffffff) > 0x7f800000);
    const Bits16 h = __builtin_convertvector(select(nan, Bits32{} + 0x7fc0, rounded), Bits16);
    std::memcpy(p, &h, sizeof h);
  }
};

template <>
struct Register<Float16, float> {
  using Vector = typename Lanes<float>::Vector;
  static Vector load(const Float16* p) {
    Bits16 h;
    std::memcpy(&h, p, sizeof h);
    const Bits32 wide = __builtin_convertvector(h, Bits32);
    const Bits32 magnitude = wide & 0x7fff, sign = (wide & 0x8000) << 16;
    const Bits32 shifted = magnitude << 13;
    const Bits32 normal = shifted + (112u << 23);  // the exponents' biases are 127 and 15
    const Bits32 special = shifted + (224u << 23);
    // 2^-14 (1 + m) - 2^-14: no operand is subnormal, so flushing them to zero changes nothing.
    const Bits32 subnormal = (Bits32)((Vector)(shifted + (113u << 23)) - (Vector)(Bits32{} + (113u << 23)));
    const Bits32 is_special = (Bits32)(magnitude >= 0x7c00), is_subnormal = (Bits32)(magnitude < 0x400);
    return (Vector)(select(is_subnormal, subnormal, select(is_special, special, normal)) | sign);
  }
  static void store(Float16* p, Vector v) {
    const Bits32 bits = (Bits32)v;
    const Bits32 magnitude = bits & 0x7fffffff, sign = (bits >> 16) & 0x8000;
    const Bits32 normal = ((magnitude + 0xfff + ((magnitude >> 13) & 1)) >> 13) - (112u << 10);
    // The ulp of 0.5 is 2^-24, the unit of subnormal halves: the addition rounds to it.
    const Vector half = (Vector)(Bits32{} + 0x3f000000);
    const Bits32 subnormal = (Bits32)((Vector)magnitude + half) - 0x3f000000;
    Bits32 out = select((Bits32)(magnitude < 0x38800000), subnormal, normal);
    out = select((Bits32)(magnitude >= 0x477ff000), Bits32{} + 0x7c00, out);
    out = select((Bits32)(magnitude > 0x7f800000), Bits32{} + 0x7e00, out);
    const Bits16 h = __builtin_convertvector(out | sign, Bits16);
    std::memcpy(p, &h, sizeof h);
  }
};

template <class A, class T>
inline Lanes<A> load(const T* p) {
  Lanes<A> out;
  if constexpr (is_half<T> && sizeof(A) == 8) {  // through float, a register of halves at a time
    const Lanes<float> narrow = load<float>(p);
    float values[kLanes];
    std::memcpy(values, &narrow, sizeof values);
    return load<double>(values);
  } else {
    PYDEQ_UNROLL for (int i = 0; i < out.kCount; ++i) out.v[i] = Register<T, A>::load(p + i * out.kWidth);
    return out;
  }
}

template <class A, class T>
inline void store(T* p, const Lanes<A>& x) {
  PYDEQ_UNROLL for (int i = 0; i < x.kCount; ++i) Register<T, A>::store(p + i * x.kWidth, x.v[i]);
}

// The last, incomplete 32 elements of a row; lanes beyond them are zero and are not written.
template <class A, class T>
inline Lanes<A> load(const T* p, int64_t count) {
  T padded[kLanes] = {};
  std::memcpy(padded, p, count * sizeof(T));
  return load<A>(padded);
}

template <class A, class T>
inline void store(T* p, const Lanes<A>& x, int64_t count) {
  T padded[kLanes];
  store(padded, x);
  std::memcpy(p, padded, count * sizeof(T));
}

// Calls body(i, whole) for every 32 elements of n; `whole` knows how to load and store them.
struct Whole {
  template <class A, class T>
  Lanes<A> load(const T* p) const {
    return PYDEQ_ISA::load<A>(p);
  }
  template <class T, class A>
  void store(T* p, const Lanes<A>& x) const {
    PYDEQ_ISA::store(p, x);
  }
};
struct Tail {
  int64_t count;
  template <class A, class T>
  Lanes<A> load(const T* p) const {
    return PYDEQ_ISA::load<A>(p, count);
  }
  template <class T, class A>
  void store(T* p, const Lanes<A>& x) const {
    PYDEQ_ISA::store(p, x, count);
  }
};
template <class Body>
inline void for_blocks(int64_t n, Body body) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) body(i, Whole{});
  if (i < n) body(i, Tail{n - i});
}

// Halves a register down to its sum: lane l += lane l + width / 2, and so on.
template <class A, int width, class Vector>
inline A halve(Vector v) {
  if constexpr (width == 1) {
    return v[0];
  } else {
    typedef A Half __attribute__((vector_size(width / 2 * sizeof(A))));
    Half low, high;
    if constexpr (width == 16) {
      low = __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7);
      high = __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
    } else if constexpr (width == 8) {
      low = __builtin_shufflevector(v, v, 0, 1, 2, 3);
      high = __builtin_shufflevector(v, v, 4, 5, 6, 7);
    } else if constexpr (width == 4) {
      low = __builtin_shufflevector(v, v, 0, 1);
      high = __builtin_shufflevector(v, v, 2, 3);
    } else {
      return v[0] + v[1];
    }
    return halve<A, width / 2>(Half(low + high));
  }
}

template <class A>
inline double sum(Lanes<A> x) {
  PYDEQ_UNROLL for (int half = x.kCount / 2; half > 0; half /= 2) {
    PYDEQ_UNROLL for (int i = 0; i < half; ++i) x.v[i] += x.v[i + half];
  }
  return halve<A, Lanes<A>::kWidth>(x.v[0]);
}

// sum_i x[i] y[i] of one chunk, n <= kChunk.
template <class A, class T, class U>
inline double dot(const T* x, const U* y, int64_t n) {
  Lanes<A> total = splat(A(0));
  for_blocks(
      n, [&](int64_t i, auto part) { total = total + part.template load<A>(x + i) * part.template load<A>(y + i); });
  return sum(total);
}

// totals[j] += row(j)[i] y[i] lane by lane, j in [0, 4): y is read less often than for one row at a time, and more of
// memory is under way at once.
template <class A, class Row, class U>
inline void add_four_products(Row row, const U* y, int64_t n, Lanes<A>* totals) {
  const auto *r0 = row(0), *r1 = row(1), *r2 = row(2), *r3 = row(3);
  Lanes<A> t0 = totals[0], t1 = totals[1], t2 = totals[2], t3 = totals[3];
  for_blocks(n, [&](int64_t i, auto part) {
    const Lanes<A> x = part.template load<A>(y + i);
    t0 = t0 + part.template load<A>(r0 + i) * x;
    t1 = t1 + part.template load<A>(r1 + i) * x;
    t2 = t2 + part.template load<A>(r2 + i) * x;
    t3 = t3 + part.template load<A>(r3 + i) * x;
  });
  totals[0] = t0;
  totals[1] = t1;
  totals[2] = t2;
  totals[3] = t3;
}

// totals[j] += row(j)[i] y[i] lane by lane, j in [0, count).
template <class A, class Row, class U>
inline void add_products(Row row, int64_t count, const U* y, int64_t n, Lanes<A>* totals) {
  int64_t j = 0;
  for (; j + 4 <= count; j += 4) add_four_products([&](int64_t i) { return row(j + i); }, y, n, totals + j);
  for (; j < count; ++j) {
    const auto* r = row(j);
    Lanes<A> t = totals[j];
    for_blocks(n, [&](int64_t i, auto part) { t = t + part.template load<A>(r + i) * part.template load<A>(y + i); });
    totals[j] = t;
  }
}

// out[j] = sum_i row(j)[i] y[i] of one chunk, j in [0, count).
template <class A, class Row, class U>
inline void dots(Row row, int64_t count, const U* y, int64_t n, double* out) {
  int64_t j = 0;
  for (; j + 4 <= count; j += 4) {
    Lanes<A> totals[4] = {splat(A(0)), splat(A(0)), splat(A(0)), splat(A(0))};
    add_four_products([&](int64_t i) { return row(j + i); }, y, n, totals);
    for (int64_t i = 0; i < 4; ++i) out[j + i] = sum(totals[i]);
  }
  for (; j < count; ++j) out[j] = dot<A>(row(j), y, n);
}

}  // namespace
}  // namespace PYDEQ_ISA
}  // namespace pydeq
