// A problem that every check lets through, for tests that change one field of it.
#pragma once

#include <string>

#include "check.h"
#include "hopper_attention/abi.h"
#include "status.h"

// Args: the forward or the backward pass's.
template <class Args>
Args small_problem() {
  Args args{};
  args.struct_size = sizeof(args);
  args.dtype = HOPPER_ATTENTION_BFLOAT16;
  args.batch = 2;
  args.seqlen_q = 300;
  args.seqlen_k = 500;
  args.heads = 8;
  args.heads_kv = 2;
  args.head_dim = 128;
  args.head_dim_v = 128;
  args.softmax_scale = 0.088f;
  args.window_left = -1;
  args.window_right = -1;
  return args;
}

inline void check_refused(const hopper_attention::Status& status, const char* text,
                          hopper_attention_status code) {
  check::context = std::string("\"") + text + "\" in: " + status.message;
  CHECK(status.code == code);
  CHECK(status.message.find(text) != std::string::npos);
}
