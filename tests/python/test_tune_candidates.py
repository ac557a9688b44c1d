"""Candidates of `hopper-attention tune`: which are tried, and what they are compiled from."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from hopper_attention.tune.build import candidate_header
from hopper_attention.tune.candidates import choose, parse_choices
from hopper_attention.tune.rules import Rules, TuneError, find_source, label, show

ROOT = Path(__file__).resolve().parents[2]
COMPILER = shutil.which("g++") or shutil.which("c++")
ROWS = re.findall(
    r"^HOPPER_ATTENTION_FORWARD\((\w+),",
    (ROOT / "hopper/forward/instances.def").read_text(),
    re.MULTILINE,
)
pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
EACH_ROW = pytest.mark.parametrize("name", ROWS)


@pytest.fixture(scope="module")
def rules(tmp_path_factory):
    return Rules(ROOT, tmp_path_factory.mktemp("rules"))


def grid(rules, instance):
    """Every tile of a row, the other fields as chosen, that can be built."""
    tiles = [
        instance.chosen | {"tile_n": tile_n, "stages": stages, "num_consumers": consumers}
        for tile_n in rules.values("tile_n", 128)
        for stages in rules.values("stages", 2)
        for consumers in rules.values("num_consumers", 2)
    ]
    return [cost.config for cost in rules.costs(instance, tiles) if cost.error is None]


def test_rows_are_those_of_instances_def(rules):
    assert list(rules.instances) == ROWS
    for row in rules.instances.values():
        assert row.mask in ("full", "masked", "packed", "short")
        if row.mask == "packed":  # which is tuned by way of the other
            alike = rules.instances[row.name.replace("packed", "masked")].chosen
            fields = ("schedule", "ping_pong", "free_first", "ahead_first")
            own = {name: alike[name] for name in fields}
            assert row.chosen | own == alike
        assert f"d{row.head_dim}" in row.name
        (cost,) = rules.costs(row, [row.chosen])
        assert cost.error is None
        assert cost.config == row.chosen
        assert cost.tile_m == 64 * row.chosen["num_consumers"]


def test_answers_are_budget_h(rules):
    """Counted by hand for bf16 d128: 64 rows a consumer, 2 bytes an element."""
    row = rules.instances["bf16_d128_masked"]
    tile = {"tile_n": 96, "stages": 3, "num_consumers": 2}
    config = row.chosen | tile | {"ahead_first": False}
    (cost,) = rules.costs(row, [config])
    barriers = 2 * (2 * 3 + 2 + 2) * 8 + 2 * 4
    tensors = 3 * 2 * 96 * 128 * 2 + 2 * 64 * 128 * 2 * 2  # K and V, then Q and O
    assert cost.shared_bytes == -(-(tensors + barriers) // 1024) * 1024
    assert cost.fragment_registers == 48 + 24 + 64
    assert (cost.threads, cost.error) == (384, None)


@pytest.mark.parametrize(
    "changes, error",
    [
        ({"tile_n": 100}, "tile_n"),
        ({"num_consumers": 5}, "consumers"),
        ({"stages": 1}, "stages"),
        ({"stages": 4}, "shared memory"),
        ({"num_consumers": 3, "tile_n": 144, "ahead_first": False}, "registers"),
        ({"tile_n": 112}, "ahead_first"),
    ],
)
def test_budget_h_refuses(rules, changes, error):
    row = rules.instances["bf16_d128_masked"]
    (cost,) = rules.costs(row, [row.chosen | changes])
    assert error in cost.error


@EACH_ROW
def test_neighbourhood(rules, name):
    row = rules.instances[name]
    found = choose(rules, row)
    configs = [cost.config for cost in found.costs]
    assert configs[0] == row.chosen
    assert len({label(config) for config in configs}) == len(configs)
    assert all(cost.error is None for cost in found.costs)
    assert not found.left_out
    assert len(configs) <= 36
    tiles = grid(rules, row)
    assert row.chosen in tiles
    beside = {(row.chosen["tile_n"] + step) for step in (-16, 16)}
    for tile in tiles:
        alone = tile == row.chosen | {"tile_n": tile["tile_n"]}
        assert not (alone and tile["tile_n"] in beside) or tile in configs
        same = [x for x in tiles if x == tile | {"tile_n": x["tile_n"]}]
        widest = tile == max(same, key=lambda x: x["tile_n"]) and tile["tile_n"] >= 48
        assert not (widest and tile["stages"] <= row.chosen["stages"] + 1) or tile in configs
    others = set(row.chosen) - {"tile_n", "stages", "num_consumers"}
    for field in others:
        for value in rules.values(field, row.chosen[field]):
            (cost,) = rules.costs(row, [row.chosen | {field: value}])
            assert (row.chosen | {field: value} in configs) == (cost.error is None)


def test_combinations_that_are_asked_for(rules):
    row = rules.instances["bf16_d64_full"]
    asked = ["tile_n=96,112,256", "ping_pong=all", "schedule=kAfterMaxima"]
    found = choose(rules, row, parse_choices(rules, row, asked))
    assert [cost.config for cost in found.costs] == [
        row.chosen,
        *(
            row.chosen | {"tile_n": n, "ping_pong": turns, "schedule": "kAfterMaxima"}
            for n in (96, 112)
            for turns in (False, True)
        ),
    ]
    assert [cost.config["tile_n"] for cost in found.left_out] == [256, 256]
    assert {cost.error for cost in found.left_out} == {"registers"}


def test_all_values(rules):
    row = rules.instances["bf16_d64_full"]
    choices = parse_choices(rules, row, ["tile_n=all", "schedule=all", "skip_rescale=all"])
    assert choices["tile_n"] == list(range(16, 257, 16))
    assert choices["schedule"] == rules.schedules
    assert choices["skip_rescale"] == [False, True]
    config_h = (ROOT / "include/hopper_attention/config.h").read_text()
    enumeration = re.search(r"enum class Schedule.*?};", config_h, re.DOTALL).group()
    assert rules.schedules == re.findall(r"\b(k\w+) = \d", enumeration)


@pytest.mark.parametrize(
    "choice, words",
    [
        ("tile_m=64", "a field of tile_n, stages"),
        ("tile_n", "'' is none of 16, 32"),
        ("tile_n=96,97", "'97' is none of 16, 32"),
        ("ping_pong=yes", "'yes' is none of false, true"),
        ("schedule=3", "'3' is none of kAfterMaxima"),
    ],
)
def test_wrong_choices(rules, choice, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        parse_choices(rules, rules.instances["bf16_d64_full"], [choice])


def test_source_is_found_from_below(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT / "hopper" / "forward")
    assert find_source(None) == ROOT
    assert find_source(ROOT) == ROOT
    with pytest.raises(TuneError, match="is no source checkout"):
        find_source(ROOT / "hopper")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TuneError, match=r"is not in a source checkout.*--source"):
        find_source(None)


def test_no_compiler(monkeypatch, tmp_path):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(TuneError, match="no C\\+\\+ compiler"):
        Rules(ROOT, tmp_path)
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(TuneError, match="no-such-compiler does not run"):
        Rules(ROOT, tmp_path)


def check_syntax(folder, header, text):
    unit = folder / "unit.cpp"
    unit.write_text(text)
    flags = ["-std=c++17", "-Wall", "-Wextra", "-Werror", "-fsyntax-only"]
    includes = [f"-I{ROOT / 'include'}", f"-I{ROOT / 'hopper'}"]
    command = [COMPILER, *flags, *includes, "-include", str(header), str(unit)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.parametrize("name", ["bf16_d64_full", "fp16_d128_masked", "bf16_d192x128_masked"])
def test_the_header_replaces_the_choice(rules, tmp_path, name):
    row = rules.instances[name]
    cost = choose(rules, row).costs[-1]
    assert cost.config != row.chosen
    header = tmp_path / "candidate.h"
    header.write_text(candidate_header(row, cost.config))
    wanted = [
        f"config.{field} == {'Schedule::' if isinstance(value, str) else ''}{show(value)}"
        for field, value in cost.config.items()
    ]
    key = "kFull" if row.mask == "full" else "kMasked"
    test = f"""
        #include "forward/problem.h"
        #include "hopper_attention/budget.h"
        using namespace hopper_attention;
        constexpr ForwardKey key{{Dtype::kBfloat16, {row.head_dim}, {row.head_dim_v},
                                 MaskKind::{key}}};
        constexpr ForwardConfig config = make_forward_config(key);
        static_assert({" && ".join(wanted)}, "fields");
        static_assert(config.key == key, "key");
        static_assert(config_error(config) == nullptr, "it can be built");
        static_assert(shared_bytes(config) == {cost.shared_bytes}, "bytes");
        static_assert(tile_mask(128, true, 1, 1) == MaskKind::{key}, "short");
        static_assert(tile_mask(128, true, 1 << 20, 1 << 20) == MaskKind::{key}, "long");
    """
    done = check_syntax(tmp_path, header, test)
    assert done.returncode == 0, done.stderr
    narrower = test.replace(f"tile_n == {cost.config['tile_n']}", "tile_n == 8")
    assert "fields" in check_syntax(tmp_path, header, narrower).stderr


def test_the_planner_compiles_behind_the_header(rules, tmp_path):
    row = rules.instances["bf16_d128_full"]
    header = tmp_path / "candidate.h"
    header.write_text(candidate_header(row, row.chosen))
    problem = (ROOT / "hopper/forward/problem.cpp").read_text()
    done = check_syntax(tmp_path, header, problem)
    assert done.returncode == 0, done.stderr
