"""Attention's gradient by formulas, for libraries that stand in for the compiled one."""

import ctypes

import torch

from hopper_attention import reference


def at(address, shape, strides, dtype):
    """The tensor of this shape at an address."""
    if 0 in shape:
        return torch.empty(shape, dtype=dtype)
    extent = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    size = torch.empty((), dtype=dtype).element_size()
    memory = (ctypes.c_char * (extent * size)).from_address(address)
    return torch.frombuffer(memory, dtype=dtype).as_strided(shape, strides)


def formulas(q, k, v, out, dout, lse, dlse, call):
    """dq, dk and dv in float64, by ops_backward.py's formulas."""
    heads_kv = k.shape[2]
    group = q.shape[2] // max(1, heads_kv)
    q, k, v, out, dout = (x.double().transpose(1, 2) for x in (q, k, v, out, dout))
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    scores = call["softmax_scale"] * q @ k.transpose(2, 3)
    slope = torch.ones_like(scores)
    if call["softcap"]:
        scores = call["softcap"] * torch.tanh(scores / call["softcap"])
        slope = 1 - (scores / call["softcap"]) ** 2
    positions = torch.arange(q.shape[2]) + k.shape[2] - q.shape[2]
    window = (call["window_left"], call["window_right"])
    seen = reference.visible(positions, k.shape[2], *window)
    p = torch.where(seen, torch.exp(scores - lse.double()[..., None]), 0.0)
    delta = (dout * out).sum(3) - (0 if dlse is None else dlse.double())
    ds = p * (dout @ v.transpose(2, 3) - delta[..., None]) * slope * call["softmax_scale"]

    def of_group(x):
        return x.unflatten(1, (heads_kv, group)).sum(2).transpose(1, 2)

    return (
        (ds @ k).transpose(1, 2),
        of_group(ds.transpose(2, 3) @ q),
        of_group(p.transpose(2, 3) @ dout),
    )
