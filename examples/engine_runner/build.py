"""Compile the C++ runner against the installed torch: `python build.py [OUTPUT]`, without CMake."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch
from torch.utils import cpp_extension

HERE = Path(__file__).resolve().parent


def build(output: Path) -> None:
    """Compile and link main.cpp; the binary finds torch's libraries where they are now."""
    libraries = Path(torch.__file__).parent / "lib"
    wanted = ["torch", "torch_cpu", "c10"]
    if torch.version.cuda:
        wanted += ["torch_cuda", "c10_cuda"]
    abi = int(torch._C._GLIBCXX_USE_CXX11_ABI)
    command = [
        os.environ.get("CXX", "g++"), "-std=c++20", "-O1", f"-D_GLIBCXX_USE_CXX11_ABI={abi}",
        *(f"-isystem{path}" for path in cpp_extension.include_paths()),
        str(HERE / "main.cpp"), "-o", str(output), f"-L{libraries}", f"-Wl,-rpath,{libraries}",
        "-Wl,--no-as-needed", *(f"-l{name}" for name in wanted),
    ]  # fmt: skip
    subprocess.run(command, check=True)


if __name__ == "__main__":
    build(Path(sys.argv[1] if len(sys.argv) > 1 else HERE / "engine_runner"))
