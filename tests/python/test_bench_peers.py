"""How the peers are found and called, and how the device's clock works, against stand-ins."""

import ctypes
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from hopper_attention import reference
from hopper_attention.bench import accuracy, contestants, runner, timing
from hopper_attention.bench.contestants import Fa3, UnavailableError
from hopper_attention.bench.shapes import Shape

# FlashAttention-3's operator, whose arguments after v have defaults
SCHEMA = (
    "fwd(Tensor q, Tensor k, Tensor v, float? softmax_scale = None, bool is_causal = False, "
    "int window_size_left = -1, int window_size_right = -1, float softcap = 0.0, "
    "int num_splits = 0) -> (Tensor, Tensor, Tensor, Tensor)"
)


def fa3_forward(q, k, v, scale=None, is_causal=False, left=-1, right=-1, softcap=0.0, splits=0):
    assert scale == q.shape[-1] ** -0.5
    assert splits == 1
    out, lse = reference.attention(
        q, k, v, causal=is_causal, window_size=(left, right), softcap=softcap
    )
    return out.to(q.dtype), lse.float(), q.new_empty(0), q.new_empty(0)


@pytest.fixture
def loaded(monkeypatch, tmp_path):
    """A folder with fa3.so and libcudart.so.12, and the log of what is loaded."""
    log = []
    fragments = []

    def load_library(path):
        log.append(("torch", Path(path).name))
        library = torch.library.Library("flash_attn_3", "DEF")
        library.define(SCHEMA)
        library.impl("fwd", fa3_forward, "CPU")
        fragments.append(library)

    def load_shared(path, mode):
        log.append(("ctypes", Path(path).name, mode))

    monkeypatch.setattr(torch.ops, "load_library", load_library)
    monkeypatch.setattr(contestants.ctypes, "CDLL", load_shared)
    monkeypatch.delenv("FA3_SO", raising=False)
    (tmp_path / "fa3.so").touch()
    (tmp_path / "libcudart.so.12").touch()
    yield SimpleNamespace(folder=tmp_path, log=log)
    for library in fragments:
        library._destroy()


@pytest.mark.parametrize("by_variable", [False, True])
def test_fa3_is_loaded_after_its_runtime(loaded, monkeypatch, by_variable):
    if by_variable:
        monkeypatch.setenv("FA3_SO", str(loaded.folder / "fa3.so"))
    where = contestants.load_fa3(None if by_variable else loaded.folder)
    assert where == str((loaded.folder / "fa3.so").resolve())
    assert loaded.log == [
        ("ctypes", "libcudart.so.12", ctypes.RTLD_GLOBAL),
        ("torch", "fa3.so"),
    ]


@pytest.mark.parametrize(
    "causal, window", [(False, (-1, -1)), (True, (-1, -1)), (True, (5, 0)), (False, (5, 2))]
)
def test_fa3_is_called_as_the_shape_says(loaded, causal, window):
    shape = Shape("float16", 32, 16, 1, 24, 24, 4, 2, causal, window)
    inputs = runner.make_inputs(shape, "cpu")
    bound = Fa3(loaded.folder).bind(shape, *inputs)
    errors = accuracy.compare(bound.to_bshd(bound.run()), accuracy.expect(shape, *inputs))
    assert errors.rmse < 1e-3


def test_a_missing_fa3_is_explained(loaded, monkeypatch):
    (loaded.folder / "fa3.so").rename(loaded.folder / "fa3.so.xz")
    with pytest.raises(UnavailableError, match=r"unpack it: xz -dk .*fa3\.so\.xz"):
        contestants.load_fa3(loaded.folder)
    with pytest.raises(UnavailableError, match=r"is missing: put fa3\.so"):
        contestants.load_fa3(loaded.folder / "nowhere")
    monkeypatch.setenv("FA3_SO", str(loaded.folder / "other.so"))
    with pytest.raises(UnavailableError, match=r"other\.so is missing"):
        contestants.load_fa3()


def test_a_library_that_does_not_load_is_explained(loaded, monkeypatch):
    def refuse(path):
        raise OSError("undefined symbol: x")

    monkeypatch.setattr(torch.ops, "load_library", refuse)
    with pytest.raises(UnavailableError, match="does not load: undefined symbol: x"):
        contestants.load_fa3(loaded.folder)


def test_gathering_says_who_is_missing(loaded, monkeypatch):
    monkeypatch.setattr("hopper_attention.unavailable_reason", lambda: "no kernels here")
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    found, missing = contestants.gather(peers_dir=loaded.folder)
    assert [one.name for one in found] == ["fa3", "cudnn", "fa2"]
    assert missing == {"hopper_attention": "no kernels here"}
    found, missing = contestants.gather(peers=False)
    assert not found
    found, missing = contestants.gather(peers_dir=loaded.folder, names=["fa2", "fa9"])
    assert [one.name for one in found] == ["fa2"]
    assert missing == {"fa9": "no such contestant"}


@pytest.fixture
def fake_cuda(monkeypatch):
    """CUDA's events over a counter that each call moves on."""
    state = SimpleNamespace(now=0.0, pending=[], log=[])

    class Event:
        def __init__(self, enable_timing=False):
            assert enable_timing

        def record(self):
            state.log.append("event")
            self.time = state.now

        def elapsed_time(self, end):
            assert state.log[-1] == "synchronize"
            return end.time - self.time

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: state.log.append("synchronize"))
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: state.log.append("sleep"))
    return state


def test_the_devices_clock_times_each_call_behind_a_full_queue(fake_cuda):
    durations = iter([100.0, 1.0, 2.0, 3.0])

    def run():
        fake_cuda.log.append("call")
        fake_cuda.now += next(durations)

    assert timing.CudaClock().batch(run, 3) == [1.0, 2.0, 3.0]
    assert fake_cuda.log == [
        *["sleep", "call", "event"],
        *["call", "event"] * 3,
        "synchronize",
    ]


def test_the_hosts_clock_does_not_wait_between_calls(fake_cuda):
    times = timing.HostClock(calls=50).batch(lambda: fake_cuda.log.append("call"), 3)
    series = ["synchronize"] + ["call"] * 50
    assert fake_cuda.log == ["call"] * 50 + series * 3 + ["synchronize"]  # the first is not timed
    assert len(times) == 3
    assert all(0 < ms < 10 for ms in times)


def test_ceilings_are_medians_over_all_measurements(monkeypatch):
    monkeypatch.setattr(timing, "_MATMUL_SIZE", 64)
    monkeypatch.setattr(timing, "_COPY_BYTES", 1 << 12)
    times = iter([[x] * n for x, n in ((1, 5), (4, 5), (2, 5), (1.5, 6), (8, 6), (1, 6))])

    class Clock:
        def batch(self, run, count):
            run()
            return next(times)

        def synchronize(self):
            pass

    ceilings = timing.Ceilings(Clock(), device="cpu")
    assert ceilings.result() == {}
    ceilings.measure()
    ceilings.measure()
    found = ceilings.result()
    assert found["matmul_bf16_tflops"] == round(2 * 64**3 / 1.5e-3 / 1e12, 1)
    assert found["matmul_fp16_tflops"] == round(2 * 64**3 / 8e-3 / 1e12, 1)
    assert found["copy_gbps"] == round(2 * 4096 / 1e-3 / 1e9, 1)
