"""The tables of calls that the package keeps, for tests that must begin without any."""

import importlib.util
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
STREAM = 4711  # that of the libraries that stand in
FUNCTIONS = ("call_table", "eager_calls", "eager_backward", "eager_forward")
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
    """Compiles and loads calls_module.cpp."""
    path = folder / f"calls_module{sysconfig.get_config_var('EXT_SUFFIX')}"
    sources = [ROOT / f"python/bindings_{name}.cpp" for name in SOURCES]
    sources.append(ROOT / "tests/python/calls_module.cpp")
    include = f"-I{ROOT / 'python'}", f"-I{HEADER.parent}"
    flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    subprocess.run(["g++", *flags, *include, *sources, "-o", path], check=True)
    spec = importlib.util.spec_from_file_location("calls_module", path)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def prepare_compiled(monkeypatch, module, fake, name):
    """Has a library that stands in prepare calls as the compiled one does."""
    prepare = getattr(fake, name)

    def prepared(*arguments):
        run = prepare(*arguments)
        run, *rest = run if isinstance(run, tuple) else (run,)
        made = module.prepared(lambda *addresses: run(*at_stream(addresses)), len(order(name)))
        return (made, *rest) if rest else made

    def at_stream(addresses):
        stream = order(name).index("stream")
        return (*addresses[:stream], STREAM, *addresses[stream + 1 :])

    monkeypatch.setattr(fake, name, prepared)
    for function in FUNCTIONS:
        monkeypatch.setattr(fake, function, getattr(module, function), raising=False)


def order(name):
    statistics = ("dlse", "dq", "dk", "dv", "workspace", "stream")
    backward = ("q", "k", "v", "out", "dout", "lse", *statistics)
    return {
        "prepare": (*"qkv", "out", "lse", "workspace", "stream", "sink"),
        "prepare_backward": (*backward, "sink", "dsink"),
        "prepare_varlen": (*"qkv", *[""] * 4, "out", "lse", "workspace", "stream"),
        "prepare_varlen_backward": (*backward, *[""] * 4),
        "prepare_fp8": (*"qkv", *[""] * 4, "out", "lse", "workspace", "stream", "sink"),
        "prepare_quantize": (*"qkv", *[""] * 12, "workspace", "stream"),
    }[name]
