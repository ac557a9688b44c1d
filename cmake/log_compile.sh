#!/bin/sh
# Compiler launcher: log_compile.sh LOG_DIR COMPILER ARGUMENT...
# Keeps all that the compiler prints (ptxas -v: registers, stack, spills) in LOG_DIR, for
# tests/python/test_build_log.py: hopper/forward/problem.cpp's in forward_problem.cpp.log. Passes on
# everything but ptxas's statistics.
log_dir=$1
shift
name=unnamed
for argument in "$@"; do
  case $argument in
    *.cu | *.cpp)
      name=${argument##*/hopper/}
      name=${name##*/instances/}
      name=${name##*/python/}
      name=$(echo "$name" | tr / _)
      ;;
  esac
done
mkdir -p "$log_dir"
log=$log_dir/$name.log
"$@" >"$log" 2>&1
status=$?
if [ "$status" -ne 0 ]; then
  cat "$log" >&2
  # A log stands for a kernel that was built.
  rm -f "$log"
  exit "$status"
fi
awk '/\(C[0-9]+\)|[Ww]arning|[Aa]dvisory|Performance Loss/ { print; next }
     /^ptxas info/ || /bytes stack frame/ { next }
     { print }' "$log" >&2
