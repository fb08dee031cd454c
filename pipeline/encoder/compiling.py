"""`torch.compile` of a job's network: which families it takes, what it needs here, costs and saves, what the user set. Imports no torch."""

from __future__ import annotations

import getpass
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from model.registry import PRESETS, family_of, resolve
from pipeline.errors import BuildError, ConfigError, StorageUnavailable
from pipeline.process.scratch import ScratchFolder

_COMPILE_S = {"ivvae": 180.0}  # of others 60: 7 to 82 were measured, by network and CPU
_SAVED_CORE_S = {"leanvae": 0.066, "wfvae": 1.0, "wfvae2": 1.0, "ivvae": 1.2}
# Parameters of the encoder in float32, MB, of every preset. A constant, since the driver builds no network.
_ENCODER_MB = {
    **{"leanvae-dim4": 46, "leanvae-dim16": 46, "leanvae-mini-dim16": 4},
    **{"leanvae-wan21-dim16": 46, "leanvae-wan22-dim48": 139},
    **{f"wfvae-{size}-{d}ch": mb for size, mb in (("s", 152), ("m", 238), ("l", 339)) for d in (4, 8, 16, 32)},
    "wfvae-m-888-32ch": 241,
    **{"ivvae-z4": 180, "ivvae-z8": 180, "ivvae-z16": 182, "ivvae-z16-dim96": 407},
}
_LIKE = {"wfvae2": "wfvae"}  # has no preset
COMPILE_THREADS = 4  # Inductor starts a process for each, which imports torch
TRIAL_S = 120.0  # for a compiler to answer; half a second is usual
_TRIAL = b"#include <Python.h>\n#include <omp.h>\n#include <vector>\nint threads() { return omp_get_max_threads(); }\n"
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


def saved_core_s(network: str) -> float | None:
    """Core seconds that compiled steps save for a megapixel of video on a CPU, in float32 or bfloat16, whichever saves less; None for a
    family that was not measured. WFVAE2 was not and counts as WF-VAE. `python -m benchmarks.compiled` measures again.
    """
    return _SAVED_CORE_S.get(family_of(network).name)


def compile_s(network: str) -> float:
    """Seconds to compile the steps of one frame size on two cores, about."""
    return _COMPILE_S.get(family_of(network).name, 60.0)


def packed_bytes(network: str, compute_dtype: str) -> int:
    """Bytes of weights that the compiled steps of one frame size hold on a CPU, about: Inductor packs them for the number of rows of each
    product, so that a video's first step and its later ones share none.
    """
    floats = 1 if compute_dtype in ("float32", "float64") else 2
    return 2 * _encoder_mb(network) * 1_000_000 // floats


def _encoder_mb(network: str) -> int:
    """The figure of a preset, or the largest of a family's presets."""
    if (mb := _ENCODER_MB.get(resolve(network))) is not None:
        return mb
    family = _LIKE.get(name := family_of(network).name, name)
    return max(mb for preset, mb in _ENCODER_MB.items() if PRESETS[preset].family == family)


def missing_compiler(device: str, *, tried: bool = True) -> str | None:
    """What this machine lacks to compile for `device`, and what to do about it; None if it has everything.

    With `tried` the C++ compiler also has to compile a few lines, which may fail for a reason that passes, such as a full disk.
    """
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
    if not header.exists():
        return f"Python's headers were not found ({header}); install python3-dev"
    try:
        if tried:
            _try_compiler(compilers["C++"])
    except StorageUnavailable as error:
        return f"the C++ compiler cannot be tried: {error}"
    except (OSError, subprocess.SubprocessError) as error:
        return f"the C++ compiler {compilers['C++']} does not work: {error}"
    return None


@cache  # of a success; after an error the next call tries again
def _try_compiler(compiler: str) -> None:
    """Compiles a library that uses Python's headers and OpenMP, as Inductor's do. Tried before an output is begun: `auto` could not go back
    to eager latents later.

    Raises:
        OSError, SubprocessError: it cannot.
        StorageUnavailable: there is no room for the library.
    """
    with ScratchFolder() as folder:
        command = [compiler, "-shared", "-fPIC", "-fopenmp", f"-I{sysconfig.get_path('include')}"]
        command += ["-x", "c++", "-", "-o", str(folder / "trial.so")]
        done = subprocess.run(command, input=_TRIAL, capture_output=True, timeout=TRIAL_S, check=False)
    if done.returncode != 0:
        said = done.stderr.decode(errors="replace").splitlines()
        line = next((line for line in said if "error" in line), f"it ended with status {done.returncode}")
        raise subprocess.SubprocessError(line)


def check_compiled(error: Exception, advice: str) -> None:
    """Raises BuildError for a failure of `torch.compile`; returns for any other error. No video is to blame, and no other encoder would do
    better. `advice`: what to do, unless a compiled kernel of the shared folder is damaged.
    """
    exceptions = sys.modules.get("torch._dynamo.exc")  # imported where anything was compiled
    if exceptions is None or not isinstance(error, exceptions.TorchDynamoException):
        return
    inner = getattr(error, "inner_exception", None)
    # The compiler's output, without its long command.
    text = str(error) if inner is None else f"{type(inner).__name__}: {getattr(inner, 'output', inner)}"
    line = " ".join(text.split())[:400]
    # A linker that was killed leaves a part of a library, which no later build replaces.
    if isinstance(inner, ImportError):
        advice = (
            f"delete the folder {os.environ.get('TORCHINDUCTOR_CACHE_DIR', '')} (TORCHINDUCTOR_CACHE_DIR) and run again"
        )
        raise BuildError(f"engine.compile: a compiled kernel cannot be loaded: {line}; {advice}") from error
    raise BuildError(f"engine.compile: torch.compile failed: {line}; {advice}") from error


def user_settings() -> str:
    """Variables of the environment that change what Inductor makes, such as `TORCHINDUCTOR_MAX_AUTOTUNE=1`, in order."""
    found = {name: value for name, value in os.environ.items() if name.startswith(_SETTINGS) and name not in _OURS}
    return " ".join(f"{name}={value}" for name, value in sorted(found.items()))


def prepare_compiler(device: str, threads: int | None) -> None:
    """Prepares this process for compiling, before torch reads its environment: a folder for what is compiled, and few processes.

    Encoders of one machine share the folder, so that what one has compiled the others load.

    Raises:
        ConfigError: a compiler is missing here, or the folder cannot be written.
    """
    if (missing := missing_compiler(device)) is not None:
        raise ConfigError(
            f"engine.compile: the network is to be compiled, and {missing}. Without compiling, latents have other bits than the rest of "
            "the output; engine.compile=off needs another output"
        )
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(min(threads or os.cpu_count() or 1, COMPILE_THREADS)))
    folder = os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", _cache_folder())
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as trial:
            trial.write(bytes(1 << 16))
    except OSError as error:
        raise ConfigError(
            f"engine.compile: compiled kernels cannot be written to {folder}: {error}; make room, or name another folder in "
            "TORCHINDUCTOR_CACHE_DIR"
        ) from error


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
