"""The hash of the kernels' sources: git's own, from the files alone."""

import os
import shutil
import subprocess
import time

import pytest

from hopper_attention.bench import sources

FILES = {
    "hopper/forward/instances.def": "HOPPER_ATTENTION_FORWARD(a)\n",
    "hopper/forward/mma.cuh": "// mma\n",
    "hopper/forward.h": "// sorts between the folder and its files\n",
    "hopper/dispatch.cpp": "int dispatch;\n",
    "include/hopper_attention/abi.h": "#pragma once\n",
}


@pytest.fixture
def tree(tmp_path):
    for name, text in FILES.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_the_hash_is_gits(tree):
    def git(*arguments, stdin=None):
        environment = {"PATH": os.environ["PATH"], "HOME": str(tree), "LC_ALL": "C"}
        command = ["git", "-C", str(tree), *arguments]
        done = subprocess.run(
            command, input=stdin, capture_output=True, text=True, check=True, env=environment
        )
        return done.stdout

    git("init", "-q")
    git("-c", "core.autocrlf=false", "add", "hopper", "include")
    whole = git("write-tree").strip()
    assert git("mktree", stdin=git("ls-tree", whole, "hopper", "include")).strip() == (
        sources.tree_hash(tree)
    )


def test_every_kind_of_change_changes_the_hash(tree):
    seen = {sources.tree_hash(tree)}

    def changed():
        now = sources.tree_hash(tree)
        fresh = now not in seen
        seen.add(now)
        return fresh

    (tree / "hopper/dispatch.cpp").write_text("int dispatch ;\n")
    assert changed()
    (tree / "hopper/dispatch.cpp").rename(tree / "hopper/other.cpp")
    assert changed()
    (tree / "include/new.h").write_text("")
    assert changed()
    (tree / "hopper/forward/mma.cuh").unlink()
    assert changed()


def test_what_is_no_source_does_not_count(tree):
    before = sources.tree_hash(tree)
    (tree / "hopper/empty").mkdir()
    (tree / "hopper/__pycache__").mkdir()
    (tree / "hopper/__pycache__/a.pyc").write_bytes(b"x")
    (tree / "hopper/.dispatch.cpp.swp").write_text("x")
    (tree / "include/abi.h~").write_text("x")
    (tree / "README.md").write_text("x")
    (tree / "hopper/dispatch.cpp").chmod(0o755)
    assert sources.tree_hash(tree) == before


def test_a_tree_without_sources_is_refused(tmp_path):
    (tmp_path / "hopper").mkdir()
    with pytest.raises(FileNotFoundError, match="include is missing"):
        sources.tree_hash(tmp_path)


def test_symbolic_links_are_refused(tree):
    (tree / "hopper/link.h").symlink_to(tree / "hopper/forward.h")
    with pytest.raises(ValueError, match=r"link\.h is a symbolic link"):
        sources.tree_hash(tree)


def test_this_checkout_is_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    root = sources.source_root()
    if root is None:
        pytest.skip("the package is installed apart from its sources")
    assert (root / "hopper/forward/instances.def").is_file()
    assert sources.current_sources() == sources.tree_hash(root)


def test_sources_newer_than_the_library_are_named(tree):
    library = tree / "library.so"
    library.touch()
    now = time.time()
    for name in FILES:
        os.utime(tree / name, (now - 100, now - 100))
    os.utime(library, (now - 50, now - 50))
    assert sources.newer_than(library, tree) == []
    os.utime(tree / "hopper/forward/mma.cuh", (now, now))
    assert [str(path) for path in sources.newer_than(library, tree)] == ["hopper/forward/mma.cuh"]
