// A call of the quantizer that the checks accept, to be changed by tests.
#pragma once

#include <string>

#include "check.h"
#include "quantize/problem.h"

namespace hopper_attention {

struct Call {
  alignas(16) char memory[64] = {};
  hopper_attention_quantize_args args{};

  Call() {
    args.struct_size = sizeof(args);
    args.q = args.k = args.v = args.q_out = args.k_out = args.v_out = args.workspace = memory;
    args.q_descale = args.k_descale = args.v_descale = reinterpret_cast<float*>(memory);
    args.dtype = HOPPER_ATTENTION_BFLOAT16;
    args.batch = 2;
    args.heads = 4;
    args.heads_kv = 2;
    args.seqlen_q = 100;
    args.seqlen_k = 300;
    args.head_dim = args.head_dim_v = 128;
    args.qk_scale = HOPPER_ATTENTION_SCALE_BLOCK;
    args.v_scale = HOPPER_ATTENTION_SCALE_CHANNEL;
    for (auto* strides :
         {&args.q_stride_batch, &args.k_stride_batch, &args.v_stride_batch,
          &args.q_out_stride_batch, &args.k_out_stride_batch, &args.v_out_stride_batch}) {
      strides[0] = 1 << 20, strides[1] = 1 << 10, strides[2] = 128;
    }
  }

  Status status() const {
    Status shape = check_quantize_shape(args);
    return shape.ok() ? check_quantize_tensors(args) : shape;
  }
  bool refused(const char* words) const {
    const Status found = status();
    check::context = std::string("\"") + words + "\" in: " + found.message;
    return found.code == HOPPER_ATTENTION_INVALID_ARGUMENT &&
           found.message.find(words) != std::string::npos;
  }
};

template <class Change>
Call with(Change change) {
  Call call;
  change(call.args);
  return call;
}

}  // namespace hopper_attention
