"""The hash of the kernels' source code, which ties stored results to the code they came from."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path

SOURCE_FOLDERS = ("hopper", "include")

_MARKER = Path("hopper", "forward", "instances.def")
_IGNORED_SUFFIXES = (".pyc", ".pyo", ".o", ".so", ".a", ".orig", ".rej", ".swp", ".tmp", "~")
_IGNORED_NAMES = ("__pycache__", "build", "compile_commands.json")


def source_root() -> Path | None:
    """Finds the source tree that this package belongs to.

    Returns:
        The folder that holds ``hopper/`` and ``include/``: the package's own checkout, else the
        working directory or the nearest of its parents. None when the package is installed apart
        from its sources and the working directory is elsewhere.
    """
    package = Path(__file__).resolve().parents[1]
    here = Path.cwd()
    for folder in (*package.parents, here, *here.parents):
        if (folder / _MARKER).is_file():
            return folder
    return None


def tree_hash(root: Path) -> str:
    """Hashes ``hopper/`` and ``include/`` as git would.

    It is the id of the git tree that holds these two folders and nothing else, computed from the
    files as they are now. So it is the same in a clean checkout, in an archive without ``.git`` and
    in a tree whose changes are not committed, and it is reproduced from a commit by::

        git ls-tree COMMIT hopper include | git mktree

    Dot files, editors' backups and compilers' outputs are left out, empty folders too, as git
    leaves them out. Permissions are not read, since archives and copies lose them: every file
    counts as git's 100644, which no file of these folders should differ from.

    Args:
        root: The folder that holds ``hopper/`` and ``include/``.

    Returns:
        40 hexadecimal digits.

    Raises:
        FileNotFoundError: One of the two folders is missing.
    """
    entries = []
    for name in SOURCE_FOLDERS:
        folder = root / name
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder} is missing: {root} is not the source tree")
        digest = _folder_digest(folder)
        if digest is not None:
            entries.append((name.encode(), True, digest))
    return _tree_digest(entries).hex()


def current_sources() -> str | None:
    """Hashes the source tree at hand.

    Returns:
        `tree_hash` of `source_root`, or None when there is no source tree to read.
    """
    root = source_root()
    return None if root is None else tree_hash(root)


def newer_than(library: Path, root: Path) -> list[Path]:
    """Lists the sources that were written after the library was built.

    Args:
        library: The compiled ``libhopper_attention.so``.
        root: The folder that holds ``hopper/`` and ``include/``.

    Returns:
        Paths relative to root; empty when the library is up to date as far as times can tell.
    """
    built = library.stat().st_mtime
    files = (file for name in SOURCE_FOLDERS for file in _files(root / name))
    return sorted(file.relative_to(root) for file in files if file.stat().st_mtime > built)


def _counts(path: Path) -> bool:
    name = path.name
    return not (name.startswith(".") or name in _IGNORED_NAMES or name.endswith(_IGNORED_SUFFIXES))


def _files(folder: Path) -> Iterator[Path]:
    for path in folder.iterdir():
        if not _counts(path):
            continue
        if path.is_dir():
            yield from _files(path)
        else:
            yield path


def _object(kind: bytes, body: bytes) -> bytes:
    header = kind + b" " + str(len(body)).encode() + b"\0"
    return hashlib.sha1(header + body, usedforsecurity=False).digest()


def _folder_digest(folder: Path) -> bytes | None:
    entries = []
    for path in folder.iterdir():
        if not _counts(path):
            continue
        name = os.fsencode(path.name)
        mode = path.lstat().st_mode
        if stat.S_ISLNK(mode):
            raise ValueError(f"{path} is a symbolic link; the kernels' sources have none")
        if stat.S_ISDIR(mode):
            digest = _folder_digest(path)
            if digest is not None:
                entries.append((name, True, digest))
        else:
            entries.append((name, False, _object(b"blob", path.read_bytes())))
    return _tree_digest(entries) if entries else None


def _tree_digest(entries: list[tuple[bytes, bool, bytes]]) -> bytes:
    # git sorts a folder as if its name ended in a slash
    entries.sort(key=lambda entry: entry[0] + (b"/" if entry[1] else b""))
    body = b"".join(
        (b"40000 " if is_folder else b"100644 ") + name + b"\0" + digest
        for name, is_folder, digest in entries
    )
    return _object(b"tree", body)
