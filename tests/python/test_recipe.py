import dataclasses

import pytest
import torch

from hopper_attention.recipe import Fp8Recipe, hadamard_block, signs

SEED_0 = [-1, 1, 1, -1, 1, 1, 1, 1]  # torch.randint(0, 2, (8,)) after manual_seed(0)


def test_the_defaults_are_the_documented_ones():
    assert Fp8Recipe() == Fp8Recipe("block", "channel", True, 0, False, "fp32", True)


@pytest.mark.parametrize(
    "field, allowed",
    [
        ("qk_scale", ("tensor", "head", "block", "token")),
        ("v_scale", ("tensor", "head", "channel", "token")),
        ("accumulation", ("fp32", "fast")),
    ],
)
def test_a_choice_takes_its_names_and_no_other(field, allowed):
    for value in allowed:
        assert getattr(Fp8Recipe(**{field: value}), field) == value
    for value in ("row", None, 1):
        with pytest.raises(ValueError, match=f"^{field} must be .*, got {value!r}"):
            Fp8Recipe(**{field: value})


@pytest.mark.parametrize("field", ["hadamard", "smooth_k", "transpose_v"])
def test_a_switch_is_a_bool(field):
    with pytest.raises(TypeError, match=f"^{field} must be True or False, got 1$"):
        Fp8Recipe(**{field: 1})


@pytest.mark.parametrize("seed, error", [(-1, ValueError), (2**63, ValueError), (1.0, TypeError)])
def test_a_seed_is_one_of_the_generator(seed, error):
    with pytest.raises(error, match=r"^seed must be "):
        Fp8Recipe(seed=seed)


def test_a_recipe_is_a_value():
    recipe = Fp8Recipe(seed=2**63 - 1)
    assert hash(recipe) == hash(dataclasses.replace(recipe))
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.seed = 1


def test_signs_are_fixed_by_the_seed_alone():
    torch.manual_seed(5)
    state = torch.get_rng_state()
    chosen = signs(128, 7)
    assert torch.equal(torch.get_rng_state(), state)
    assert chosen.dtype == torch.float32
    assert set(chosen.tolist()) == {1.0, -1.0}
    assert torch.equal(chosen, signs(128, 7))
    assert not torch.equal(chosen, signs(128, 8))
    # Stored data depends on them: they must never change.
    assert signs(8, 0).tolist() == SEED_0


@pytest.mark.parametrize(
    "head_dim, block", [(1, 1), (40, 8), (64, 64), (80, 16), (96, 32), (128, 128), (192, 64)]
)
def test_hadamard_block_is_the_largest_power_of_two_that_divides(head_dim, block):
    assert hadamard_block(head_dim) == block


def test_hadamard_block_refuses_no_channels():
    with pytest.raises(ValueError, match="head_dim must be positive, got 0"):
        hadamard_block(0)
