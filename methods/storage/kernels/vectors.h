// Vectors of 16 floats; cpp.py puts this text before that of every kernel for a CPU.
//
// The vectors are types of the compiler (GCC or Clang), which splits them if the processor's registers are shorter.
// SCALAR is the type of the numbers in memory: float, or uint16_t for bfloat16.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

constexpr int LANES = 16;
typedef float Vector __attribute__((vector_size(4 * LANES)));
typedef int32_t Integers __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));

inline Vector load(const float* x) {
  Vector y;
  std::memcpy(&y, x, sizeof y);
  return y;
}

inline Vector load(const uint16_t* x) {  // bfloat16 is the upper half of a float
  Halves halves;
  std::memcpy(&halves, x, sizeof halves);
  return (Vector)(__builtin_convertvector(halves, Integers) << 16);
}

inline float load_one(float x) { return x; }

inline float load_one(uint16_t x) {
  const uint32_t bits = uint32_t(x) << 16;
  float y;
  std::memcpy(&y, &bits, sizeof y);
  return y;
}

inline void store(float* x, Vector y) { std::memcpy(x, &y, sizeof y); }

inline void store_rounded(float* x, float y) { *x = y; }

inline void store_rounded(uint16_t* x, float y) {  // to nearest, ties to even
  uint32_t bits;
  std::memcpy(&bits, &y, sizeof bits);
  *x = y != y ? 0x7fc0 : uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline float sum_of(Vector x) {
  x += __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
  x += __builtin_shufflevector(x, x, 4, 5, 6, 7, 0, 1, 2, 3, 8, 9, 10, 11, 12, 13, 14, 15);
  return (x[0] + x[2]) + (x[1] + x[3]);
}

// exp(x) for x <= 0 up to 2 units in the last place, 0 below -87, and NaN of NaN: 2^n times a polynomial (Cephes'
// coefficients).
inline Vector exponential(Vector x) {
  const Vector shifted = x * 1.44269504f + 12582912.0f;  // adding 1.5 * 2^23 leaves the nearest integer in the low bits
  const Vector n = shifted - 12582912.0f;
  const Vector r = x - n * 0.693359375f + n * 2.12194440e-4f;
  Vector p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const Vector y = p * (Vector)(((Integers)shifted << 23) + 0x3f800000);
  return x <= -87.0f ? Vector{} : y;
}

}  // namespace
