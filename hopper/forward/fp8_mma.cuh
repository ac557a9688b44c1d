// The consumer in e4m3: S = Q K^T, P = softmax(S), O += P V over a tile's key blocks, right to
// left.
//
// Hopper's FP8 products keep about 14 bits of their accumulator, too few to add thousands of keys.
// So each block's P V has an accumulator T of its own, which O = alpha O + T takes in in float32,
// with the multiplication that online softmax needs anyway. Where registers for T last beside the
// next block's S, the next Q K^T is issued ahead of P V as in 16 bits (attend_overlapped); else P V
// is computed in parts of head_dim_v, each folded in under the next one's product
// (attend_in_parts).
#pragma once

#include "forward/fp8_load.cuh"
#include "forward/fp8_softmax.cuh"
#include "forward/mma.cuh"

namespace hopper_attention {

// Where this thread's part of a row's sum lies in shared memory.
CUTE_DEVICE int row_sum_index(int row) {
  return row * kWarpgroupThreads + threadIdx.x % kWarpgroupThreads;
}

// One consumer's state within a tile and the steps that both loops are made of.
template <class Traits>
struct Fp8Consumer {
  using Storage = typename Traits::SharedStorage;
  using Element = typename Traits::Element;

  ForwardParams const& params;
  Storage& shared;
  Ring<Traits::kStages>& k_ring;
  Ring<Traits::kStages>& v_ring;
  Turns<Traits> turns;
  Turns<Traits, Traits::kConfig.exp_turns> exp_turns;
  Fp8Softmax<Traits>& softmax;
  TileSink<Traits> const& sink;
  int row;                           // this thread's first
  float row_factor[kRowsPerThread];  // Q's scale and the softmax's (or that of S before a cap)
  float key_scale;                   // of the keys of the next block, if they share one
  const float* key_scales;           // of this head, where keys share them; or null

  CUTE_DEVICE void wait_k() { shared.barriers.k_full[k_ring.stage].wait(k_ring.phase); }
  CUTE_DEVICE void wait_v() { shared.barriers.v_full[v_ring.stage].wait(v_ring.phase); }
  CUTE_DEVICE void release_k(bool always) {
    if (cute::elect_one_sync() && always) shared.barriers.k_empty[k_ring.stage].arrive();
    k_ring.advance();
  }
  CUTE_DEVICE void release_v() {
    arrive_warp(shared.barriers.v_empty[v_ring.stage]);
    v_ring.advance();
  }
  CUTE_DEVICE void skip(int count) {  // blocks that only other consumers need
    for (; count > 0; --count) {
      wait_k();
      turns.wait();
      turns.pass();
      exp_turns.wait();
      exp_turns.pass();
      release_k(true);
      wait_v();
      release_v();
    }
  }

  // Makes the multipliers of n_block, whose keys' scale was loaded a block ago, and loads the next
  // one's: while the scores are still being multiplied.
  CUTE_DEVICE void prepare(int n_block) {
    const bool transform = Traits::kMasked && params.transform_scores;
    CUTE_UNROLL
    for (int r = 0; r < kRowsPerThread; ++r) {
      const float product = row_factor[r] * key_scale;
      softmax.multiplier[r] = transform ? product : positive(product);
    }
    load_key_scale(n_block - 1);
  }
  CUTE_DEVICE void load_key_scale(int n_block) {
    if (key_scales == nullptr) return;
    const int first_key = max(n_block, 0) * Traits::kTileN;
    key_scale = load_scale(key_scales + (first_key >> params.scales.k_shift));
  }

  // The final scores of a block with masks, caps, or scales of single keys.
  template <class Scores>
  CUTE_DEVICE void finish_scores(Scores& rS, int n_block) {
    if constexpr (Traits::kMasked) {
      if (params.transform_scores) transform_block(rS, n_block);
    }
    mask_scores<!Traits::kMasked>(rS, params.mask, row, n_block, Traits::kTileN);
  }

  template <class Scores>
  CUTE_DEVICE void transform_block(Scores& rS, int n_block) {
    CUTE_UNROLL
    for (int i = 0; i < decltype(cute::size(rS))::value; ++i) {
      rS(i) *= softmax.multiplier[fragment_row(i)];
    }
    CUTE_UNROLL
    for (int r = 0; r < kRowsPerThread; ++r) softmax.multiplier[r] = params.scale_log2;
    const int first_key = n_block * Traits::kTileN;
    if (scales_each_key(params)) {
      const float* factors = hopper_attention::key_scales(params, sink.tile(shared.barriers));
      scale_columns(rS, factors + first_key, params.mask.seqlen_k - first_key);
    }
    if (params.cap == 0.0f) return;
    CUTE_UNROLL
    for (int i = 0; i < decltype(cute::size(rS))::value; ++i) {
      rS(i) = params.cap * precise_tanh(rS(i));
    }
  }

  // After the exponentials: the factors of V's tokens, which P takes and its sum does not.
  template <class Scores>
  CUTE_DEVICE void fold_token_factors(Scores& rS, int n_block) {
    if constexpr (Traits::kMasked) {
      if (params.scales.v_token_factor == nullptr) return;
      if constexpr (Traits::kOnes) {  // the ones would sum the products
        CUTE_UNROLL
        for (int r = 0; r < kRowsPerThread; ++r) {
          float block_sum = 0.0f;
          CUTE_UNROLL
          for (int j = 0; j < decltype(cute::size(rS))::value / kRowsPerThread; ++j) {
            block_sum += rS(fragment_index(r, j));
          }
          float& sum = shared.row_sums[turns.consumer][row_sum_index(r)];
          sum = fmaf(sum, softmax.alpha[r], block_sum);
        }
      }
      const int first_key = n_block * Traits::kTileN;
      scale_columns(rS, token_factors(params, sink.tile(shared.barriers)) + first_key,
                    params.mask.seqlen_k - first_key);
    }
  }

  // O of the last block that was folded in becomes O in the reference of the next.
  template <class Output, class Block>
  CUTE_DEVICE static void fold(Output&& o, Block const& t, float const (&alpha)[kRowsPerThread]) {
    CUTE_UNROLL
    for (int i = 0; i < decltype(cute::size(t))::value; ++i) {
      o(i) = fmaf(o(i), alpha[fragment_row(i)], t(i));
    }
  }
};

template <class Traits>
CUTE_DEVICE auto make_p_fragment() {
  using namespace cute;
  // A thread's 4 neighbours of K, two rows, and the same 16 further on; for every 32 keys.
  return make_tensor<typename Traits::Element>(
      Layout<Shape<Shape<_4, _2, _2>, _1, Int<Traits::kTileN / 32>>>{});
}

// step(n_block, kPlain) for a consumer's blocks from n_block on, right to left.
template <class Traits, class Step>
CUTE_DEVICE void for_blocks(BlockRange own, BlockRange plain, int n_block, Step const& step) {
  using cute::false_type;
  using cute::true_type;
  if constexpr (Traits::kMasked) {
    const int plain_begin = max(plain.begin, own.begin);
    while (n_block >= own.begin) {  // right edge, middle, left edge: at most twice
      for (; n_block >= own.begin && (n_block >= plain.end || n_block < plain.begin); --n_block) {
        step(n_block, false_type{});
      }
      for (; n_block >= plain_begin && n_block < plain.end; --n_block) step(n_block, true_type{});
    }
  } else {
    if constexpr (!Traits::kConfig.overlap_products) {
      if (n_block >= plain.end) step(n_block--, false_type{});  // a short last block
    }
    for (; n_block >= own.begin; --n_block) step(n_block, true_type{});
  }
}

// The scores of the first block and its P; O is still zero.
template <class Traits, class Scores, class Probabilities>
CUTE_DEVICE void first_softmax(Fp8Consumer<Traits>& self, Scores& rS, Probabilities& rP,
                               BlockRange own, BlockRange plain) {
  const int n_block = own.end - 1;
  const bool masked = own.end > plain.end;
  self.prepare(n_block);
  if (masked) self.finish_scores(rS, n_block);
  self.exp_turns.wait();
  CUTE_UNROLL
  for (int r = 0; r < kRowsPerThread; ++r) {
    self.softmax.template take_maximum<Traits::kMasked>(Softmax::thread_max(rS, r), r);
    self.softmax.exponentiate(rS, r);
  }
  self.exp_turns.pass();
  if (masked) self.fold_token_factors(rS, n_block);
  convert_to_e4m3(rS, rP);
}

template <class Traits, class Output, class ReleaseQ>
CUTE_DEVICE void attend_overlapped(Fp8Consumer<Traits>& self, int consumer, BlockRange own,
                                   BlockRange plain, Output& rO, ReleaseQ const& release_q) {
  using namespace cute;
  typename Traits::MmaQK mma_qk;
  typename Traits::MmaPV mma_pv;
  Tensor sQ = make_tensor(make_smem_ptr(self.shared.q[consumer]), typename Traits::LayoutQ{});
  Tensor sK = make_tensor(make_smem_ptr(self.shared.k[0]), typename Traits::LayoutK{});
  Tensor sVt = make_tensor(make_smem_ptr(self.shared.v[0]), typename Traits::LayoutVt{});
  auto thread_qk = mma_qk.get_thread_slice(0);  // descriptors are the same for every thread
  auto thread_pv = mma_pv.get_thread_slice(0);
  Tensor tSrQ = thread_qk.partition_fragment_A(sQ);   // (MMA, 1, d/32)
  Tensor tSrK = thread_qk.partition_fragment_B(sK);   // (MMA, 1, d/32, stages)
  Tensor tOrV = thread_pv.partition_fragment_B(sVt);  // (MMA, 1, tile_n/32, stages)
  auto make_s = [&] {
    return partition_fragment_C(mma_qk, Shape<typename Traits::M, typename Traits::N>{});
  };
  auto rP = make_p_fragment<Traits>();
  Fp8Softmax<Traits>& softmax = self.softmax;
  float owed[kRowsPerThread];  // alpha of the block in T

  auto score = [&](auto& rS) {
    self.turns.wait();
    issue_product<true>(mma_qk, tSrQ, tSrK(_, _, _, self.k_ring.stage), rS);
  };
  // rT: a block's P V; not used where O is its own accumulator.
  auto multiply_values = [&](auto& rT) {
    self.wait_v();
    if constexpr (Traits::kFast) {
      issue_product<false>(mma_pv, rP, tOrV(_, _, _, self.v_ring.stage), rO);
    } else {
      issue_product<true>(mma_pv, rP, tOrV(_, _, _, self.v_ring.stage), rT);
    }
  };
  auto take_values = [&](auto& rT) {
    warpgroup_wait<0>();
    warpgroup_fence_operand(rO);
    if constexpr (!Traits::kFast) warpgroup_fence_operand(rT);
    self.release_v();
    if constexpr (!Traits::kFast) Fp8Consumer<Traits>::fold(rO, rT, owed);
  };
  constexpr bool kHalf = Traits::kConfig.schedule == Schedule::kAfterHalfRow;
  constexpr bool kHolds = kHalf || Traits::kConfig.schedule == Schedule::kAfterRow;
  // S and T begin anew in each step: a fragment that lived on would hold its registers.
  auto step = [&](int n_block, auto kPlain) {
    auto rS = make_s();
    Tensor rT = make_fragment_like(rO);
    self.wait_k();
    score(rS);
    multiply_values(rT);
    self.turns.pass();
    self.prepare(n_block);
    warpgroup_wait<1>();  // the scores; the values are still being multiplied
    warpgroup_fence_operand(rS);
    if constexpr (!kHolds) self.release_k(true);
    if constexpr (!kPlain) self.finish_scores(rS, n_block);
    CUTE_UNROLL
    for (int r = 0; r < kRowsPerThread; ++r) owed[r] = softmax.alpha[r];
    softmax.template take_maxima<kPlain>(rS);
    self.exp_turns.wait();
    softmax.exponentiate(rS, 0);
    if constexpr (kHolds) {  // holds the wait below back, as in mma.cuh; P is never negative
      constexpr int kColumns = Traits::kTileN / 4;
      const float p = rS(fragment_index(0, kHalf ? kColumns / 2 : kColumns - 1));
      self.release_k(!(opaque(p) < 0.0f));
    }
    take_values(rT);
    softmax.exponentiate(rS, 1);
    self.exp_turns.pass();
    if constexpr (!kPlain) self.fold_token_factors(rS, n_block);
    if constexpr (Traits::kFast) {
      CUTE_UNROLL
      for (int i = 0; i < decltype(size(rO))::value; ++i) rO(i) *= softmax.alpha[fragment_row(i)];
    }
    convert_to_e4m3(rS, rP);
  };

  {
    auto rS = make_s();
    self.wait_k();
    score(rS);
    self.turns.pass();
    warpgroup_wait<0>();
    warpgroup_fence_operand(rS);
    self.release_k(true);
    first_softmax(self, rS, rP, own, plain);
  }
  for_blocks<Traits>(own, plain, own.end - 2, step);
  release_q();
  Tensor rT = make_fragment_like(rO);
  multiply_values(rT);
  CUTE_UNROLL
  for (int r = 0; r < kRowsPerThread; ++r) owed[r] = softmax.alpha[r];
  take_values(rT);
}

template <class Traits, class Output, class ReleaseQ>
CUTE_DEVICE void attend_in_parts(Fp8Consumer<Traits>& self, int consumer, BlockRange own,
                                 BlockRange plain, Output& rO, ReleaseQ const& release_q) {
  using namespace cute;
  typename Traits::MmaQK mma_qk;
  typename Traits::MmaPV mma_pv;
  Tensor sQ = make_tensor(make_smem_ptr(self.shared.q[consumer]), typename Traits::LayoutQ{});
  Tensor sK = make_tensor(make_smem_ptr(self.shared.k[0]), typename Traits::LayoutK{});
  Tensor sVt = make_tensor(make_smem_ptr(self.shared.v[0]), typename Traits::LayoutVt{});
  auto thread_qk = mma_qk.get_thread_slice(0);
  auto thread_pv = mma_pv.get_thread_slice(0);
  Tensor tSrQ = thread_qk.partition_fragment_A(sQ);   // (MMA, 1, d/32)
  Tensor tSrK = thread_qk.partition_fragment_B(sK);   // (MMA, 1, d/32, stages)
  Tensor tOrV = thread_pv.partition_fragment_B(sVt);  // (MMA, parts, tile_n/32, stages)
  Tensor rS = partition_fragment_C(mma_qk, Shape<typename Traits::M, typename Traits::N>{});
  using PartShape = Shape<typename Traits::M, Int<Traits::kPartColumns>>;
  Tensor rT = partition_fragment_C(mma_pv, PartShape{});
  auto rP = make_p_fragment<Traits>();
  Fp8Softmax<Traits>& softmax = self.softmax;

  // P V part by part. One T, not two in turn: ptxas would not put both where S was, and spill; the
  // other consumer's products fill the gaps.
  auto multiply_values = [&] {
    self.wait_v();
    if constexpr (Traits::kFast) {  // O is its own accumulator
      CUTE_UNROLL
      for (int i = 0; i < decltype(size(rO))::value; ++i) rO(i) *= softmax.alpha[fragment_row(i)];
      issue_product<false>(mma_pv, rP, tOrV(_, _, _, self.v_ring.stage), rO);
      warpgroup_wait<0>();
      warpgroup_fence_operand(rO);
      self.release_v();
      return;
    }
    for_each(make_int_sequence<Traits::kParts>{}, [&](auto part) {
      Tensor b = tOrV(_, Int<decltype(part)::value>{}, _, self.v_ring.stage);  // (MMA, tile_n/32)
      auto layout = make_layout(get<0>(b.layout()), Layout<_1>{}, get<1>(b.layout()));
      issue_product<true>(mma_pv, rP, make_tensor(b.data(), layout), rT);
      warpgroup_wait<0>();
      warpgroup_fence_operand(rT);
      if constexpr (decltype(part)::value == Traits::kParts - 1) self.release_v();
      Fp8Consumer<Traits>::fold(rO(_, _, Int<decltype(part)::value>{}), rT, softmax.alpha);
    });
  };
  auto step = [&](int n_block, auto kPlain) {
    self.wait_k();
    self.turns.wait();
    issue_product<true>(mma_qk, tSrQ, tSrK(_, _, _, self.k_ring.stage), rS);
    self.turns.pass();
    self.prepare(n_block);
    warpgroup_wait<0>();
    warpgroup_fence_operand(rS);
    self.release_k(true);
    if (n_block == own.begin) release_q();
    if constexpr (!kPlain) self.finish_scores(rS, n_block);
    softmax.template take_maxima<kPlain>(rS);
    self.exp_turns.wait();
    CUTE_UNROLL
    for (int r = 0; r < kRowsPerThread; ++r) softmax.exponentiate(rS, r);
    self.exp_turns.pass();
    if constexpr (!kPlain) self.fold_token_factors(rS, n_block);
    convert_to_e4m3(rS, rP);
    multiply_values();
  };
  for_blocks<Traits>(own, plain, own.end - 1, step);
}

// O of one consumer's rows of one tile with, where Traits::kOnes, the row sums behind it.
template <class Traits, class Output>
CUTE_DEVICE void attend(ForwardParams const& params, typename Traits::SharedStorage& shared,
                        TileSink<Traits> const& sink, BlockRange blocks, int first_row,
                        int consumer, int thread, Ring<Traits::kStages>& k_ring,
                        Ring<Traits::kStages>& v_ring, std::uint32_t q_phase,
                        Fp8Softmax<Traits>& softmax, Output& rO) {
  const BlockRange own = own_blocks<Traits>(params.mask, blocks, first_row);
  const int row = first_row + thread / 32 * 16 + thread % 32 / 4;
  const int row_end = min(first_row + kConsumerRows, params.mask.seqlen_q);
  const BlockRange plain = Traits::kMasked && params.transform_scores
                               ? BlockRange{0, 0}
                               : plain_blocks(params.mask, first_row, row_end, Traits::kTileN);
  Fp8Consumer<Traits> self{params,  shared, k_ring, v_ring, {consumer}, {consumer},
                           softmax, sink,   row,    {},     1.0f,       nullptr};
  const TileMessage message = sink.tile(shared.barriers);
  const bool share = params.scales.k != nullptr && !scales_each_key(params);
  if (share) self.key_scales = key_scales(params, message);
  read_row_factors(params, message, row, self.row_factor);
  if constexpr (Traits::kTokenSums) {
    if (params.scales.v_token_factor != nullptr) {
      for (int r = 0; r < kRowsPerThread; ++r) shared.row_sums[consumer][row_sum_index(r)] = 0.0f;
    }
  }
  self.load_key_scale(own.end - 1);
  auto release_q = [&] {  // where O lies on Q, the epilogue releases it
    if constexpr (!Traits::kOverlayO) arrive_warp(shared.barriers.q_empty[consumer]);
  };
  shared.barriers.q_full[consumer].wait(q_phase);
  cute::clear(rO);
  self.skip(blocks.end - own.end);
  if (own.empty()) {
    release_q();
    return;
  }
  if constexpr (Traits::kConfig.overlap_products) {
    attend_overlapped(self, consumer, own, plain, rO, release_q);
  } else {
    attend_in_parts(self, consumer, own, plain, rO, release_q);
  }
  self.skip(own.begin - blocks.begin);
}

}  // namespace hopper_attention
