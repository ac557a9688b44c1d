"""Random problems: every argument at once. --fuzz-seed and --fuzz-cases draw others."""

import random

import torch
from checking import TILES, Problem, check, heads_outside, sequence_first, strided


def draw(generator):
    """A problem, options and layouts, with the corners more often than chance would have them."""

    def length():
        kind = generator.random()
        if kind < 0.15:
            return generator.randint(0, 3)
        if kind < 0.5:
            return max(0, 16 * generator.randint(1, 24) + generator.randint(-1, 1))
        return generator.randint(1, 700)

    if generator.random() < 0.5:
        head_dim, head_dim_v = generator.choice(TILES)
    else:
        head_dim = head_dim_v = 8 * generator.randint(1, 32)
        if head_dim <= 192 and generator.random() < 0.3:
            head_dim_v = 8 * generator.randint(1, 16)
    heads_kv = generator.randint(1, 4)
    problem = Problem(
        seqlen_q=length(),
        seqlen_k=length(),
        head_dim=head_dim,
        head_dim_v=head_dim_v,
        batch=generator.randint(1, 4),
        heads=heads_kv * generator.choice([1, 1, 2, 3, 8]),
        heads_kv=heads_kv,
        dtype=generator.choice([torch.float16, torch.bfloat16]),
    )
    options = {}
    if generator.random() < 0.4:
        options["causal"] = True
    if generator.random() < 0.4:
        options["window_size"] = tuple(
            generator.choice([-1, 0, generator.randint(0, 20), generator.randint(0, 700)])
            for _ in range(2)
        )
    if generator.random() < 0.15:
        options["softcap"] = generator.uniform(5.0, 50.0)
    if generator.random() < 0.3:
        options["softmax_scale"] = generator.choice([0.0, -0.1, 0.01, 0.1, 0.5])
    if generator.random() < 0.2:
        options["sm_margin"] = generator.randint(1, 140)
    layouts = [
        generator.choice([lambda x: x, lambda x: x, heads_outside, sequence_first, padded])
        for _ in range(3)
    ]
    return problem, options, layouts


def padded(x):
    return strided(x, (0, 7, 1, 8))


def test_random_problems(fuzz_case):
    seed, index = fuzz_case
    problem, options, layouts = draw(random.Random(f"{seed}-{index}"))
    inputs = problem.inputs(seed=index)
    check(*(layout(x) for layout, x in zip(layouts, inputs, strict=True)), **options)
