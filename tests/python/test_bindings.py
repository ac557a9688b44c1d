"""The compiled module `_C`, as far as it goes without a device."""

import gc
import re

import pytest

from hopper_attention import _library

pytestmark = pytest.mark.skipif(
    not _library.is_compiled(), reason="the compiled library is not installed"
)

STRIDES = (64 * 2 * 64, 2 * 64, 64)


def arguments(heads_kv=2, head_dim_v=64):
    return (
        *(1, 1, 64, 64, 2, heads_kv, 64, head_dim_v),
        *(STRIDES, STRIDES, STRIDES, STRIDES),
        *(0.125, 0.0, True, -1, 0, 0),
    )


def test_a_prepared_call_takes_eight_addresses():
    call = _library.load().prepare(*arguments())
    with pytest.raises(TypeError, match="takes 8 addresses, got 6"):
        call(*range(6))
    with pytest.raises(TypeError, match="integer"):
        call(16, 16, 16, 16, 16, 16, 0, "0")
    for address in (-1, 2**64):
        with pytest.raises(OverflowError):
            call(16, 16, 16, 16, 16, 16, 0, address)


def test_a_prepared_call_raises_what_the_library_says():
    library = _library.load()
    wrong = library.prepare(*arguments(heads_kv=3))
    unsupported = library.prepare(*arguments(head_dim_v=136))
    gc.collect()
    for _ in range(2):
        with pytest.raises(ValueError, match="heads_kv is 3, which does not divide heads is 2"):
            wrong(*[16] * 8)
        with pytest.raises(NotImplementedError, match="head_dim is 64 with head_dim_v is 136"):
            unsupported(*[16] * 8)


def backward_arguments(heads_kv=2, dtype=1):
    return (*(dtype, 1, 64, 64, 2, heads_kv, 64, 64), (STRIDES,) * 8, 0.125, 0.0, True, -1, 0, True)


def test_a_prepared_backward_call_takes_fourteen_addresses():
    call, workspace_bytes = _library.load().prepare_backward(*backward_arguments())
    assert workspace_bytes >= 2 * 64 * (64 + 2) * 4
    with pytest.raises(TypeError, match="takes 14 addresses, got 7"):
        call(*range(7))
    with pytest.raises(OverflowError):
        call(*[16] * 13, -1)


def test_a_prepared_backward_call_of_a_packed_batch_takes_sixteen_addresses():
    arguments = (1, 3, 64, 64, 2, 2, 64, 64, (STRIDES[1:],) * 8, 0.125, 0.0, True, -1, 0, False)
    call, workspace_bytes = _library.load().prepare_varlen_backward(*arguments)
    assert workspace_bytes >= 2 * (64 + 3 * 128) * (64 + 2) * 4  # a tile for each sequence
    with pytest.raises(TypeError, match="takes 16 addresses, got 14"):
        call(*range(14))
    with pytest.raises(OverflowError):
        call(*[16] * 15, -1)


def test_prepare_backward_raises_what_the_library_says():
    with pytest.raises(ValueError, match="heads_kv is 3, which does not divide heads is 2"):
        _library.load().prepare_backward(*backward_arguments(heads_kv=3))
    with pytest.raises(ValueError, match="dtype is 2; allowed are 0"):
        _library.load().prepare_backward(*backward_arguments(dtype=2))


def varlen_arguments(heads_kv=2, dtype=1):
    sizes = (3, 64, 64, 2, heads_kv, 64, 64)
    return (dtype, *sizes, *[STRIDES[1:]] * 4, 0.125, 0.0, True, -1, 0, 0)


def test_a_prepared_call_of_a_packed_batch_takes_eleven_addresses():
    call, workspace_bytes = _library.load().prepare_varlen(*varlen_arguments())
    assert workspace_bytes >= 4 * 32
    with pytest.raises(TypeError, match="takes 11 addresses, got 7"):
        call(*range(7))
    with pytest.raises(OverflowError):
        call(*[16] * 10, -1)


def test_a_packed_batch_raises_what_the_library_says():
    library = _library.load()
    with pytest.raises(ValueError, match="heads_kv is 3, which does not divide heads is 2"):
        library.explain_varlen(*varlen_arguments(heads_kv=3))
    with pytest.raises(NotImplementedError, match="packed batches are float16 or bfloat16"):
        library.prepare_varlen(*varlen_arguments(dtype=2))[0](*[16] * 11)
    assert '"instance": "bf16_d64_packed"' in library.explain_varlen(*varlen_arguments())


def test_instances_of_both_passes_are_listed():
    names = _library.load().instances()
    assert names
    assert len(set(names)) == len(names)
    masks = "full|masked|packed|capped|short"
    kinds = re.compile(rf"(backward_)?(fp16|bf16|e4m3|e4m3fast)_d\d+(x\d+)?_({masks})")
    assert [name for name in names if not kinds.fullmatch(name)] == []


def test_prepare_refuses_what_the_struct_cannot_hold():
    with pytest.raises(TypeError):
        _library.load().prepare(*arguments()[:-1])
    with pytest.raises(TypeError):
        _library.load().prepare(*arguments()[:-1], 2**40)


# a contiguous problem of one head of 64 tokens and 64 channels
FP8_LONGS = (*STRIDES * 4, *(0,) * 9)


def fp8_ints(heads_kv=2):
    return (1, 64, 64, 2, heads_kv, 64, 64, True, -1, 0, 0, 1, 0, 0, 0, 0, 0)


def test_a_prepared_call_of_e4m3_takes_twelve_addresses():
    call = _library.load().prepare_fp8(FP8_LONGS, fp8_ints(), 0.125, 0.0)
    with pytest.raises(TypeError, match="takes 12 addresses, got 8"):
        call(*range(8))
    with pytest.raises(OverflowError):
        call(*[16] * 11, -1)
    wrong = _library.load().prepare_fp8(FP8_LONGS, fp8_ints(heads_kv=3), 0.125, 0.0)
    with pytest.raises(ValueError, match="heads_kv is 3, which does not divide heads is 2"):
        wrong(*[16] * 12)


def test_a_prepared_quantizer_takes_seventeen_addresses():
    def prepare(packed, dtype):
        ints = (dtype, 3, 64, 64, 2, 2, 64, 64, 2, 4, 1, 0, 1, 0, 0, 0, 0)
        return _library.load().prepare_quantize(packed, (*STRIDES * 6, 0, 0), ints, (0,) * 8)

    call, dense_bytes = prepare(False, 1)
    assert dense_bytes > 0
    assert prepare(True, 1)[1] > 0
    with pytest.raises(TypeError, match="takes 17 addresses, got 12"):
        call(*range(12))
    with pytest.raises(OverflowError):
        call(*[16] * 16, -1)
    wrong, no_bytes = prepare(False, 2)
    assert no_bytes == 0
    for _ in range(2):
        with pytest.raises(ValueError, match="dtype is 2; allowed are 0 to 1"):
            wrong(*[16] * 17)
