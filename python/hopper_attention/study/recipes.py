"""The FP8 recipes that the study compares, each under the name of a format."""

from __future__ import annotations

from dataclasses import dataclass

from hopper_attention.recipe import Fp8Recipe


@dataclass(frozen=True)
class NamedRecipe:
    """A recipe, what it is, and what it costs beside a scale per tensor, in a few words."""

    recipe: Fp8Recipe
    words: str
    cost: str = "a rotation in the quantizer, and a scale a key tile"


DEFAULT = "fp8"

# The default first; each of the others changes one thing of it, but for the two plain ones, which
# are what FP8 attention elsewhere takes.
RECIPES = {
    DEFAULT: NamedRecipe(Fp8Recipe(), "the default: block scales, Hadamard, V per channel"),
    "fp8-tensor": NamedRecipe(
        Fp8Recipe("tensor", "tensor", hadamard=False), "a scale per tensor, no Hadamard", "nothing"
    ),
    "fp8-head": NamedRecipe(
        Fp8Recipe("head", "head", hadamard=False), "a scale per head, no Hadamard", "nothing"
    ),
    "fp8-plain": NamedRecipe(
        Fp8Recipe(hadamard=False), "the default without Hadamard", "a scale a key tile"
    ),
    "fp8-token": NamedRecipe(
        Fp8Recipe("token"),
        "the default with Q and K per token",
        "a rotation in the quantizer, and a multiplication more for each score",
    ),
    "fp8-vtoken": NamedRecipe(
        Fp8Recipe(v_scale="token"),
        "the default with V per token",
        "the default's, and a multiplication more for each probability",
    ),
    "fp8-smooth": NamedRecipe(
        Fp8Recipe(smooth_k=True),
        "the default with smoothed K",
        "the default's, and a pass over K for its mean",
    ),
    "fp8-fast": NamedRecipe(Fp8Recipe(accumulation="fast"), "the default with fast accumulation"),
}


def is_fp8(format_name: str) -> bool:
    """Whether a format is one of the recipes."""
    return format_name in RECIPES
