"""The implementations that the suites time: this package and its peers.

A contestant binds a problem's tensors into a call without arguments, so that what is timed is the
call alone. To add one, write its class and put it into `gather`.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, Protocol, TypeVar, cast

import torch
from torch import Tensor

from hopper_attention.bench.shapes import Shape

OURS = "hopper_attention"
PEERS = ("fa3", "cudnn", "fa2")

FA3_VARIABLE = "FA3_SO"
_FA3_HELP = (
    f"put fa3.so (the operator library of a FlashAttention-3 build, such as "
    f"xformers/flash_attn_3/_C.so of the xformers 0.0.34 wheel) into --peers-dir, "
    f"or name it in {FA3_VARIABLE}"
)


class UnavailableError(Exception):
    """A contestant cannot take part, or not in this shape; the message says why."""


@dataclass(frozen=True)
class Bound:
    """A call with its tensors.

    Attributes:
        run: Makes the call; returns what the implementation returns for the output.
        to_bshd: Views that output as (batch, seqlen_q, heads, head_dim_v).
        stands_for: Where the call is of e4m3 tensors, what q, k and v they stand for: the output is
            held against attention of these. None: against that of the tensors given to `bind`.
        out_dtype: What the output is rounded to; None is its dtype.
    """

    run: Callable[[], Tensor]
    to_bshd: Callable[[Tensor], Tensor]
    stands_for: Callable[[], tuple[Tensor, Tensor, Tensor]] | None = None
    out_dtype: torch.dtype | None = None


class Contestant(Protocol):
    """An implementation of attention."""

    name: str

    def context(self) -> contextlib.AbstractContextManager[Any]:
        """Makes what surrounds a series of calls, outside of the timed region."""

    def bind(self, shape: Shape, q: Tensor, k: Tensor, v: Tensor) -> Bound:
        """Prepares a call.

        Args:
            shape: The problem.
            q: (batch, seqlen_q, heads, head_dim)
            k: (batch, seqlen_k, heads_kv, head_dim)
            v: (batch, seqlen_k, heads_kv, head_dim_v)

        Raises:
            UnavailableError: The implementation does not do this problem.
        """


def _same(out: Tensor) -> Tensor:
    return out


def _heads_first(out: Tensor) -> Tensor:
    return out.transpose(1, 2)


class Ours:
    """This package's `flash_attn_func`."""

    name = OURS

    def __init__(self) -> None:
        import hopper_attention

        require_kernels()
        self._call = hopper_attention.flash_attn_func

    def context(self) -> contextlib.AbstractContextManager[Any]:
        """Needs nothing around its calls."""
        return contextlib.nullcontext()

    def bind(self, shape: Shape, q: Tensor, k: Tensor, v: Tensor) -> Bound:
        """Prepares a call; see `Contestant.bind`."""
        call, causal, window = self._call, shape.causal, shape.window

        def run() -> Tensor:
            # without return_attn_probs it is the output alone
            return cast(Tensor, call(q, k, v, causal=causal, window_size=window))

        return Bound(run, _same)


class Fa3:
    """FlashAttention-3's operator, ``torch.ops.flash_attn_3.fwd``."""

    name = "fa3"

    def __init__(self, peers_dir: Path | None = None) -> None:
        load_fa3(peers_dir)
        self._call = torch.ops.flash_attn_3.fwd

    def context(self) -> contextlib.AbstractContextManager[Any]:
        """Needs nothing around its calls."""
        return contextlib.nullcontext()

    def bind(self, shape: Shape, q: Tensor, k: Tensor, v: Tensor) -> Bound:
        """Prepares a call; see `Contestant.bind`."""
        call = self._call
        keywords: dict[str, Any] = {
            "softmax_scale": shape.head_dim**-0.5,
            "is_causal": shape.causal,
            "num_splits": 1,
        }
        if shape.window != (-1, -1):
            keywords["window_size_left"] = shape.window[0]
            keywords["window_size_right"] = 0 if shape.causal else shape.window[1]

        def run() -> Tensor:
            out: Tensor = call(q, k, v, **keywords)[0]
            return out

        return Bound(run, _same)


class Sdpa:
    """A backend of ``torch.nn.functional.scaled_dot_product_attention``.

    The choice of the backend, a context manager, stays outside of the timed calls.
    """

    def __init__(self, name: str, backend: Any) -> None:
        self.name = name
        self._backend = backend

    def context(self) -> contextlib.AbstractContextManager[Any]:
        """Selects the backend."""
        from torch.nn.attention import sdpa_kernel

        selected: contextlib.AbstractContextManager[Any] = sdpa_kernel(self._backend)
        return selected

    def bind(self, shape: Shape, q: Tensor, k: Tensor, v: Tensor) -> Bound:
        """Prepares a call; see `Contestant.bind`."""
        if shape.window != (-1, -1):
            raise UnavailableError("PyTorch's interface to it has no window")
        if shape.causal and shape.seqlen_q != shape.seqlen_k:
            raise UnavailableError("PyTorch's causal mask is aligned top left, ours bottom right")
        call = torch.nn.functional.scaled_dot_product_attention
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        causal, grouped = shape.causal, shape.heads != shape.heads_kv

        def run() -> Tensor:
            return call(q, k, v, is_causal=causal, enable_gqa=grouped)

        return Bound(run, _heads_first)


def load_fa3(peers_dir: Path | None = None) -> str:
    """Makes ``torch.ops.flash_attn_3`` available.

    The library is ``fa3.so`` in peers_dir, else the file that the environment variable FA3_SO
    names, else an installed package ``flash_attn_3``. A ``libcudart.so.12`` beside the file is
    loaded first, for builds that need one other than PyTorch's.

    Args:
        peers_dir: Folder of the peers' files, or None.

    Returns:
        Where the operator came from.

    Raises:
        UnavailableError: There is none, or it does not load.
    """
    if peers_dir is None and FA3_VARIABLE not in os.environ:
        try:
            importlib.import_module("flash_attn_3._C")
        except ImportError as error:
            raise UnavailableError(f"not installed ({error}): {_FA3_HELP}") from error
        return "flash_attn_3"
    return load_library(peers_dir, "fa3.so", FA3_VARIABLE, "flash_attn_3", _FA3_HELP)


def load_library(
    peers_dir: Path | None, file: str, variable: str, namespace: str, help_text: str
) -> str:
    """Loads a library of operators, one of which is ``fwd``.

    Args:
        peers_dir: Folder of the peers' files, or None.
        file: The library's name there.
        variable: The environment variable that names the file where there is no such folder.
        namespace: What its operators are under in ``torch.ops``.
        help_text: Where to get it.

    Returns:
        The file's path.

    Raises:
        UnavailableError: There is none, or it does not load.
    """
    if peers_dir is None and variable not in os.environ:
        raise UnavailableError(f"not found: {help_text}")
    library = Path(os.environ[variable]) if peers_dir is None else peers_dir / file
    library = library.expanduser().resolve()
    if not library.is_file():
        packed = library.with_name(library.name + ".xz")
        hint = f"unpack it: xz -dk {packed}" if packed.is_file() else help_text
        raise UnavailableError(f"{library} is missing: {hint}")
    try:
        runtime = library.with_name("libcudart.so.12")
        if runtime.is_file():
            ctypes.CDLL(str(runtime), mode=ctypes.RTLD_GLOBAL)
        torch.ops.load_library(str(library))
        if not hasattr(getattr(torch.ops, namespace), "fwd"):
            raise UnavailableError(f"{library} does not define torch.ops.{namespace}.fwd")
    except OSError as error:
        raise UnavailableError(f"{library} does not load: {error}") from error
    return str(library)


def _cudnn(peers_dir: Path | None) -> Contestant:
    del peers_dir  # it is inside PyTorch
    from torch.nn.attention import SDPBackend

    if not torch.backends.cudnn.is_available():
        raise UnavailableError("this PyTorch has no cuDNN")
    return Sdpa("cudnn", SDPBackend.CUDNN_ATTENTION)


def _fa2(peers_dir: Path | None) -> Contestant:
    del peers_dir
    from torch.nn.attention import SDPBackend

    return Sdpa("fa2", SDPBackend.FLASH_ATTENTION)


def gather(
    peers: bool = True, peers_dir: Path | None = None, names: Iterable[str] | None = None
) -> tuple[list[Contestant], dict[str, str]]:
    """Collects the contestants that can run here.

    Args:
        peers: Whether to take the peers, too.
        peers_dir: Folder of the peers' files, or None.
        names: The contestants to take; by default all.

    Returns:
        The contestants, ours first, and the reason for each that is missing.
    """
    makers: dict[str, Callable[[Path | None], Contestant]] = {OURS: lambda _: Ours()}
    if peers:
        makers.update({"fa3": Fa3, "cudnn": _cudnn, "fa2": _fa2})
    if names is not None:
        makers = {name: makers.get(name, _unknown) for name in names}
    return collect(makers, peers_dir)


def _unknown(_: Path | None) -> NoReturn:
    raise UnavailableError("no such contestant")


_Made = TypeVar("_Made")


def collect(
    makers: Mapping[str, Callable[[Path | None], _Made]], peers_dir: Path | None
) -> tuple[list[_Made], dict[str, str]]:
    """Makes contestants by name from the folder of the peers' files; as `gather` returns them."""
    found: list[_Made] = []
    missing: dict[str, str] = {}
    for name, make in makers.items():
        try:
            found.append(make(peers_dir))
        except UnavailableError as error:
            missing[name] = str(error)
    return found, missing


def require_kernels() -> None:
    """Raises UnavailableError where our kernels cannot run, saying why."""
    import hopper_attention

    reason = hopper_attention.unavailable_reason()
    if reason is not None:
        raise UnavailableError(reason)
