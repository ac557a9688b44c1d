// What the host tests need of a test framework: CHECK that says what failed and where.
#pragma once

#include <cstdio>
#include <string>

namespace check {

inline int checks = 0;
inline int failures = 0;
inline std::string context;  // the case at hand, printed with a failure

inline void that(bool holds, const char* text, const char* file, int line) {
  ++checks;
  if (holds) return;
  if (++failures <= 20) {
    std::fprintf(stderr, "%s:%d: CHECK(%s) failed%s%s\n", file, line, text,
                 context.empty() ? "" : " for ", context.c_str());
  }
}

// main's return value. A test that checked nothing has failed.
inline int result() {
  std::printf("%d checks, %d failures\n", checks, failures);
  return checks > 0 && failures == 0 ? 0 : 1;
}

}  // namespace check

#define CHECK(...) check::that(static_cast<bool>(__VA_ARGS__), #__VA_ARGS__, __FILE__, __LINE__)
