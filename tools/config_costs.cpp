// What configs of the kernels would cost, for `hopper-attention tune`: it asks the headers' own
// rules, so that there is no second copy of them.
//
// Prints a JSON object a line: first {"schedules": [...]}, then config.h's choice for every row of
// hopper/forward/instances.def. Then it reads lines "NAME field=value ..." and prints for each the
// row's choice with these fields changed. "error" is null where the config can be built.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iostream>
#include <sstream>
#include <string>

#include "hopper_attention/budget.h"

namespace {

using namespace hopper_attention;

struct Instance {
  const char* name;
  ForwardKey key;
};

constexpr Instance kInstances[] = {
#define HOPPER_ATTENTION_FORWARD(name, dtype, head_dim, head_dim_v, mask) \
  {#name, {Dtype::dtype, head_dim, head_dim_v, MaskKind::mask}},
#include "forward/instances.def"
#undef HOPPER_ATTENTION_FORWARD
};

// In the enumeration's order.
constexpr const char* kSchedules[] = {"kAfterMaxima", "kAfterHalfRow", "kAfterRow", "kRowByRow"};
static_assert(static_cast<int>(Schedule::kRowByRow) == 3, "kSchedules names every schedule");

std::string show(int value) { return std::to_string(value); }
std::string show(bool value) { return value ? "true" : "false"; }
std::string show(Schedule value) {
  return '"' + std::string(kSchedules[static_cast<int>(value)]) + '"';
}

bool read(const std::string& text, int* value) {
  char* end = nullptr;
  *value = static_cast<int>(std::strtol(text.c_str(), &end, 10));
  return !text.empty() && *end == '\0';
}
bool read(const std::string& text, bool* value) {
  *value = text == "true";
  return *value || text == "false";
}
bool read(const std::string& text, Schedule* value) {
  int index = 0;
  for (const char* name : kSchedules) {
    if (text == name) {
      *value = static_cast<Schedule>(index);
      return true;
    }
    ++index;
  }
  return false;
}

struct Field {
  const char* name;
  std::string (*show)(const ForwardConfig&);
  bool (*read)(const std::string&, ForwardConfig*);
};

// The fields of ForwardConfig that can be chosen.
const Field kFields[] = {
#define FIELD(name)                                                      \
  {#name, [](const ForwardConfig& config) { return show(config.name); }, \
   [](const std::string& text, ForwardConfig* config) { return read(text, &config->name); }}
    FIELD(tile_n),      FIELD(stages),       FIELD(num_consumers),    FIELD(ping_pong),
    FIELD(schedule),    FIELD(skip_rescale), FIELD(overlap_products), FIELD(v_parts),
    FIELD(exp_turns),   FIELD(exp2_by_fma),  FIELD(late_rescale),     FIELD(mask_by_bits),
    FIELD(alpha_first), FIELD(free_first),   FIELD(narrow_first),     FIELD(ahead_first),
    FIELD(cluster),
#undef FIELD
};

void print(const Instance& instance, const ForwardConfig& config) {
  std::string fields;
  for (const Field& field : kFields) {
    fields +=
        std::string(fields.empty() ? "" : ", ") + '"' + field.name + "\": " + field.show(config);
  }
  const char* const error = config_error(config);
  const std::string quoted = error ? '"' + std::string(error) + '"' : "null";
  std::printf(
      "{\"name\": \"%s\", \"dtype\": \"%s\", \"head_dim\": %d, \"head_dim_v\": %d, \"mask\": "
      "\"%s\", \"config\": {%s}, \"error\": %s, \"tile_m\": %d, \"threads\": %d, "
      "\"shared_bytes\": %d, \"fragment_registers\": %d}\n",
      instance.name, name_of(config.key.dtype), config.key.head_dim, config.key.head_dim_v,
      name_of(config.key.mask), fields.c_str(), quoted.c_str(), config.tile_m(),
      num_threads(config), shared_bytes(config), fragment_registers(config));
}

const Instance* find_instance(const std::string& name) {
  for (const Instance& instance : kInstances) {
    if (name == instance.name) return &instance;
  }
  return nullptr;
}

// "field=value" applied to config.
bool assign(const std::string& assignment, ForwardConfig* config) {
  const std::size_t equals = assignment.find('=');
  if (equals == std::string::npos) return false;
  const std::string name = assignment.substr(0, equals);
  for (const Field& field : kFields) {
    if (name == field.name) return field.read(assignment.substr(equals + 1), config);
  }
  return false;
}

bool answer(const std::string& line) {
  std::istringstream words(line);
  std::string word;
  words >> word;
  const Instance* const instance = find_instance(word);
  if (instance == nullptr) {
    std::fprintf(stderr, "config_costs: no row of instances.def is named %s\n", word.c_str());
    return false;
  }
  ForwardConfig config = make_forward_config(instance->key);
  while (words >> word) {
    if (!assign(word, &config)) {
      std::fprintf(stderr, "config_costs: cannot read %s\n", word.c_str());
      return false;
    }
  }
  print(*instance, config);
  return true;
}

}  // namespace

int main() {
  std::string schedules;
  for (const char* name : kSchedules) {
    schedules += std::string(schedules.empty() ? "\"" : ", \"") + name + '"';
  }
  std::printf("{\"schedules\": [%s]}\n", schedules.c_str());
  for (const Instance& row : kInstances) print(row, make_forward_config(row.key));
  for (std::string line; std::getline(std::cin, line);) {
    if (!answer(line)) return 1;
  }
  return 0;
}
