# Turns the rows of an instances.def into .cu files, one for each head dimension and element size.
#
# A row is a line of the form
#   HOPPER_ATTENTION_FORWARD(bf16_d128_full, kBfloat16, 128, 128, kFull)
# and goes into <build>/instances/forward_16bit_d128.cu. Eight rows in a file compile in 54 s where
# one takes 39 s: what takes the time is reading CUTLASS, and templates that the rows share. An
# instance has its row's name, after "backward_" where it is in the backward pass's table:
# backward_bf16_d128_full. Those whose name does not match HOPPER_ATTENTION_INSTANCES are left out.
set(HOPPER_ATTENTION_INSTANCES ".*" CACHE STRING
  "Regular expression on instance names; only the matching ones are compiled")

# Writes a file only where its text differs, so that nothing is compiled again in vain.
function(hopper_attention_write path text)
  set(old "")
  if(EXISTS "${path}")
    file(READ "${path}" old)
  endif()
  if(NOT old STREQUAL text)
    file(WRITE "${path}" "${text}")
  endif()
endfunction()

# pass is a folder of hopper/, in lower case: forward. prefix is what instances' names have before
# the row's. Writes the kept rows to ${kept_table}, which the dispatcher reads, and sets ${sources}
# to the generated files, ${all_names} to the names of all rows.
function(hopper_attention_generate_instances pass prefix kept_table sources all_names)
  set(table "${PROJECT_SOURCE_DIR}/hopper/${pass}/instances.def")
  set(folder "${PROJECT_BINARY_DIR}/instances")
  string(TOUPPER "${pass}" upper)
  set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS "${table}")

  file(STRINGS "${table}" rows REGEX "^[ \t]*HOPPER_ATTENTION_${upper}\\(")
  set(kept "")
  set(generated "")
  set(names "")
  set(units "")
  set(count 0)
  foreach(row IN LISTS rows)
    if(NOT row MATCHES "^HOPPER_ATTENTION_${upper}\\(([a-z0-9_]+), ([A-Za-z0-9_, ]+)\\)$")
      message(FATAL_ERROR "${table}: cannot read this row, which must be "
        "HOPPER_ATTENTION_${upper}(name, ...) on a line of its own:\n  ${row}")
    endif()
    set(name "${CMAKE_MATCH_1}")
    set(fields "${CMAKE_MATCH_2}")
    if(name IN_LIST names)
      message(FATAL_ERROR "${table}: the name ${name} is there twice")
    endif()
    list(APPEND names "${name}")
    if(NOT "${prefix}${name}" MATCHES "${HOPPER_ATTENTION_INSTANCES}")
      continue()
    endif()
    string(REGEX MATCH "_d[0-9x]+" dims "${name}")
    set(bits 16)
    if(fields MATCHES "E4M3")
      set(bits 8)
    endif()
    set(unit "${pass}_${bits}bit${dims}")
    list(APPEND units "${unit}")
    string(APPEND ${unit}_rows "HOPPER_ATTENTION_DEFINE_${upper}(${name}, ${fields})\n")
    string(APPEND kept "${row}\n")
    math(EXPR count "${count} + 1")
  endforeach()

  list(REMOVE_DUPLICATES units)
  foreach(unit IN LISTS units)
    set(file "${folder}/${unit}.cu")
    hopper_attention_write("${file}" "// Generated from hopper/${pass}/instances.def.
#include \"${pass}/instance.cuh\"

${${unit}_rows}")
    list(APPEND generated "${file}")
  endforeach()

  list(LENGTH names total)
  message(STATUS "Kernels: ${count} of ${total} ${pass} instances")
  hopper_attention_write("${folder}/${kept_table}"
    "// Generated: the rows that this build compiles.\n${kept}")
  list(TRANSFORM names PREPEND "${prefix}")
  set(${sources} "${generated}" PARENT_SCOPE)
  set(${all_names} "${names}" PARENT_SCOPE)
endfunction()
