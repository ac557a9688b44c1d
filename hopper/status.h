// Status codes inside the library: a code and the sentence that hopper_attention_last_error gives.
#pragma once

#include <string>
#include <utility>

#include "hopper_attention/abi.h"

namespace hopper_attention {

struct Status {
  hopper_attention_status code = HOPPER_ATTENTION_OK;
  std::string message;

  bool ok() const { return code == HOPPER_ATTENTION_OK; }
  static Status invalid(std::string message) {
    return {HOPPER_ATTENTION_INVALID_ARGUMENT, std::move(message)};
  }
};

}  // namespace hopper_attention
