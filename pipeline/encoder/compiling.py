"""`torch.compile` of a job's network: which families it takes, what it needs here, costs and saves, what the user set. Imports no torch."""

from __future__ import annotations

import getpass
import os
import shutil
import sysconfig
import tempfile
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from model.registry import family_of
from pipeline.errors import ConfigError
from pipeline.process.scratch import ScratchFolder

COMPILE_S = 60.0
"""Seconds to compile the steps of one frame size on two cores: 7 to 54 were measured, by network."""
_SAVED_CORE_S = {"leanvae": 0.066, "wfvae": 1.0, "wfvae2": 1.0, "ivvae": 16.0}
COMPILE_THREADS = 4  # Inductor starts a process for each, which imports torch
_SWITCHES_OFF = (
    "TORCH_COMPILE_DISABLE",
    "TORCHDYNAMO_DISABLE",
)  # with either torch.compile returns the eager function, in silence
_SETTINGS = ("TORCHINDUCTOR_", "TORCHDYNAMO_", "TORCH_COMPILE_")
_OURS = {"TORCHINDUCTOR_COMPILE_THREADS", "TORCHINDUCTOR_CACHE_DIR"}  # change no code


def why_never_compiled(network: str) -> str | None:
    """Why `torch.compile` does not take this network; None if it does."""
    if family_of(network).compiles:
        return None
    return f"{network} is a network of diffusers, which is not compiled"


def saved_core_s(network: str) -> float:
    """Core seconds that compiled steps save for a megapixel of video on a CPU, in the slower of float32 and bfloat16. WFVAE2 was not
    measured and counts as WF-VAE. `python -m benchmarks.compiled` measures again.
    """
    return _SAVED_CORE_S[family_of(network).name]


def missing_compiler(device: str) -> str | None:
    """What this machine lacks to compile for `device`, and what to do about it; None if it has everything."""
    for name in _SWITCHES_OFF:
        if os.environ.get(name) == "1":
            return f"torch.compile is switched off by {name}=1 in the environment; unset it"
    compilers = {"C++": os.environ.get("CXX", "g++")}
    if device.startswith("cuda"):
        if find_spec("triton") is None:
            return "Triton is not installed; install the package triton"
        compilers["C"] = os.environ.get("CC", "gcc")  # for Triton's launchers
    for language, name in compilers.items():
        if shutil.which(name) is None:
            return f"no {language} compiler was found ({name}); install {name}"
    header = Path(sysconfig.get_path("include"), "Python.h")
    return None if header.exists() else f"Python's headers were not found ({header}); install python3-dev"


def user_settings() -> str:
    """Variables of the environment that change what Inductor makes, such as `TORCHINDUCTOR_MAX_AUTOTUNE=1`, in order."""
    found = {name: value for name, value in os.environ.items() if name.startswith(_SETTINGS) and name not in _OURS}
    return " ".join(f"{name}={value}" for name, value in sorted(found.items()))


def prepare_compiler(device: str, threads: int | None) -> None:
    """Prepares this process for compiling, before torch reads its environment: a folder for what is compiled, and few processes.

    Encoders of one machine share the folder, so that what one has compiled the others load.

    Raises:
        ConfigError: a compiler is missing here.
    """
    if (missing := missing_compiler(device)) is not None:
        raise ConfigError(
            f"engine.compile: the network is to be compiled, and {missing}. Without compiling, latents have other bits than the rest of "
            "the output; engine.compile=off needs another output"
        )
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(min(threads or os.cpu_count() or 1, COMPILE_THREADS)))
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", _cache_folder())


@cache
def _cache_folder() -> str:
    """The folder torch would take, if it is this user's alone: torch unpickles what is there. Otherwise one for this process."""
    try:
        name = getpass.getuser()
    except (KeyError, OSError):  # a user without an entry in /etc/passwd, as in containers
        name = f"uid_{os.getuid()}"
    folder = Path(tempfile.gettempdir(), f"torchinductor_{name}")
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
    except OSError:
        return _own_folder().path
    found = folder.lstat()
    ours = found.st_uid == os.getuid() and not folder.is_symlink() and not found.st_mode & 0o022
    return str(folder) if ours and os.access(folder, os.W_OK) else _own_folder().path


@cache
def _own_folder() -> ScratchFolder:
    """Deleted by the next process of this user that makes such a folder."""
    return ScratchFolder()
