"""Reads checkpoints: a URI becomes tensors by published key. No code in a file is executed unless the caller allows it.

Takes a local path, `hf://owner/repo/file[@revision]`, `embedded://NAME` (weights that ship with this package), or a URI whose scheme has a
registered fetcher (entry-point group `lathe.checkpoint_fetchers`: a function `fetch(uri) -> local path`, FileNotFoundError if there is no
such object). Returns tensors by published key, the configuration in the file or in the `config.json` beside it (if any), and a
`CheckpointInfo`.

Layouts: `{args, state_dict}` (the authors' files), Lightning training checkpoints (`autoencoder.` prefix; discriminator and perceptual
network are skipped), training checkpoints with averaged weights (`ema_state_dict`) or a generator beside a discriminator, plain mappings
of tensors, and safetensors with the configuration in the metadata or in a `config.json` beside the file.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import os
import pickle
import re
import zipfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from model.weights import as_dtype, check_finite

if TYPE_CHECKING:
    from collections.abc import Mapping

EMBEDDED = Path(__file__).with_name("weights")
FETCHERS = "lathe.checkpoint_fetchers"
TRAINED_PREFIX = "autoencoder."
TRAINING_ONLY = ("gan_loss.", "perceptual_model.")
SAFE_CLASSES = (argparse.Namespace,)  # the authors' files hold their options in one; it contains attributes only


@dataclass(frozen=True, slots=True)
class CheckpointInfo:
    """File that weights were read from."""

    uri: str
    sha256: str  # of the file
    num_bytes: int
    layout: str  # "official" | "training" | "averaged" | "generator" | "tensors" | "safetensors"

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Contents of a checkpoint file, not yet compared with a network."""

    weights: dict[str, torch.Tensor] = field(repr=False)
    config: dict[str, Any] | None
    info: CheckpointInfo


def read(uri: str, *, want_config: bool = True, trust_pickle: bool = False) -> Checkpoint:
    """Fetches a checkpoint and reads its tensors and configuration.

    Args:
        uri: see the module docstring; a folder with one weight file and a `config.json` also works.
        want_config: for a remote file without a configuration, also fetch the `config.json` beside it.
        trust_pickle: unpickle without restriction. The file can then run any code; only `convert` passes this on.

    Raises:
        FileNotFoundError: the file does not exist.
        OSError: it cannot be read.
        ValueError: unknown scheme, damaged file, unknown layout, or a file that needs full unpickling.
        ConnectionError: the hub refused access or could not be reached.
    """
    try:
        return _read(uri, want_config, trust_pickle)
    except OSError as error:
        if error.errno is None:  # raised here, with its explanation
            raise
        message = f"checkpoint {uri} cannot be read: {error.strerror}; check the path and its permissions"
        raise type(error)(message) from error


def _read(uri: str, want_config: bool, trust_pickle: bool) -> Checkpoint:
    path = _weight_file(fetch(uri))
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if path.suffix == ".safetensors":
        weights, config = _read_safetensors(path)
        layout = "safetensors"
    else:
        weights, config, layout = _unwrap(_read_pickle(path, trust=trust_pickle), path)
    if config is None:
        config = _sidecar(path)
    if config is None and want_config:
        config = _remote_sidecar(uri)
    return Checkpoint(weights, config, CheckpointInfo(uri, digest, path.stat().st_size, layout))


def convert(
    path: str | Path, out: str | Path, *, trust_pickle: bool = False, dtype: torch.dtype | str | None = None
) -> CheckpointInfo:
    """Converts a checkpoint to safetensors, with its configuration and origin in the metadata.

    Args:
        path: any checkpoint that `read` accepts.
        out: the new file, `.safetensors`; written under a temporary name and renamed when complete.
        trust_pickle: allow full unpickling, which can run any code in the file. Only for files whose source you trust.
        dtype: dtype of the stored floating-point weights; None keeps theirs.

    Returns:
        Layout and hash of the source file.

    Raises:
        OSError: `out` cannot be written.
        ValueError: as for `read`, and for weights that are not finite in `dtype`.
        The other errors of `read`.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    target = Path(out)
    if target.suffix != ".safetensors":
        raise ValueError(f"the output must be a .safetensors file, got {str(out)!r}")
    if not target.absolute().parent.is_dir():
        raise FileNotFoundError(f"folder of {out} does not exist; create it, or give another path")
    source = read(str(path), trust_pickle=trust_pickle)
    kind = None if dtype is None else as_dtype(dtype)
    weights = {
        key: value.to(kind) if kind is not None and value.is_floating_point() else value
        for key, value in source.weights.items()
    }
    floats = {key: value for key, value in weights.items() if value.is_floating_point()}  # counters of norms are not
    check_finite(str(path) if kind is None else f"{path} as {kind}", floats)
    metadata = {"format": "pt", "source_sha256": source.info.sha256, "source_layout": source.info.layout}
    if source.config is not None:
        plain = {key: value for key, value in source.config.items() if _is_json(value)}
        metadata["config"] = json.dumps(plain, sort_keys=True)
    partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
    # clones, because safetensors refuses tensors that share one storage
    copies = {key: value.detach().clone().contiguous() for key, value in weights.items()}
    try:
        save_file(copies, partial, metadata=metadata)
        partial.replace(target)
    except (SafetensorError, OSError) as error:
        partial.unlink(missing_ok=True)
        raise OSError(f"{out} cannot be written ({error}); give another path") from error
    return source.info


def check_same_config(name: str, preset: Mapping[str, Any], found: Mapping[str, Any], uri: str) -> None:
    """Raises ValueError if the configuration in a checkpoint contradicts the preset it is loaded as."""
    different = [
        f"{key} is {found[key]!r}, not {value!r}"
        for key, value in preset.items()
        if key in found and found[key] != value
    ]
    if different:
        raise ValueError(
            f"{uri} is not {name}: its own configuration says {', '.join(different)}. Use the matching preset, or the family name"
        )


def _is_json(value: Any) -> bool:
    return value is None or isinstance(value, (bool, int, float, str, list, tuple))


# ---- locating the file ----------------------------------------------------------------------------------------------


def fetch(uri: str) -> Path:
    """Local path of `uri`, downloaded if needed. Raises as `read` does."""
    scheme = _scheme(uri)
    if scheme == "file":
        path = Path(re.sub("(?i)^file://", "", uri)).expanduser()
        if not path.exists():
            raise FileNotFoundError(f"no checkpoint at {path}; expected a .ckpt, .pth, .pt or .safetensors file")
        return path
    if scheme == "embedded":
        return _embedded(uri[len("embedded://") :])
    if scheme == "hf":
        return _from_hub(*_hub_parts(uri))
    for entry in importlib.metadata.entry_points(group=FETCHERS, name=scheme):
        return Path(entry.load()(uri))
    others = sorted({entry.name for entry in importlib.metadata.entry_points(group=FETCHERS)})
    raise ValueError(
        f"cannot fetch {uri}: no fetcher for {scheme}://; expected a local path, hf://, embedded://, "
        f"{', '.join(f'{other}://' for other in others)}"
    )


def _scheme(uri: str) -> str:
    match = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", uri)
    return match[1].lower() if match else "file"


def _embedded(name: str) -> Path:
    known = sorted(path.parent.name for path in EMBEDDED.glob("*/model.safetensors"))
    if name not in known:
        raise FileNotFoundError(f"no weights named {name!r} ship with this package; expected one of {', '.join(known)}")
    return EMBEDDED / name


def _hub_parts(uri: str) -> tuple[str, str, str | None]:
    match = re.fullmatch(r"hf://([^/@]+/[^/@]+)/([^@]+?)(?:@([^@]+))?", uri)
    if not match:
        raise ValueError(f"expected hf://owner/repo/file[@revision], got {uri!r}")
    return match[1], match[2], match[3]


def _from_hub(repo: str, filename: str, revision: str | None) -> Path:
    from huggingface_hub import errors, hf_hub_download

    location = f"hf://{repo}/{filename}" + (f"@{revision}" if revision else "")
    try:
        # huggingface_hub reads HF_ENDPOINT once, at import; a running program may set it later
        return Path(hf_hub_download(repo, filename, revision=revision, endpoint=os.environ.get("HF_ENDPOINT") or None))
    except errors.LocalEntryNotFoundError as error:
        refusal = error.__cause__
        what = (
            f"answered {refusal.response.status_code}"
            if isinstance(refusal, errors.HfHubHTTPError)
            else "could not be reached"
        )
        raise ConnectionError(
            f"{location} is not in the local cache and the hub {what}; check the network, HF_ENDPOINT and "
            "HF_HUB_OFFLINE, or download the file and give its path"
        ) from error
    except (errors.EntryNotFoundError, errors.RevisionNotFoundError) as error:
        raise FileNotFoundError(f"{location}: the repository has no such file or revision") from error
    except errors.GatedRepoError as error:
        raise ConnectionError(
            f"{location}: access is restricted; request it on the repository's page, then log in with `hf auth login`"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"{location}: no such repository, or it is private and you are not logged in (`hf auth login`)"
        ) from error
    except errors.HfHubHTTPError as error:
        raise ConnectionError(f"{location}: the hub answered {error.response.status_code}; try again later") from error


def _remote_sidecar(uri: str) -> dict[str, Any] | None:
    """`config.json` from the folder of a remote file, or None if there is none."""
    scheme = _scheme(uri)
    if scheme in ("file", "embedded"):
        return None
    try:
        if scheme == "hf":
            repo, filename, revision = _hub_parts(uri)
            path = _from_hub(repo, (Path(filename).parent / "config.json").as_posix(), revision)
        else:
            path = fetch(f"{uri.rpartition('/')[0]}/config.json")
    except FileNotFoundError:
        return None
    return _parse_config(path.read_bytes(), path)


def _weight_file(path: Path) -> Path:
    if not path.is_dir():
        return path
    if any(path.glob("*.safetensors.index.json")):
        count = len(list(path.glob("*.safetensors")))
        raise ValueError(
            f"{path} holds sharded weights ({count} .safetensors files and an index); save them as one file "
            "(diffusers: save_pretrained with max_shard_size='100GB')"
        )
    patterns = ["*.safetensors", "*.ckpt", "*.pth", "*.pt"]
    if (path / "config.json").is_file():
        # in a training folder, the authors' code loads the checkpoint, not a safetensors file exported earlier
        patterns.sort(key="*.ckpt".__ne__)
    for pattern in patterns:
        files = sorted(path.glob(pattern))
        if len(files) == 1:
            return files[0]
        if files:
            raise ValueError(f"{path} holds {len(files)} {pattern} files; give the path of one of them")
    raise FileNotFoundError(f"no .safetensors, .ckpt, .pth or .pt file in {path}")


# ---- contents of the file -------------------------------------------------------------------------------------------


def _read_safetensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any] | None]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
    except SafetensorError as error:
        raise ValueError(f"{path} is not a readable safetensors file ({error}); download it again") from error
    config = metadata.get("config")
    return weights, None if config is None else _parse_config(config, path)


def _sidecar(path: Path) -> dict[str, Any] | None:
    beside = path.with_name("config.json")
    return _parse_config(beside.read_bytes(), beside) if beside.is_file() else None


def _parse_config(text: str | bytes, path: Path) -> dict[str, Any]:
    try:
        config = json.loads(text)
    except ValueError as error:
        raise ValueError(f"the configuration in {path} is not JSON ({error})") from error
    if not isinstance(config, dict):
        raise ValueError(f"the configuration in {path} must be a JSON object, got {type(config).__name__}")
    return config


def _read_pickle(path: Path, *, trust: bool) -> Any:
    mapped = zipfile.is_zipfile(path)  # training checkpoints carry optimizer states several times the network's size
    try:
        if trust:
            return torch.load(path, map_location="cpu", weights_only=False, mmap=mapped)
        with torch.serialization.safe_globals(list(SAFE_CLASSES)):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        needs = _unsafe_globals(path, error)
        if not needs:
            raise ValueError(
                f"{path} is not a readable checkpoint ({_first_line(error)}); download it again"
            ) from error
        raise ValueError(
            f"{path} needs full unpickling, which can run any code in it: it refers to {', '.join(needs)}. Ask for a .safetensors "
            f"copy, or, if you trust its source, convert it once: lathe convert-checkpoint {path} OUT.safetensors --trust-pickle"
        ) from error
    except Exception as error:
        raise ValueError(f"{path} is not a readable checkpoint ({_first_line(error)}); download it again") from error


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:200]


def _unsafe_globals(path: Path, error: Exception) -> list[str]:
    """First ten class names that a restricted load would have to allow; empty if the file is damaged instead."""
    if zipfile.is_zipfile(path):
        with torch.serialization.safe_globals(list(SAFE_CLASSES)):
            return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))[:10]
    return re.findall(r"GLOBAL (\S+)", str(error))[:1]


def _unwrap(raw: Any, path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any] | None, str]:
    """(tensors, configuration, layout) of an unpickled checkpoint."""
    if not isinstance(raw, dict):
        raise ValueError(f"{path} holds a {type(raw).__name__}; expected a dict with state_dict, or a dict of tensors")
    if raw.get("ema_state_dict") not in (None, {}):
        averaged = _tensors(raw["ema_state_dict"], path)
        return {key.replace("module.", ""): t for key, t in averaged.items()}, _options(raw, path), "averaged"
    if "state_dict" not in raw:
        return _tensors(raw, path), None, "tensors"
    if isinstance(raw["state_dict"], dict) and isinstance(raw["state_dict"].get("gen_model"), dict):
        return _tensors(raw["state_dict"]["gen_model"], path), _options(raw, path), "generator"
    weights = _tensors(raw["state_dict"], path)
    if any(key.startswith(TRAINED_PREFIX) for key in weights):
        kept = {key.removeprefix(TRAINED_PREFIX): t for key, t in weights.items() if not key.startswith(TRAINING_ONLY)}
        return kept, _options(raw, path), "training"
    return weights, _options(raw, path), "official"


def _tensors(mapping: Any, path: Path) -> dict[str, torch.Tensor]:
    if not isinstance(mapping, dict) or not mapping:
        got = "an empty dict" if isinstance(mapping, dict) else f"a {type(mapping).__name__}"
        raise ValueError(f"{path} holds no tensors: got {got}; expected a dict of names and tensors")
    others = [str(key) for key, value in mapping.items() if not isinstance(value, torch.Tensor)]
    if others:
        raise ValueError(
            f"{path} has an unknown layout: these entries are not tensors: {', '.join(others[:10])}; expected a dict with state_dict"
        )
    unnamed = [repr(key) for key in mapping if not isinstance(key, str)]
    if unnamed:
        raise ValueError(f"{path} has keys that are not names: {', '.join(unnamed[:10])}; expected names of tensors")
    unusual = [key for key, value in mapping.items() if (value.layout, value.device.type) != (torch.strided, "cpu")]
    if unusual:
        raise ValueError(
            f"{path} has tensors that are sparse or without values (meta): {', '.join(unusual[:10])}; save them as dense tensors"
        )
    return dict(mapping)


def _options(raw: dict[str, Any], path: Path) -> dict[str, Any] | None:
    options = raw.get("args")
    if options is None or isinstance(options, dict):
        return options
    if isinstance(options, argparse.Namespace):
        return vars(options)
    raise ValueError(f"{path}: args must be a dict or argparse.Namespace, got {type(options).__name__}")
