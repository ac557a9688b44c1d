// mask.h and block_range.h against the definition of a causal mask and a window, key by key.
#include <climits>
#include <string>

#include "check.h"
#include "hopper_attention/block_range.h"

namespace {

using namespace hopper_attention;

struct Case {
  int seqlen_q;
  int seqlen_k;
  bool causal;
  int window_left;
  int window_right;
};

std::string describe(const Case& c) {
  return "seqlen_q " + std::to_string(c.seqlen_q) + ", seqlen_k " + std::to_string(c.seqlen_k) +
         (c.causal ? ", causal" : "") + ", window (" + std::to_string(c.window_left) + ", " +
         std::to_string(c.window_right) + ")";
}

// abi.h's definition: row i stands at i + seqlen_k - seqlen_q; -1 is unbounded.
bool sees(const Case& c, int row, int key) {
  if (key < 0 || key >= c.seqlen_k) return false;
  const int position = row + c.seqlen_k - c.seqlen_q;
  const int window_right = c.causal ? 0 : c.window_right;
  if (c.window_left >= 0 && key < position - c.window_left) return false;
  return window_right < 0 || key <= position + window_right;
}

void rows_see_what_the_definition_says(const Case& c, const Mask& mask) {
  bool all = true;
  for (int row = 0; row < c.seqlen_q; ++row) {
    for (int key = 0; key < c.seqlen_k; ++key) {
      const bool seen = key >= mask.first_key(row) && key < mask.end_key(row);
      CHECK(seen == sees(c, row, key));
      all = all && seen;
    }
    CHECK(mask.first_key(row) >= 0 && mask.end_key(row) <= c.seqlen_k);
    CHECK(mask.end_key(row) - mask.first_key(row) <= mask.most_keys());
  }
  CHECK(mask.most_keys() <= c.seqlen_k);
  // full() chooses the kernel without a mask, so it must be exact in this direction.
  if (mask.full()) CHECK(all);
}

void blocks_are_the_seen_and_the_wholly_seen(const Case& c, const Mask& mask, int tile_m,
                                             int tile_n) {
  for (int begin = 0; begin < c.seqlen_q; begin += tile_m) {
    const int end = begin + tile_m < c.seqlen_q ? begin + tile_m : c.seqlen_q;
    const BlockRange range = key_blocks(mask, begin, end, tile_n);
    const BlockRange plain = plain_blocks(mask, begin, end, tile_n);
    const int num_blocks = (c.seqlen_k + tile_n - 1) / tile_n;
    CHECK(range.empty() || (range.begin >= 0 && range.end <= num_blocks));
    for (int block = 0; block < num_blocks; ++block) {
      bool any = false, every = true;
      for (int row = begin; row < end; ++row) {
        for (int key = block * tile_n; key < (block + 1) * tile_n; ++key) {
          any = any || sees(c, row, key);
          every = every && sees(c, row, key);
        }
      }
      CHECK((block >= range.begin && block < range.end) == any);
      CHECK((block >= plain.begin && block < plain.end) == every);
    }
  }
}

// Without a mask every row has the same blocks, so a tile that has no row may have them, too.
void without_a_mask_all_rows_see_all_blocks(const Case& c, const Mask& mask, int tile_m,
                                            int tile_n) {
  if (!mask.full()) return;
  const BlockRange all = all_key_blocks(mask, tile_n);
  CHECK(all.begin == 0 && all.end * tile_n >= c.seqlen_k && (all.end - 1) * tile_n < c.seqlen_k);
  for (int begin = 0; begin < c.seqlen_q; begin += tile_m) {
    const int end = begin + tile_m < c.seqlen_q ? begin + tile_m : c.seqlen_q;
    const BlockRange seen = key_blocks(mask, begin, end, tile_n);
    CHECK(seen.begin == all.begin && seen.end == all.end);
  }
}

// A tile's first block is its rightmost, of which its rows may see the left part only.
void the_last_block_ends_within_its_seen_keys(const Case& c, const Mask& mask, int tile_m,
                                              int tile_n) {
  for (int begin = 0; begin < c.seqlen_q; begin += tile_m) {
    const int end = begin + tile_m < c.seqlen_q ? begin + tile_m : c.seqlen_q;
    const BlockRange range = key_blocks(mask, begin, end, tile_n);
    if (range.empty()) continue;
    for (int num_keys = 1; num_keys <= tile_n; ++num_keys) {
      bool beyond = false;
      for (int row = begin; row < end; ++row) {
        for (int i = num_keys; i < tile_n; ++i) {
          beyond = beyond || sees(c, row, (range.end - 1) * tile_n + i);
        }
      }
      CHECK(ends_within(mask, end, range.end - 1, tile_n, num_keys) == !beyond);
    }
    // Where some keys of that block are left out, the others are masked: no row sees it whole.
    const bool narrow = ends_within(mask, end, range.end - 1, tile_n, tile_n - 1);
    CHECK(!narrow || range.end > plain_blocks(mask, begin, end, tile_n).end);
  }
}

// The same from the keys' side.
void keys_are_seen_by_what_the_definition_says(const Case& c, const Mask& mask) {
  for (int key = 0; key < c.seqlen_k; ++key) {
    for (int row = 0; row < c.seqlen_q; ++row) {
      const bool seen = row >= mask.first_row(key) && row < mask.end_row(key);
      CHECK(seen == sees(c, row, key));
    }
    CHECK(mask.first_row(key) >= 0 && mask.end_row(key) <= c.seqlen_q);
  }
}

// query_blocks must be key_blocks' inverse to the block: the order of deterministic sums counts on
// it.
void query_blocks_are_the_seeing_and_the_wholly_seeing(const Case& c, const Mask& mask, int tile_m,
                                                       int tile_n) {
  const int num_blocks = (c.seqlen_q + tile_m - 1) / tile_m;
  for (int begin = 0; begin < c.seqlen_k; begin += tile_n) {
    const int end = begin + tile_n < c.seqlen_k ? begin + tile_n : c.seqlen_k;
    const BlockRange range = query_blocks(mask, begin, end, tile_m);
    const BlockRange plain = plain_query_blocks(mask, begin, end, tile_m);
    CHECK(range.empty() || (range.begin >= 0 && range.end <= num_blocks));
    for (int block = 0; block < num_blocks; ++block) {
      bool any = false, every = true;
      for (int key = begin; key < end; ++key) {
        for (int row = block * tile_m; row < (block + 1) * tile_m; ++row) {
          const bool seen = row < c.seqlen_q && sees(c, row, key);
          any = any || seen;
          every = every && seen;
        }
      }
      CHECK((block >= range.begin && block < range.end) == any);
      CHECK((block >= plain.begin && block < plain.end) == every);
    }
  }
}

void small_problems_by_brute_force() {
  for (int seqlen_q = 0; seqlen_q <= 9; ++seqlen_q) {
    for (int seqlen_k = 0; seqlen_k <= 9; ++seqlen_k) {
      for (int causal = 0; causal <= 1; ++causal) {
        for (int left = -1; left <= 10; ++left) {
          for (int right = -1; right <= 10; ++right) {
            const Case c{seqlen_q, seqlen_k, causal == 1, left, right};
            check::context = describe(c);
            const Mask mask = make_mask(seqlen_q, seqlen_k, c.causal, left, right);
            rows_see_what_the_definition_says(c, mask);
            blocks_are_the_seen_and_the_wholly_seen(c, mask, 4, 3);
            blocks_are_the_seen_and_the_wholly_seen(c, mask, 2, 4);
            blocks_are_the_seen_and_the_wholly_seen(c, mask, 1, 1);
            without_a_mask_all_rows_see_all_blocks(c, mask, 4, 3);
            without_a_mask_all_rows_see_all_blocks(c, mask, 1, 4);
            the_last_block_ends_within_its_seen_keys(c, mask, 4, 3);
            the_last_block_ends_within_its_seen_keys(c, mask, 2, 4);
            keys_are_seen_by_what_the_definition_says(c, mask);
            query_blocks_are_the_seeing_and_the_wholly_seeing(c, mask, 4, 3);
            query_blocks_are_the_seeing_and_the_wholly_seeing(c, mask, 2, 4);
            query_blocks_are_the_seeing_and_the_wholly_seeing(c, mask, 1, 1);
          }
        }
      }
    }
  }
}

void no_mask_is_known_as_none() {
  for (int seqlen_q : {1, 5, 4096}) {
    for (int seqlen_k : {1, 7, 4096}) {
      check::context = describe({seqlen_q, seqlen_k, false, -1, -1});
      CHECK(make_mask(seqlen_q, seqlen_k, false, -1, -1).full());
      CHECK(make_mask(seqlen_q, seqlen_k, false, INT_MAX, INT_MAX).full());
    }
  }
  check::context = "one query, the last: causal hides nothing from it";
  CHECK(make_mask(1, 4096, true, -1, -1).full());
}

// Evaluated by the compiler, which refuses a constant expression that overflows.
constexpr Mask kLongest = make_mask(kMaxLength, kMaxLength, false, INT_MAX, INT_MAX);
static_assert(kLongest.first_key(kMaxLength - 1) == 0);
static_assert(kLongest.end_key(kMaxLength - 1) == kMaxLength);
constexpr Mask kOneKey = make_mask(kMaxLength, 1, false, 0, INT_MAX);
static_assert(kOneKey.first_key(0) == 0 && kOneKey.end_key(kMaxLength - 1) == 1);
constexpr Mask kWideOneKey = make_mask(kMaxLength, 1, false, INT_MAX, INT_MAX);
static_assert(kWideOneKey.first_key(0) == 0 && kWideOneKey.end_key(0) == 1);
constexpr Mask kOneQuery = make_mask(1, kMaxLength, true, INT_MAX, -1);
static_assert(kOneQuery.first_key(0) == 0 && kOneQuery.end_key(0) == kMaxLength);
constexpr Mask kWide = make_mask(kMaxLength, kMaxLength, false, kMaxLength - 2, kMaxLength - 2);
static_assert(kWide.first_key(kMaxLength - 1) == 1 && kWide.end_key(0) == kMaxLength - 1);
static_assert(kLongest.first_row(kMaxLength - 1) == 0 && kLongest.end_row(0) == kMaxLength);
static_assert(kOneQuery.first_row(kMaxLength - 1) == 0 && kOneQuery.end_row(kMaxLength - 1) == 1);
static_assert(kOneKey.first_row(0) == 0 && kOneKey.end_row(0) == kMaxLength);
static_assert(kWide.first_row(kMaxLength - 1) == 1 && kWide.end_row(0) == kMaxLength - 1);
static_assert(key_blocks(kWide, kMaxLength - 128, kMaxLength, 176).end == (kMaxLength + 175) / 176);

}  // namespace

int main() {
  small_problems_by_brute_force();
  no_mask_is_known_as_none();
  return check::result();
}
