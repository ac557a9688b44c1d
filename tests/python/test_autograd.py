"""_autograd.py: formulas as torch.library.register_autograd's, on an operator made for it."""

import pytest
import torch

from hopper_attention import _autograd

SCHEMA = "(Tensor x, Tensor y, float factor=2.0, Tensor? z=None, bool flag=False) -> Tensor"


@pytest.fixture(scope="module")
def saved():
    """What `save` was given last."""
    library = torch.library.Library("hopper_attention", "FRAGMENT")
    library.define("scaled_product" + SCHEMA, tags=(torch.Tag.pt2_compliant_tag,))
    calls = []

    def product(x, y, factor=2.0, z=None, flag=False):
        return factor * x * y

    def save(ctx, arguments, result):
        calls.append((arguments, ctx.needs_input_grad))
        ctx.save_for_backward(*arguments[:2])
        ctx.factor = arguments[2]

    def differentiate(ctx, gradient):
        x, y = ctx.saved_tensors
        return ctx.factor * y * gradient, ctx.factor * x * gradient, None, None, None

    library.impl("scaled_product", product, "CPU")
    torch.library.register_fake(
        "hopper_attention::scaled_product",
        lambda x, y, *rest: torch.empty_like(x),
        lib=library,
    )
    _autograd.register("scaled_product", differentiate, save, library)
    yield calls
    library._destroy()


def operands():
    return [torch.randn(3, dtype=torch.float64, requires_grad=True) for _ in range(2)]


@pytest.mark.parametrize("rest", [(), (3.0,), (3.0, None, True)])
def test_a_formula_gets_every_argument(saved, rest):
    x, y = operands()
    out = torch.ops.hopper_attention.scaled_product(x, y, *rest)
    arguments, needed = saved[-1]
    factor = rest[0] if rest else 2.0
    assert arguments[2:] == (factor, None, len(rest) == 3)
    assert needed[:2] == (True, True)
    found = torch.autograd.grad(out.sum(), (x, y))
    torch.testing.assert_close(found, (factor * y, factor * x))


def test_only_what_requires_it_has_a_gradient(saved):
    x, y = operands()
    out = torch.ops.hopper_attention.scaled_product(x.detach(), y, flag=True)
    assert saved[-1][1][:2] == (False, True)
    assert torch.autograd.grad(out.sum(), (x, y), allow_unused=True)[0] is None


def test_nothing_is_kept_where_no_gradient_is_asked_for(saved):
    x, y = operands()
    before = len(saved)
    with torch.no_grad():
        assert not torch.ops.hopper_attention.scaled_product(x, y).requires_grad
    torch.ops.hopper_attention.scaled_product(x.detach(), y.detach())
    assert len(saved) == before


def test_pytorch_takes_it_for_an_operator_with_a_formula(saved):
    x, y = operands()
    torch.library.opcheck(torch.ops.hopper_attention.scaled_product.default, (x, y, 3.0))
    compiled = torch.compile(
        torch.ops.hopper_attention.scaled_product, backend="aot_eager", fullgraph=True
    )
    torch.testing.assert_close(torch.autograd.grad(compiled(x, y).sum(), x)[0], 2 * y)
