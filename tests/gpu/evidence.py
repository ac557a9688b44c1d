"""Writes what a run of the GPU tests showed into a file that is kept beside them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest


class Recorder:
    """A pytest plugin that counts results and writes them when the session ends.

    A part of the tests is no evidence for all: nothing is written when tests were deselected, when
    a file of the folder was not collected, when the session broke off, or when nothing passed.
    """

    def __init__(self, path: Path, folder: Path, header: dict[str, Any]) -> None:
        """Sets where to write and what beside the counts.

        Args:
            path: The evidence file.
            folder: The folder whose test files must all be collected.
            header: Fields of the file: device, date, sources and so on.
        """
        self._path = path
        self._wanted = {file.resolve() for file in folder.glob("test_*.py")}
        self._header = header
        self._collected: set[Path] = set()
        self._planned = 0
        self._deselected = 0
        self._outcomes: dict[str, str] = {}
        self._message = ""

    def pytest_deselected(self, items: list[Any]) -> None:
        self._deselected += len(items)

    def pytest_collection_finish(self, session: Any) -> None:
        self._collected = {item.path.resolve() for item in session.items}
        self._planned = len(session.items)

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, node: Any, ids: list[str]) -> None:
        """Under pytest-xdist the processes collect, and each collects all."""
        root = Path(node.config.rootpath)
        self._collected = {(root / name.split("::")[0]).resolve() for name in ids}
        self._planned = len(ids)
        if node.config.option.keyword or node.config.option.markexpr:
            self._deselected = 1  # their deselected tests are not told

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:  # also where only its set-up or tear-down failed
            self._outcomes[report.nodeid] = "failed"
        elif report.skipped:
            self._outcomes.setdefault(report.nodeid, "skipped")
        elif report.when == "call":
            self._outcomes.setdefault(report.nodeid, "passed")

    def pytest_sessionfinish(self, session: Any, exitstatus: int) -> None:
        outcomes = list(self._outcomes.values())
        counts = {name: outcomes.count(name) for name in ("passed", "failed", "skipped")}
        missing = sorted(path.name for path in self._wanted - self._collected)
        if self._deselected:
            self._message = f"{self._deselected} tests were deselected"
        elif missing:
            self._message = f"not collected: {', '.join(missing)}"
        elif exitstatus not in (0, 1) or len(outcomes) < self._planned:
            self._message = f"{self._planned - len(outcomes)} tests were not run"
        elif counts["passed"] == 0:
            self._message = "no test passed"
        if self._message:
            return
        self._path.write_text(json.dumps({**self._header, **counts}, indent=2) + "\n")

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        if self._message:
            terminalreporter.write_line(f"no evidence is written: {self._message}")
        else:
            terminalreporter.write_line(f"evidence: {self._path}")
