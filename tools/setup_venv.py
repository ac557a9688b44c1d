"""Makes .venv and installs this project into it; `make demo` and `make test` begin here.

Needs nothing but a Python 3.10 or newer. pip's own environment variables hold (PIP_NO_INDEX and
PIP_FIND_LINKS for an install from a folder of wheels, PIP_EXTRA_INDEX_URL for another registry).
"""

from __future__ import annotations

import argparse
import ast
import importlib.metadata
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OLDEST_CMAKE = (3, 25)


def say(message: str) -> None:
    """Prints one line of what is being done, ahead of what the next command prints."""
    print(f"setup: {message}", flush=True)


def read_list(key: str, text: str) -> list[str]:
    """Returns the strings of `key = [...]` in pyproject.toml's text; Python 3.10 has no tomllib."""
    match = re.search(rf"^{key} = (\[.*?\])$", text, re.DOTALL | re.MULTILINE)
    if match is None:
        raise ValueError(f"pyproject.toml has no list {key}")
    return list(ast.literal_eval(match.group(1)))


def version_numbers(text: str) -> tuple[int, ...]:
    """Returns the leading numbers of a version: (2, 13) for 2.13.0+cpu."""
    return tuple(int(part) for part in re.findall(r"\d+", text.split("+")[0])[:2])


def in_range(version: str, requirement: str) -> bool:
    """Whether version satisfies a requirement of the form `name>=A.B,<C.D`."""
    match = re.search(r">=([\d.]+),<([\d.]+)$", requirement)
    if match is None:
        raise ValueError(f"{requirement} is not of the form name>=A.B,<C.D")
    low, high = version_numbers(match.group(1)), version_numbers(match.group(2))
    return low <= version_numbers(version) < high


def base_torch(requirements: Sequence[str]) -> str | None:
    """Returns the version of the base interpreter's PyTorch where it suits us, else None."""
    if sys.prefix != sys.base_prefix:
        return None  # a virtual environment's packages cannot be seen from another one
    try:
        version = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return None
    wanted = next(line for line in requirements if line.startswith("torch>"))
    return version if in_range(version, wanted) else None


def card_capabilities() -> list[str]:
    """Returns the compute capability of each NVIDIA card that the driver shows."""
    try:
        result = subprocess.run(
            ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        )
    except (OSError, subprocess.SubprocessError):
        return []
    return re.findall(r"^\d+\.\d+$", result.stdout, re.MULTILINE)


def find_nvcc() -> str | None:
    """Returns the path of nvcc: on PATH, or where CUDA's installers put it."""
    folders = [os.environ.get(name, "") for name in ("CUDA_HOME", "CUDA_PATH")]
    candidates = [os.environ.get("CUDACXX"), shutil.which("nvcc")]
    candidates += [os.path.join(folder, "bin", "nvcc") for folder in folders if folder]
    candidates.append("/usr/local/cuda/bin/nvcc")
    return next((path for path in candidates if path and os.access(path, os.X_OK)), None)


def has_cmake() -> bool:
    """Whether a cmake that is new enough is on PATH."""
    try:
        text = subprocess.run(["cmake", "--version"], capture_output=True, text=True).stdout
    except OSError:
        return False
    return version_numbers(text)[:2] >= OLDEST_CMAKE


def venv_is_usable(python: Path) -> bool:
    """Whether python exists, runs, has pip, and is this interpreter's version."""
    code = "import sys, pip; print('%d.%d' % sys.version_info[:2])"
    try:
        result = subprocess.run([str(python), "-c", code], capture_output=True, text=True)
    except OSError:
        return False
    return result.stdout.strip() == "{}.{}".format(*sys.version_info)


def make_venv(folder: Path, system_site: bool) -> None:
    """Creates the virtual environment, over what is left of an unusable one."""
    say(f"making {folder.name} with Python {sys.version.split()[0]}")
    command = [sys.executable, "-m", "venv", "--clear", str(folder)]
    if system_site:
        command.insert(-1, "--system-site-packages")
    if subprocess.run(command).returncode != 0:
        raise SystemExit(
            f"{sys.executable} -m venv failed. On Debian and Ubuntu: apt install python3-venv; "
            "or name another Python: make PYTHON=python3.12"
        )


def choose_kernels(wish: str) -> str:
    """Turns auto, on, off or card into CMake's AUTO, ON or OFF, and says why."""
    if wish != "card":
        if wish == "auto" and find_nvcc() is None:
            say("nvcc not found: the CPU part is installed, without the kernels")
        return wish.upper()
    if "9.0" not in card_capabilities():
        say("no Hopper card (H100, H200): the CPU part is installed, the kernels are not compiled")
        return "OFF"
    if find_nvcc() is None:
        say("a Hopper card, but no nvcc: install the CUDA toolkit to run the kernels on the card")
        return "OFF"
    say("a Hopper card and nvcc: the kernels are compiled, which takes minutes the first time")
    return "ON"


def pip(python: Path, *arguments: str) -> None:
    """Runs `pip install` in the virtual environment."""
    command = [str(python), "-m", "pip", "install", "--disable-pip-version-check", *arguments]
    subprocess.run(command, check=True, cwd=ROOT)


def fetch_cutlass(python: Path, requirement: str) -> Path:
    """Returns the CUTLASS source tree of the PyPI package, in build/cutlass.

    Beside .venv: the kernels then see the same files when .venv is made anew and need no
    compiling, and pip does not ask for what the package's Python parts require.
    """
    folder = ROOT / "build" / "cutlass"
    version = requirement.split("==")[1]
    if not (folder / f"nvidia_cutlass-{version}.dist-info").is_dir():
        say(f"fetching the CUTLASS headers ({requirement})")
        shutil.rmtree(folder, ignore_errors=True)
        pip(python, "--quiet", "--no-deps", "--target", str(folder), requirement)
    return folder / "cutlass_library" / "source"


def build_wheel(python: Path, settings: dict[str, str]) -> Path:
    """Builds the project's wheel in a build folder that is kept, and returns its path.

    The build backend is called as pip calls it, but without isolation, so that only what changed
    is compiled again, and with the compilers' output in view.
    """
    folder = ROOT / "build" / "wheel"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    code = f"import scikit_build_core.build as b; b.build_wheel({str(folder)!r}, {settings!r})"
    path = f"{python.parent}{os.pathsep}{os.environ['PATH']}"  # for cmake and ninja from PyPI
    command = [str(python), "-c", code]
    if subprocess.run(command, cwd=ROOT, env={**os.environ, "PATH": path}).returncode != 0:
        raise SystemExit("setup: the build failed; what CMake or the compiler said is above")
    return next(folder.glob("*.whl"))


def install(python: Path, extras: str, kernels: str, instances: str, torch: str | None) -> None:
    """Installs the build requirements, builds the project and installs it with its requirements."""
    needed = read_list("requires", (ROOT / "pyproject.toml").read_text())
    cutlass = next(line for line in needed if line.startswith("nvidia-cutlass"))
    tools = [line for line in needed if line != cutlass]
    if not has_cmake():
        tools.append("cmake>=" + ".".join(map(str, OLDEST_CMAKE)))
    if shutil.which("ninja") is None:
        tools.append("ninja")
    say("installing the build requirements")
    pip(python, "--quiet", *tools)

    settings = {
        "cmake.define.HOPPER_ATTENTION_KERNELS": kernels,
        "cmake.define.HOPPER_ATTENTION_INSTANCES": instances,
    }
    if kernels == "OFF":
        settings["build-dir"] = "build/{wheel_tag}-cpu"  # and leave the compiled kernels alone
    elif find_nvcc() is not None:
        source = fetch_cutlass(python, cutlass)
        settings["cmake.define.HOPPER_ATTENTION_CUTLASS_DIR"] = str(source)
    say("building hopper-attention")
    wheel = build_wheel(python, settings)

    constraint: list[str] = []
    if torch is None and not card_capabilities():
        constraint = ["--constraint", str(ROOT / "tools" / "constraints-cpu.txt")]
    say("installing hopper-attention and what it requires")
    pip(python, *constraint, f"{wheel}[{extras}]")
    # The version stays the same while the code changes: pip is told to install it all the same.
    pip(python, "--quiet", "--no-deps", "--force-reinstall", str(wheel))


def main() -> None:
    """Reads the command line and does the work."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv")
    parser.add_argument("--extras", default="demo", help="optional dependencies: demo,dev")
    parser.add_argument("--kernels", choices=["auto", "on", "off", "card"], default="auto")
    parser.add_argument(
        "--only", metavar="EXTRA", help="install this extra's packages, and build nothing"
    )
    parser.add_argument("--instances", default=".*", help="regular expression on instance names")
    args = parser.parse_args()
    if sys.version_info < (3, 10):  # noqa: UP036 (this script meets any Python)
        raise SystemExit(
            f"Python {sys.version.split()[0]} is too old: 3.10 or newer is needed. "
            "Name one: make PYTHON=python3.12"
        )
    if Path(sys.prefix).resolve() == args.venv.resolve():
        # .venv is active: what makes it is the Python it was made from.
        base = os.path.join(sys.base_prefix, "bin", "python{}.{}".format(*sys.version_info))
        os.execv(base, [base, *sys.argv])
    text = (ROOT / "pyproject.toml").read_text()
    torch = base_torch(read_list("dependencies", text))
    if torch is not None:
        say(f"this Python already has PyTorch {torch}, which is used as it is")
    python = args.venv / "bin" / "python"
    if not venv_is_usable(python):
        make_venv(args.venv, system_site=torch is not None)
    try:
        if args.only:
            pip(python, "--quiet", *read_list(args.only, text))
            return
        kernels = choose_kernels(args.kernels)
        install(python, args.extras, kernels, args.instances, torch)
    except subprocess.CalledProcessError as error:
        raise SystemExit(f"setup: this command failed: {shlex.join(error.cmd)}") from None


if __name__ == "__main__":
    main()
