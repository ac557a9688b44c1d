"""The tables of calls that the package keeps, for tests that must begin without any."""

import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import torch

from hopper_attention import (
    _calls,
    _eager,
    attention_fp8,
    fp8,
    interface,
    ops,
    ops_backward,
    ops_fp8,
    ops_quantize,
    ops_varlen,
    ops_varlen_backward,
    varlen,
)

ROOT = Path(__file__).parents[2]
HEADER = Path(sysconfig.get_path("include"), "Python.h")
EXCHANGE = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
SOURCES = ("calls", "request", "eager")
# Why tables cannot be tested here, or None.
UNAVAILABLE = (
    "PyTorch has no exchange interface before 2.10"
    if EXCHANGE is None
    else "needs g++ and Python's headers"
    if shutil.which("g++") is None or not HEADER.exists()
    else None
)


def eager_calls():
    """Of the public functions."""
    # a function of the package hides the module of this name
    quantize = sys.modules["hopper_attention.quantize"]
    modules = (interface, varlen, fp8, quantize)
    return [*(module._eager for module in modules), attention_fp8._of_quantized]


def tables():
    kinds = ops_backward._DENSE, ops_backward._WITH_SINK, ops_varlen_backward._PACKED
    modules = ops, ops_varlen, ops_fp8, ops_quantize, attention_fp8
    return [
        *(module._calls for module in modules),
        *(kind.calls for kind in kinds),
        *(calls.table for calls in eager_calls()),
    ]


def empty(monkeypatch):
    """Every table without calls, and without a library."""
    for table in tables():
        for name, value in (("call", _calls._unknown), ("known", _calls._unknown)):
            monkeypatch.setattr(table, name, value)
        monkeypatch.setattr(table, "_remember", None)
    for calls in eager_calls():
        monkeypatch.setattr(calls, "call", _eager._not_yet)


def serve_the_cpu(monkeypatch):
    """Has the tables that will be made take tensors of the CPU, whose index DLPack says is 0."""
    for table in tables():
        monkeypatch.setattr(table, "_memory", lambda: (ops._empty, lambda: 0, ops._workspace))


def compile_module(folder):
    """The module of calls_module.cpp."""
    path = folder / f"calls_module{sysconfig.get_config_var('EXT_SUFFIX')}"
    sources = [ROOT / f"python/bindings_{name}.cpp" for name in SOURCES]
    sources.append(ROOT / "tests/python/calls_module.cpp")
    include = f"-I{ROOT / 'python'}", f"-I{HEADER.parent}"
    flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    subprocess.run(["g++", *flags, *include, *sources, "-o", path], check=True)
    return path
