// Two standard normal numbers from two random words, by the transform of Box and Muller (1958):
//
//   u = (w0 + 1/2) / 2^32,  r = sqrt(-2 log u),  angle = 2 pi w1 / 2^32,  (r cos angle, r sin angle)
//
// For host and device. Additions, multiplications and square roots of floats in the order that they are written in,
// each rounded to nearest: to be compiled without contraction (-ffp-contract=off, nvcc -fmad=false), and then the same
// bits everywhere. Both numbers are symmetric and uncorrelated to the last bit: quadrants and the offsets in them are
// mirror images. |r| <= sqrt(66 log 2) = 6.76.
#pragma once

#include <cmath>
#include <cstring>

#include "shared/philox.h"

namespace pydeq {
namespace {

struct NormalPair {
  float first, second;
};

PYDEQ_EVERYWHERE float float_of_bits(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

PYDEQ_EVERYWHERE uint32_t bits_of_float(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

constexpr float kUnit = 1.0f / 4294967296.0f;  // 2^-32
// The bits of sqrt(1/2): a float x is 2^e m with m in [sqrt(1/2), sqrt(2)).
constexpr uint32_t kRootHalf = 0x3f3504f3, kOne = 0x3f800000;

// log((w + 1/2) / 2^32), below 0.
PYDEQ_EVERYWHERE float log_of_word(uint32_t w) {
  using namespace constants;
  const uint32_t bits = bits_of_float((static_cast<float>(w) + 0.5f) * kUnit) + (kOne - kRootHalf);
  const int32_t e = static_cast<int32_t>(bits >> 23) - 127;
  const float m = float_of_bits((bits & 0x7fffff) + kRootHalf);
  // Near u = 1, 1 - u has more correct digits than u.
  const float from_one = (static_cast<float>(~w) + 0.5f) * -kUnit;
  const float f = e == 0 ? from_one : m - 1.0f;
  float p = static_cast<float>(LOG_TERMS_7);
  p = p * f + static_cast<float>(LOG_TERMS_6);
  p = p * f + static_cast<float>(LOG_TERMS_5);
  p = p * f + static_cast<float>(LOG_TERMS_4);
  p = p * f + static_cast<float>(LOG_TERMS_3);
  p = p * f + static_cast<float>(LOG_TERMS_2);
  p = p * f + static_cast<float>(LOG_TERMS_1);
  p = p * f + static_cast<float>(LOG_TERMS_0);
  return static_cast<float>(e) * static_cast<float>(LOG_2) + (f + f * f * p);
}

PYDEQ_EVERYWHERE NormalPair normal_pair(uint32_t w0, uint32_t w1) {
  using namespace constants;
  const float r = sqrtf(-2.0f * log_of_word(w0));
  // The angle is pi / 2 times (quadrant + t), t = (2 i + 1) / 2^31 in (-1/2, 1/2).
  const uint32_t quadrant = (w1 + 0x20000000u) >> 30;
  const int32_t i = static_cast<int32_t>(w1 - (quadrant << 30));
  const float t = static_cast<float>(2 * i + 1) * (kUnit + kUnit), s = t * t;
  float sine = static_cast<float>(SINE_TERMS_3);
  sine = sine * s + static_cast<float>(SINE_TERMS_2);
  sine = sine * s + static_cast<float>(SINE_TERMS_1);
  sine = sine * s + static_cast<float>(SINE_TERMS_0);
  sine = sine * t;
  float cosine = static_cast<float>(COSINE_TERMS_3);
  cosine = cosine * s + static_cast<float>(COSINE_TERMS_2);
  cosine = cosine * s + static_cast<float>(COSINE_TERMS_1);
  cosine = cosine * s + static_cast<float>(COSINE_TERMS_0);
  cosine = cosine * s + 1.0f;
  // Quadrants: (c, s), (-s, c), (-c, -s), (s, -c).
  const bool swap = quadrant & 1;
  const float x = r * (swap ? sine : cosine), y = r * (swap ? cosine : sine);
  const uint32_t flip_x = ((quadrant + 1) & 2) << 30, flip_y = (quadrant & 2) << 30;
  return {float_of_bits(bits_of_float(x) ^ flip_x), float_of_bits(bits_of_float(y) ^ flip_y)};
}

}  // namespace
}  // namespace pydeq
