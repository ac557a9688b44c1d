# libhopper_attention.so: the C interface and the kernels.
include(cmake/instances.cmake)
include(third_party/cutlass.cmake)

# Keeps what the compilers print about a target in <build>/logs.
function(hopper_attention_log_compile target)
  set(log "${PROJECT_SOURCE_DIR}/cmake/log_compile.sh" "${PROJECT_BINARY_DIR}/logs")
  foreach(language CXX CUDA)
    set(launcher ${log} ${CMAKE_${language}_COMPILER_LAUNCHER})
    set_target_properties(${target} PROPERTIES ${language}_COMPILER_LAUNCHER "${launcher}")
  endforeach()
endfunction()

hopper_attention_generate_instances(
  forward "" compiled_instances.def forward_instances forward_names)
hopper_attention_generate_instances(
  backward "backward_" compiled_backward_instances.def backward_instances backward_names)
if(NOT forward_instances AND NOT backward_instances)
  message(FATAL_ERROR
    "No instance has a name that matches HOPPER_ATTENTION_INSTANCES="
    "${HOPPER_ATTENTION_INSTANCES}. The names are: ${forward_names};${backward_names}")
endif()

file(GLOB_RECURSE hopper_attention_sources CONFIGURE_DEPENDS
  "${PROJECT_SOURCE_DIR}/hopper/*.cpp" "${PROJECT_SOURCE_DIR}/hopper/*.cu")

add_library(hopper_attention SHARED ${hopper_attention_sources}
  ${forward_instances} ${backward_instances})
target_include_directories(hopper_attention
  PUBLIC include
  PRIVATE hopper "${PROJECT_BINARY_DIR}/instances")
target_compile_features(hopper_attention PUBLIC cxx_std_17)
target_compile_definitions(hopper_attention PRIVATE
  CUTE_SM90_EXTENDED_MMA_SHAPES_ENABLED
  # Not for the kernels, which a new version need not compile again.
  $<$<COMPILE_LANGUAGE:CXX>:HOPPER_ATTENTION_VERSION="${PROJECT_VERSION}">)
target_compile_options(hopper_attention PRIVATE
  $<$<COMPILE_LANGUAGE:CXX>:-Wall -Wextra>
  $<$<COMPILE_LANGUAGE:CUDA>:
    "SHELL:-gencode arch=compute_90a,code=sm_90a"
    --expt-relaxed-constexpr --use_fast_math "SHELL:-Xptxas -v"
    -Xcompiler=-Wall,-Wextra>)
# The quantizer's roundings are defined to the bit: IEEE arithmetic, subnormals and all.
set_source_files_properties(
  "${PROJECT_SOURCE_DIR}/hopper/quantize/launch.cu"
  "${PROJECT_SOURCE_DIR}/hopper/quantize/prepare.cu" PROPERTIES
  COMPILE_OPTIONS "--ftz=false;--prec-div=true;--fmad=false")
# NDEBUG in every configuration: with CUTLASS's device assertions the kernels are far slower.
target_compile_definitions(hopper_attention PRIVATE NDEBUG)
set_target_properties(hopper_attention PROPERTIES
  CXX_VISIBILITY_PRESET hidden
  CUDA_VISIBILITY_PRESET hidden
  CUDA_STANDARD 17
  CUDA_STANDARD_REQUIRED ON
  CUDA_RUNTIME_LIBRARY Static
  # Several kernels at once need memory: ninja takes as many as have 4 GiB each.
  JOB_POOL_COMPILE kernels)
target_link_libraries(hopper_attention PRIVATE hopper_attention::cutlass CUDA::cudart_static)
# no-undefined: nothing of libcuda or libtorch may creep in. exclude-libs: cudart's symbols stay
# private, so that ours and PyTorch's do not meet.
target_link_options(hopper_attention PRIVATE
  -Wl,--no-undefined -Wl,--exclude-libs,ALL -Wl,--as-needed)

hopper_attention_log_compile(hopper_attention)

cmake_host_system_information(RESULT cores QUERY NUMBER_OF_LOGICAL_CORES)
cmake_host_system_information(RESULT memory QUERY TOTAL_PHYSICAL_MEMORY) # MiB
math(EXPR kernel_jobs "${memory} / 4096")
if(kernel_jobs GREATER cores)
  set(kernel_jobs "${cores}")
elseif(kernel_jobs LESS 1)
  set(kernel_jobs 1)
endif()
set_property(GLOBAL APPEND PROPERTY JOB_POOLS kernels=${kernel_jobs})
