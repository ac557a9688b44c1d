// Of an accumulator, each element is one thread's, and fragment_index is the other two's inverse.
#include <vector>

#include "check.h"
#include "hopper_attention/fragment.h"

using namespace hopper_attention;

namespace {

void each_element_is_one_thread_s(int columns) {
  check::context = std::to_string(columns) + " columns";
  std::vector<int> seen(64 * columns, 0);
  for (unsigned thread = 0; thread < 128; ++thread) {
    for (int i = 0; i < columns / 2; ++i) {
      const int row = static_cast<int>(fragment_first_row(thread)) + 8 * fragment_row(i);
      const int column = static_cast<int>(thread % 4) * 2 + fragment_column(i);
      CHECK(row < 64 && column < columns);
      CHECK(row / 16 == static_cast<int>(thread / 32));
      ++seen[row * columns + column];
    }
  }
  for (int count : seen) CHECK(count == 1);
}

void index_is_the_inverse(int columns) {
  for (int row = 0; row < kRowsPerThread; ++row) {
    int last = -1;
    for (int j = 0; j < columns / 4; ++j) {
      const int i = fragment_index(row, j);
      CHECK(fragment_row(i) == row);
      CHECK(fragment_column(i) > last);
      last = fragment_column(i);
    }
  }
}

}  // namespace

int main() {
  for (int columns : {8, 48, 64, 176, 256}) {
    each_element_is_one_thread_s(columns);
    index_is_the_inverse(columns);
  }
  return check::result();
}
