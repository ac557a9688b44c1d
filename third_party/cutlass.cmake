# Finds the CUTLASS headers (CuTe included) and defines hopper_attention::cutlass.
#
# -DHOPPER_ATTENTION_CUTLASS_DIR=DIR names a CUTLASS source tree. Without it the headers come from
# the PyPI package nvidia-cutlass, a build requirement of this project.
set(HOPPER_ATTENTION_CUTLASS_DIR "" CACHE PATH
  "CUTLASS source tree (the folder above include/cute); empty: the nvidia-cutlass package's")

function(hopper_attention_find_cutlass)
  set(root "${HOPPER_ATTENTION_CUTLASS_DIR}")
  if(NOT root)
    # The package is located, never imported: its __init__ pulls in SciPy, cuda-python and more.
    execute_process(
      COMMAND "${Python_EXECUTABLE}" -c
        "import importlib.util as u; s = u.find_spec('cutlass_library'); \
print(s.submodule_search_locations[0] if s else '')"
      OUTPUT_VARIABLE package OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)
    if(NOT package)
      message(FATAL_ERROR
        "CUTLASS not found. Install its headers with `pip install --no-deps "
        "nvidia-cutlass==4.2.0.0` for ${Python_EXECUTABLE}, or name a CUTLASS 4.2 source tree "
        "with -DHOPPER_ATTENTION_CUTLASS_DIR=DIR.")
    endif()
    set(root "${package}/source")
  endif()
  if(NOT EXISTS "${root}/include/cute/tensor.hpp")
    message(FATAL_ERROR "CUTLASS: ${root}/include/cute/tensor.hpp does not exist. "
      "HOPPER_ATTENTION_CUTLASS_DIR must be the folder that holds include/cute.")
  endif()
  message(STATUS "CUTLASS headers: ${root}/include")
  add_library(hopper_attention_cutlass INTERFACE)
  # SYSTEM: its warnings are not ours to mend.
  target_include_directories(hopper_attention_cutlass SYSTEM INTERFACE "${root}/include")
  add_library(hopper_attention::cutlass ALIAS hopper_attention_cutlass)
endfunction()

hopper_attention_find_cutlass()
