# Decides whether the CUDA kernels are compiled: sets HOPPER_ATTENTION_HAS_KERNELS and, where it is
# false, HOPPER_ATTENTION_NO_KERNELS_REASON (a sentence that the installed package repeats).
set(HOPPER_ATTENTION_KERNELS AUTO CACHE STRING
  "Compile the CUDA kernels: AUTO (where nvcc is found), ON (or fail), OFF")
set_property(CACHE HOPPER_ATTENTION_KERNELS PROPERTY STRINGS AUTO ON OFF)
set(HOPPER_ATTENTION_OLDEST_CUDA 12.5) # cudaGetDriverEntryPointByVersion

# Sets ${compiler} to nvcc's path, or to an empty string.
function(hopper_attention_find_nvcc compiler)
  if(CMAKE_CUDA_COMPILER)
    set(${compiler} "${CMAKE_CUDA_COMPILER}" PARENT_SCOPE)
    return()
  endif()
  find_program(HOPPER_ATTENTION_NVCC nvcc
    HINTS ENV CUDACXX ENV CUDA_HOME ENV CUDA_PATH PATH_SUFFIXES bin
    PATHS /usr/local/cuda/bin
    DOC "The CUDA compiler")
  if(HOPPER_ATTENTION_NVCC)
    set(${compiler} "${HOPPER_ATTENTION_NVCC}" PARENT_SCOPE)
  else()
    set(${compiler} "" PARENT_SCOPE)
  endif()
endfunction()

# Sets ${reason} to why kernels cannot be compiled here, or to an empty string.
function(hopper_attention_check_nvcc nvcc reason)
  set(${reason} "" PARENT_SCOPE)
  if(NOT nvcc)
    set(${reason} "the CUDA compiler (nvcc) was not found when the package was built" PARENT_SCOPE)
    return()
  endif()
  execute_process(COMMAND "${nvcc}" --version OUTPUT_VARIABLE text ERROR_VARIABLE text
    RESULT_VARIABLE status)
  if(NOT status EQUAL 0 OR NOT text MATCHES "release ([0-9]+\\.[0-9]+)")
    set(${reason} "the CUDA compiler ${nvcc} does not run" PARENT_SCOPE)
  elseif(CMAKE_MATCH_1 VERSION_LESS HOPPER_ATTENTION_OLDEST_CUDA)
    set(${reason} "the CUDA compiler is ${CMAKE_MATCH_1}, older than \
${HOPPER_ATTENTION_OLDEST_CUDA}" PARENT_SCOPE)
  endif()
endfunction()

set(HOPPER_ATTENTION_NO_KERNELS_REASON "")
if(HOPPER_ATTENTION_KERNELS STREQUAL "OFF")
  set(HOPPER_ATTENTION_NO_KERNELS_REASON
    "the package was built without kernels (HOPPER_ATTENTION_KERNELS=OFF)")
elseif(HOPPER_ATTENTION_KERNELS MATCHES "^(AUTO|ON)$")
  hopper_attention_find_nvcc(nvcc)
  hopper_attention_check_nvcc("${nvcc}" HOPPER_ATTENTION_NO_KERNELS_REASON)
  if(HOPPER_ATTENTION_NO_KERNELS_REASON AND HOPPER_ATTENTION_KERNELS STREQUAL "ON")
    message(FATAL_ERROR "HOPPER_ATTENTION_KERNELS is ON, but "
      "${HOPPER_ATTENTION_NO_KERNELS_REASON}. Install CUDA ${HOPPER_ATTENTION_OLDEST_CUDA} or "
      "newer and set CUDACXX to its nvcc.")
  endif()
else()
  message(FATAL_ERROR
    "HOPPER_ATTENTION_KERNELS=${HOPPER_ATTENTION_KERNELS} must be AUTO, ON or OFF")
endif()

if(HOPPER_ATTENTION_NO_KERNELS_REASON)
  set(HOPPER_ATTENTION_HAS_KERNELS FALSE)
  message(STATUS "Kernels: none (${HOPPER_ATTENTION_NO_KERNELS_REASON})")
  if(HOPPER_ATTENTION_PYTHON)
    message(STATUS "Building the CPU part: reference, emulation and command line. To run on a "
      "Hopper card, install CUDA ${HOPPER_ATTENTION_OLDEST_CUDA} or newer and build again.")
  endif()
else()
  set(HOPPER_ATTENTION_HAS_KERNELS TRUE)
  set(CMAKE_CUDA_COMPILER "${nvcc}")
  # sm_90a is given in full to the kernels' target: WGMMA and setmaxnreg exist in no other.
  set(CMAKE_CUDA_ARCHITECTURES OFF)
  enable_language(CUDA)
  # Without its remarks about libraries that are not needed here (cuBLAS and the like).
  set(CMAKE_MESSAGE_LOG_LEVEL NOTICE)
  find_package(CUDAToolkit REQUIRED)
  unset(CMAKE_MESSAGE_LOG_LEVEL)
endif()
