"""Trains a small GPT on the Python standard library's sources, once with each kind of attention.

    python examples/train_gpt.py                     # on a Hopper card: four kinds, 300 steps each
    python examples/train_gpt.py --head-dim 64 --head-dim 128 --attention ours --compile
    python examples/train_gpt.py --device cpu        # a few steps of a tiny model

Every training starts from the same weights and sees the same bytes in the same order, so their
loss curves differ by attention's arithmetic alone. The recipe is the usual one: weights in float32,
matrix products in bfloat16 (autocast), AdamW, a cosine schedule after a linear warm-up.
"""

from __future__ import annotations

import gc
import hashlib
import math
import sysconfig
import time
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import training_report
import typer
from gpt import GPT, Attention, attention_function
from rich.markup import escape
from rich.progress import Progress
from torch import nn
from training_report import Run

import hopper_attention
from hopper_attention._extras import STUDY, require
from hopper_attention.bench import machine, sources
from hopper_attention.bench.table import make_console

_HELD_OUT_PART = 20  # one file of so many is held out
_SKIPPED = {"__pycache__", "dist-packages", "site-packages", "test", "tests"}


_ON_CARD = (Attention.STANDARD, Attention.SDPA, Attention.OURS, Attention.OURS_FP8)
_ON_CPU = (Attention.STANDARD, Attention.REFERENCE)


@dataclass(frozen=True)
class Settings:
    """What a training is made of; `deterministic` is about our 16-bit backward pass alone."""

    steps: int = 300
    batch: int = 8
    seqlen: int = 2048
    layers: int = 8
    width: int = 512
    # At 1e-3 the first hundred losses leap by 1 or 2 in any arithmetic: nothing could be compared.
    learning_rate: float = 4e-4
    warmup: int = 30
    held_out_every: int = 25
    held_out_batches: int = 4
    seed: int = 0
    compiled: bool = False
    checkpointing: bool = False
    deterministic: bool = False


_CPU = Settings(
    steps=12,
    batch=2,
    seqlen=128,
    layers=2,
    width=128,
    warmup=3,
    held_out_every=4,
    held_out_batches=1,
)


@dataclass(frozen=True)
class Corpus:
    """The text: uint8 tensors, and the number of files and a digest that name it in results."""

    training: torch.Tensor
    held_out: torch.Tensor
    files: int
    sha256: str


def read_corpus(folder: Path | None = None) -> Corpus:
    """Reads the standard library's .py files in the order of their names.

    A file is held out by a hash of its name, so that the parts do not depend on other files.

    Raises:
        ValueError: there is not enough text, as where the library lies in an archive.
    """
    folder = Path(sysconfig.get_path("stdlib")) if folder is None else folder
    paths = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*.py")}
    names = sorted(name for name in paths if _SKIPPED.isdisjoint(name.split("/")))
    parts: dict[bool, list[bytes]] = {True: [], False: []}
    for name in names:
        text = paths[name].read_bytes() + b"\0"
        parts[zlib.crc32(name.encode()) % _HELD_OUT_PART == 0].append(text)
    held_out, training = b"".join(parts[True]), b"".join(parts[False])
    if min(len(held_out), len(training)) < 2**15:
        raise ValueError(f"too little text in {folder}: {len(names)} .py files")
    digest = hashlib.sha256(training + held_out).hexdigest()
    return Corpus(_tensor(training), _tensor(held_out), len(names), digest)


def _tensor(text: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)  # of a copy that may be written to


def windows(text: torch.Tensor, starts: torch.Tensor, seqlen: int) -> tuple[torch.Tensor, ...]:
    """Tokens and targets, (batch, seqlen) each, of the windows at these places."""
    places = starts[:, None] + torch.arange(seqlen + 1, device=starts.device)
    chosen = text[places].long()
    return chosen[:, :-1], chosen[:, 1:]


def learning_rate(step: int, settings: Settings) -> float:
    """Linear warm-up, then half a cosine down to a tenth."""
    if step < settings.warmup:
        return settings.learning_rate * (step + 1) / settings.warmup
    done = (step - settings.warmup) / max(1, settings.steps - settings.warmup)
    return settings.learning_rate * (0.1 + 0.45 * (1 + math.cos(math.pi * done)))


class Training:
    """One training of one model.

    Args:
        kind: who computes attention.
        head_dim: the model's; it divides the width.
        settings: the rest.
        corpus: the text.
        device: where.
    """

    def __init__(
        self, kind: Attention, head_dim: int, settings: Settings, corpus: Corpus, device: str
    ) -> None:
        self.kind, self.head_dim, self.settings, self.device = kind, head_dim, settings, device
        torch.manual_seed(settings.seed)
        self.model = GPT(
            layers=settings.layers,
            width=settings.width,
            head_dim=head_dim,
            seqlen=settings.seqlen,
            attention=attention_function(kind, settings.deterministic),
            checkpointing=settings.checkpointing,
        ).to(device)
        if settings.compiled:
            torch.compiler.reset()  # kernels of the last kind of attention
            for block in self.model.blocks:  # all have one code, which is compiled once
                block.compile(fullgraph=True)
        matrices = [p for p in self.model.parameters() if p.dim() == 2]
        others = [p for p in self.model.parameters() if p.dim() != 2]
        self.optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
            betas=(0.9, 0.95),
            fused=device == "cuda",
        )
        self.text, self.held_out = corpus.training.to(device), corpus.held_out.to(device)
        generator = torch.Generator().manual_seed(settings.seed)
        last = len(self.text) - settings.seqlen
        shape = (settings.steps, settings.batch)
        self.starts = torch.randint(last, shape, generator=generator).to(device)
        count = settings.held_out_batches * settings.batch
        last = len(self.held_out) - settings.seqlen - 1
        places = torch.linspace(0, last, count, dtype=torch.float64).long()
        self.held_out_starts = places.view(-1, settings.batch).to(device)

    def loss(self, text: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
        """The mean loss of a batch; products are in bfloat16 on a card and float32 on a CPU."""
        tokens, targets = windows(text, starts, self.settings.seqlen)
        with torch.autocast(self.device, torch.bfloat16, enabled=self.device == "cuda"):
            loss: torch.Tensor = self.model(tokens, targets)
            return loss

    def step(self, index: int) -> torch.Tensor:
        """One step of the optimizer; returns the loss without waiting for it."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(index, self.settings)
        loss = self.loss(self.text, self.starts[index])
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()

    @torch.no_grad()
    def held_out_loss(self) -> float:
        """The mean loss of the held-out windows, which are the same at every step."""
        self.model.eval()
        losses = [self.loss(self.held_out, starts) for starts in self.held_out_starts]
        self.model.train()
        return torch.stack(losses).mean().item()

    def run(self, progress: Callable[[], object]) -> Run:
        """All steps. The first part, up to the first held-out loss, is not timed: it warms up."""
        every, steps = self.settings.held_out_every, self.settings.steps
        on_card = self.device == "cuda"
        if on_card:
            gc.collect()  # the last training's model
            torch.cuda.reset_peak_memory_stats()
        losses, held_out, seconds = [], [], []
        for begin in range(0, steps, every):
            started = time.perf_counter()
            for index in range(begin, min(begin + every, steps)):
                losses.append(self.step(index))
                progress()
            if on_card:
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - started)
            held_out.append((min(begin + every, steps), self.held_out_loss()))
        timed_steps, timed = (steps - every, seconds[1:]) if steps > every else (steps, seconds)
        timed_tokens = timed_steps * self.settings.batch * self.settings.seqlen
        return Run(
            attention=self.kind.value,
            head_dim=self.head_dim,
            parameters=sum(p.numel() for p in self.model.parameters()),
            tokens_per_second=timed_tokens / sum(timed),
            peak_bytes=torch.cuda.max_memory_allocated() if on_card else None,
            losses=torch.stack(losses).tolist(),
            held_out=held_out,
        )


def _choose(kinds: list[Attention] | None, device: str | None) -> tuple[list[Attention], str]:
    """The attentions and the device; typer.BadParameter where they cannot be had here."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device not in ("cpu", "cuda"):
        raise typer.BadParameter(f"{device!r} is neither cpu nor cuda", param_hint="--device")
    if device == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("PyTorch finds no CUDA device", param_hint="--device")
    chosen = list(dict.fromkeys(kinds or (_ON_CARD if device == "cuda" else _ON_CPU)))
    ours = [kind for kind in chosen if kind in (Attention.OURS, Attention.OURS_FP8)]
    missing = "the device is the CPU" if device == "cpu" else hopper_attention.unavailable_reason()
    if ours and missing is not None:
        raise typer.BadParameter(
            f"{ours[0].value} cannot run here: {missing}; reference, standard and sdpa can",
            param_hint="--attention",
        )
    return chosen, device


def main(
    attention: Annotated[
        list[Attention] | None,
        typer.Option(help="Whose attention; may be repeated. Default: all that the device has."),
    ] = None,
    head_dim: Annotated[
        list[int] | None,
        typer.Option(min=2, help="The model's head dimension; may be repeated. Default: 64."),
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Default: 300, 12 on a CPU.")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Default: 8, 2 on a CPU.")] = None,
    seqlen: Annotated[int | None, typer.Option(min=1, help="Default: 2048, 128 on a CPU.")] = None,
    layers: Annotated[int | None, typer.Option(min=1, help="Default: 8, 2 on a CPU.")] = None,
    width: Annotated[int | None, typer.Option(min=2, help="Default: 512, 128 on a CPU.")] = None,
    lr: Annotated[
        float | None, typer.Option(help="Highest learning rate. Default: 0.0004.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the weights and of the order.")] = 0,
    compiled: Annotated[
        bool, typer.Option("--compile/--no-compile", help="torch.compile each block.")
    ] = False,
    checkpointing: Annotated[
        bool, typer.Option("--checkpointing", help="Recompute each block's activations.")
    ] = False,
    deterministic: Annotated[
        bool, typer.Option("--deterministic", help="ours: add gradients in a fixed order.")
    ] = False,
    device: Annotated[
        str | None, typer.Option(help="cpu or cuda. Default: cuda where there is one.")
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="File for the loss curves and speeds.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Picture of the loss curves (.png).")] = None,
) -> None:
    """Trains a small GPT with each attention from the same weights on the same text.

    The exit code is 1 when a loss is not finite.
    """
    if plot is not None:
        require(STUDY, "matplotlib")  # before a training rather than behind it
    kinds, device = _choose(attention, device)
    head_dims = list(dict.fromkeys(head_dim or [64]))
    given: dict[str, Any] = {
        "steps": steps, "batch": batch, "seqlen": seqlen, "layers": layers, "width": width,
        "learning_rate": lr, "seed": seed, "compiled": compiled, "checkpointing": checkpointing,
        "deterministic": deterministic,
    }  # fmt: skip
    preset = Settings() if device == "cuda" else _CPU
    settings = replace(preset, **{name: x for name, x in given.items() if x is not None})
    for dim in head_dims:
        if dim % 2 or settings.width % dim:
            raise typer.BadParameter(
                f"{dim}: allowed are even divisors of the width, {settings.width}",
                param_hint="--head-dim",
            )
    try:
        corpus = read_corpus()
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    shortest = min(len(corpus.training), len(corpus.held_out)) - 2
    if settings.seqlen > shortest:
        raise typer.BadParameter(
            f"{settings.seqlen}: the text allows {shortest}", param_hint="--seqlen"
        )
    console = make_console()
    runs = []
    with Progress(console=console, disable=not console.is_terminal) as bar:
        for dim in head_dims:
            for kind in kinds:
                label = f"{kind.value}, head dimension {dim}"
                advance = partial(bar.advance, bar.add_task(label, total=settings.steps))
                runs.append(Training(kind, dim, settings, corpus, device).run(advance))
    document = {
        **machine.describe(),
        "sources": sources.current_sources(),
        "corpus": {
            "files": corpus.files,
            "training_bytes": len(corpus.training),
            "held_out_bytes": len(corpus.held_out),
            "sha256": corpus.sha256,
        },
        "settings": asdict(settings),
        "runs": runs,
    }
    training_report.print_table(console, document)
    if json_file is not None:
        training_report.save(document, json_file)
        console.print(f"written: {escape(str(json_file))}", soft_wrap=True)
    if plot is not None:
        training_report.plot(document, plot)
        console.print(f"drawn: {escape(str(plot))}", soft_wrap=True)
    finite = all(math.isfinite(x) for run in runs for x in run["losses"])
    raise typer.Exit(0 if finite else 1)


if __name__ == "__main__":
    typer.run(main)
