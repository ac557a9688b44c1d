"""Gradients of random problems: every argument at once, as in test_fuzz.py."""

import random

import backward_checking
import test_fuzz
from backward_checking import check, draw_dlse


def test_gradients_of_random_problems(fuzz_case):
    seed, index = fuzz_case
    generator = random.Random(f"backward-{seed}-{index}")
    problem, options, layouts = test_fuzz.draw(generator)
    inputs, dout = backward_checking.draw(problem, seed=index)
    options["deterministic"] = generator.random() < 0.5
    dlse = draw_dlse(inputs[0], seed=index) if generator.random() < 0.3 else None
    if generator.random() < 0.3:
        dout = generator.choice(layouts)(dout)
    check([layout(x) for layout, x in zip(layouts, inputs, strict=True)], dout, dlse, **options)
