// Online softmax over e4m3 products: each key block has its own scale, so that the running maximum
// is kept in base-2 exponents instead of raw scores.
#pragma once

#include "forward/params.h"
#include "forward/scheduler.cuh"
#include "forward/softmax.cuh"
#include "hopper_attention/fp8.h"

namespace hopper_attention {

template <class Traits>
inline constexpr float kSlack = Traits::kOnes ? kMaximumSlack : 0.0f;

// 2^x within 0.3%, a twentieth of e4m3's half step, by a polynomial of degree 2 (least squares, of
// mean 0) on the FMA pipes. NaN stays NaN. From -126.5 down the result is 0: the maximum with -127
// leaves an exponent of 0. A row without keys is known by its sum of 0.
CUTE_DEVICE float exp2_by_fma(float x) {
  float y;
  asm("max.NaN.f32 %0, %1, 0fC2FE0000;" : "=f"(y) : "f"(x));
  constexpr float kRound = 0x1.8p23f + 127.0f;  // brings n + 127 to the lowest bits
  const float shifted = y + kRound;
  const float fraction = y - (shifted - kRound);  // -1/2 to 1/2
  const float power = fmaf(fmaf(0.23734945f, fraction, 0.70128172f), fraction, 1.0003517f);
  return power * __int_as_float(__float_as_int(shifted) << 23);
}

template <class Traits>
struct Fp8Softmax {
  float multiplier[kRowsPerThread] = {};  // from a block's raw scores to base-2 exponents
  float shift[kRowsPerThread] = {-INFINITY, -INFINITY};  // the running maximum less kOffsetLog2
  float subtrahend[kRowsPerThread] = {};  // shift, or 0 where the row has seen no key
  float alpha[kRowsPerThread] = {};       // what O is to be multiplied by
  float sum[kRowsPerThread] = {};         // this thread's part of the row sum, where it is not in O

  // Follows a block's maximum of a row, of which a thread has a part.
  // kMayBeEmpty: the row may have seen no key so far. All its scores are -inf then, and stay so
  // whatever finite number is subtracted.
  template <bool kMayBeEmpty>
  CUTE_DEVICE void take_maximum(float part, int row) {
    const float previous = shift[row];
    const float block_max = quad_reduce(part, [](float a, float b) { return fmaxf(a, b); });
    shift[row] = fmaxf(previous, fmaf(block_max, multiplier[row], -kOffset));
    subtrahend[row] = kMayBeEmpty && shift[row] == -INFINITY ? 0.0f : shift[row];
    alpha[row] = exp2f(previous - subtrahend[row]);
  }

  // Takes a block's maxima in. In a block without masks most rows' maxima stay: a look at this
  // thread's scores as integers, three at a time and without asking the neighbours, shows it. Among
  // integers negative numbers are in the wrong order, so 0 stands for them: no harm, since it is an
  // upper bound.
  template <bool kPlain, class Scores>
  CUTE_DEVICE void take_maxima(Scores const& s) {
    if constexpr (kPlain) {
      bool rises = false, negative = false;
      float bound[kRowsPerThread];
      CUTE_UNROLL
      for (int row = 0; row < kRowsPerThread; ++row) {
        bound[row] = __int_as_float(integer_max(s, row));
        rises |= fmaf(bound[row], multiplier[row], -(kOffset + kSlack<Traits>)) > shift[row];
        negative |= bound[row] == 0.0f;
      }
      if (!__any_sync(0xffffffff, rises)) {
        CUTE_UNROLL
        for (int row = 0; row < kRowsPerThread; ++row) {
          alpha[row] = 1.0f;
          subtrahend[row] = shift[row];
        }
        return;
      }
      if (!__any_sync(0xffffffff, negative)) {  // the bounds are the maxima
        CUTE_UNROLL
        for (int row = 0; row < kRowsPerThread; ++row) take_maximum<false>(bound[row], row);
        return;
      }
    }
    CUTE_UNROLL
    for (int row = 0; row < kRowsPerThread; ++row) {
      take_maximum<Traits::kMasked && !kPlain>(Softmax::thread_max(s, row), row);
    }
  }

  // S -> P = exp2(multiplier * S - subtrahend) in place for one row, and P's sum where O has none.
  template <class Scores>
  CUTE_DEVICE void exponentiate(Scores& s, int row) {
    constexpr int kEvery = Traits::kConfig.exp2_by_fma > 0 ? Traits::kConfig.exp2_by_fma : 1 << 30;
    float block_sum = 0.0f;
    CUTE_UNROLL
    for (int j = 0; j < decltype(cute::size(s))::value / kRowsPerThread; ++j) {
      const int i = fragment_index(row, j);
      const float x = fmaf(s(i), multiplier[row], -subtrahend[row]);
      s(i) = j % kEvery == kEvery - 1 ? exp2_by_fma(x) : exp2f(x);
      if constexpr (!Traits::kOnes) block_sum += s(i);
    }
    if constexpr (!Traits::kOnes) sum[row] = fmaf(sum[row], alpha[row], block_sum);
  }

 private:
  static constexpr float kOffset = static_cast<float>(kOffsetLog2);

  // The largest of this thread's scores of a row and 0, as a float's bits.
  template <class Scores>
  CUTE_DEVICE static int integer_max(Scores const& s, int row) {
    int result[2] = {0, 0};  // two chains: one would wait for itself
    CUTE_UNROLL
    for (int j = 0; j < decltype(cute::size(s))::value / kRowsPerThread; j += 2) {
      result[j / 2 % 2] = __vimax3_s32(result[j / 2 % 2], __float_as_int(s(fragment_index(row, j))),
                                       __float_as_int(s(fragment_index(row, j + 1))));
    }
    return max(result[0], result[1]);
  }
};

// The same value, of which the compiler knows nothing: not that an exponential is not negative.
CUTE_DEVICE float opaque(float x) {
  asm("" : "+f"(x));
  return x;
}

// P in e4m3 as the second product's A operand: a register holds slots 4a to 4a + 3 of one row, that
// is, columns 2a, 2a + 1, 8 + 2a and 9 + 2a of 16 (fp8.h), which are this thread's anyway.
template <class Scores, class Probabilities>
CUTE_DEVICE void convert_to_e4m3(Scores const& s, Probabilities& p) {
  constexpr int kGroups = decltype(cute::size(s))::value / 8;  // of 16 keys
  auto* registers = reinterpret_cast<std::uint32_t*>(p.data());
  CUTE_UNROLL
  for (int group = 0; group < kGroups; ++group) {
    CUTE_UNROLL
    for (int row = 0; row < kRowsPerThread; ++row) {
      const int low = fragment_index(row, 4 * group), high = fragment_index(row, 4 * group + 2);
      asm("{\n"
          ".reg .b16 low, high;\n"
          "cvt.rn.satfinite.e4m3x2.f32 low, %2, %1;\n"
          "cvt.rn.satfinite.e4m3x2.f32 high, %4, %3;\n"
          "mov.b32 %0, {low, high};\n"
          "}\n"
          : "=r"(registers[2 * group + row])
          : "f"(s(low)), "f"(s(low + 1)), "f"(s(high)), "f"(s(high + 1)));
    }
  }
}

// For each of this thread's rows Q's scale times what its scores are to be multiplied by.
CUTE_DEVICE void read_row_factors(ForwardParams const& params, TileMessage const& message,
                                  int first_row, float (&factor)[kRowsPerThread]) {
  const ScaleParams& scales = params.scales;
  const int head = scales.q_per_kv ? message.head_kv : message.tile.head;
  const float* q =
      scales.q + message.tile.batch * scales.q_stride_batch + head * scales.q_stride_head;
  const float common = params.transform_scores ? params.inner_scale : params.scale_log2;
  CUTE_UNROLL
  for (int r = 0; r < kRowsPerThread; ++r) {
    const int token = min(first_row + 8 * r, params.mask.seqlen_q - 1);
    const float scale = scales.q == nullptr ? 1.0f : __ldg(q + (token >> scales.q_shift));
    factor[r] = scale * common;
  }
}

// K's scales and V's factors of one head.
CUTE_DEVICE const float* key_scales(ForwardParams const& params, TileMessage const& message) {
  const ScaleParams& scales = params.scales;
  return scales.k + message.tile.batch * scales.k_stride_batch +
         message.head_kv * scales.k_stride_head;
}
CUTE_DEVICE const float* token_factors(ForwardParams const& params, TileMessage const& message) {
  const ScaleParams& scales = params.scales;
  return scales.v_token_factor + message.tile.batch * scales.v_token_stride_batch +
         message.head_kv * scales.v_token_stride_head;
}
// In assembly, since the compiler would move what is the same for a warp to a uniform register, and
// wait for it then and there; volatile, so that it stays among the exponentials.
CUTE_DEVICE float load_scale(const float* address) {
  float scale;
  asm volatile("ld.global.nc.f32 %0, [%1];" : "=f"(scale) : "l"(address));
  return scale;
}

// Whether each key has a scale of its own.
CUTE_DEVICE bool scales_each_key(ForwardParams const& params) {
  return params.scales.k != nullptr && params.scales.k_shift == 0;
}

// A product of tiny scales must not vanish: 0 times a masked score's -inf would be NaN.
CUTE_DEVICE float positive(float scale) { return fmaxf(scale, 1.17549435e-38f); }

// The factors of one key block, shared out over the lanes of a warp: lane l has those of keys l,
// 32 + l and so on, and a shuffle brings them where they are used. That is four loads a thread, all
// under way at once, where each thread loading what it needs would take 32 and their addresses.
template <int kKeys>
struct KeyFactors {
  float part[kKeys / 32];

  // factors: one a key from the block's first, keys of them exist. Null: 1 for all.
  CUTE_DEVICE KeyFactors(const float* factors, int keys) {
    const int lane = fresh_thread() % 32;
    CUTE_UNROLL
    for (int i = 0; i < kKeys / 32; ++i) {
      const int key = 32 * i + lane;
      part[i] = factors != nullptr && key < keys ? __ldg(factors + key) : 1.0f;
    }
  }

  template <class Scores>
  CUTE_DEVICE void scale_columns(Scores& s) const {
    const int first = fresh_thread() % 4 * 2;
    CUTE_UNROLL
    for (int j = 0; j < decltype(cute::size(s))::value / kRowsPerThread; ++j) {
      const int column = fragment_column(fragment_index(0, j));
      const float factor = __shfl_sync(0xffffffff, part[column / 32], first + column % 32);
      CUTE_UNROLL
      for (int r = 0; r < kRowsPerThread; ++r) s(fragment_index(r, j)) *= factor;
    }
  }
};

}  // namespace hopper_attention
