"""Files of an encoder as transformers saves them, fetched to a local folder; and what the encoder is: parts of the set's fingerprint.

Hashes are of the values of all weights, whatever files they are in, of the configuration, and of the tokenizer's files. No torch.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import re
import secrets
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import CheckpointError
from pipeline.records import stable_hash
from pipeline.sidecars.description import SidecarSet, TensorKind
from pipeline.sidecars.names import BY_CAPTION, BY_ID
from pipeline.storage import is_remote, open_store
from pipeline.storage.checkpoints import cache_folder, fetch

if TYPE_CHECKING:
    from pipeline.config import EmbedJob, StorageConfig

MODEL_TYPES = {
    "t5": ("t5", "mt5", "umt5"),
    "umt5": ("umt5",),
    "clip": ("clip", "clip_text_model", "clip_vision_model"),
    "gemma": ("gemma", "gemma2", "gemma3", "gemma3_text"),
    "qwen2.5-vl": ("qwen2_5_vl", "qwen2_5_vl_text"),
    "siglip": ("siglip", "siglip_vision_model"),
}
"""`model_type` of the configurations that a kind of encoder reads."""
MAX_TOKENS = {"clip": 77}
DEFAULT_TOKENS = 512
NUMERICS = 1  # raised whenever a stored value could change
WANTED = re.compile(r"[^/]*\.(json|safetensors|model|txt|jinja)")
TOKENIZER_FILES = (
    "tokenizer.json",
    "spiece.model",
    "tokenizer.model",
    "sentencepiece.bpe.model",
    "vocab.json",
    "merges.txt",
)
BESIDE_TOKENIZER = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
PROCESSOR_FILES = ("preprocessor_config.json",)
NOT_IDENTITY = {"transformers_version", "_name_or_path", "architectures", "dtype", "torch_dtype", "use_cache"}
_HUB = re.compile(r"hf://(?P<repo>[^/@]+/[^/@]+)(?:/(?P<folder>[^@]+?))?/?(?:@(?P<revision>[^@]+))?")


@dataclass(frozen=True, slots=True)
class EncoderFiles:
    """Local folders of weights and of the tokenizer (or image processor), and the weights' configuration."""

    weights: Path
    tokenizer: Path
    config: dict[str, Any]


def find_files(job: EmbedJob) -> EncoderFiles:
    """Fetches what is remote and checks that all files are there.

    Raises:
        CheckpointError: a file is missing, weights that are not safetensors, another kind of model.
        AccessError, StorageUnavailable: the store refuses or fails.
    """
    weights = local_folder(job.checkpoint, job.storage)
    tokenizer = weights if job.tokenizer is None else local_folder(job.tokenizer, job.storage)
    try:
        config = json.loads((weights / "config.json").read_bytes())
        kind = config["model_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"checkpoint {job.checkpoint}: no config.json with a model_type ({error}); expected a folder as transformers saves it"
        ) from None
    if kind not in MODEL_TYPES[job.encoder]:
        raise CheckpointError(
            f"checkpoint {job.checkpoint} is a model of type {kind!r}; --encoder {job.encoder} reads {', '.join(MODEL_TYPES[job.encoder])}"
        )
    files = PROCESSOR_FILES if job.from_column else TOKENIZER_FILES
    if not any((tokenizer / name).is_file() for name in files):
        what = "image processor" if job.from_column else "tokenizer"
        raise CheckpointError(
            f"{job.tokenizer or job.checkpoint} has no {what}: none of {', '.join(files)}; give its folder as --tokenizer"
        )
    weight_files(weights)
    return EncoderFiles(weights, tokenizer, config)


def describe(job: EmbedJob, files: EncoderFiles) -> SidecarSet:
    """The set that this job makes: its tensors, and everything that can change them. Reads all weights.

    Raises:
        CheckpointError: weights or configuration that cannot be read.
    """
    parts: dict[str, Any] = {
        "encoder": job.encoder,
        "model_type": files.config["model_type"],
        "config": stable_hash({name: value for name, value in files.config.items() if name not in NOT_IDENTITY}),
        "weights_sha256": hash_weights(files.weights),
        "layer": job.layer,
        "compute_dtype": job.compute_dtype,
        "dtype": job.dtype,
        "numerics": NUMERICS,
    }
    if job.from_column is None:
        parts |= {
            "tokenizer": _hash_files(files.tokenizer, (*TOKENIZER_FILES, *BESIDE_TOKENIZER)),
            "template": job.template,
            "skip_tokens": job.skip_tokens,
            "max_tokens": max_tokens(job),
        }
    else:
        parts |= {"image_processor": _hash_files(files.tokenizer, PROCESSOR_FILES), "from": job.from_column}
    width = _width(files.config, images=job.from_column is not None, where=job.checkpoint)
    tensors = {"embedding": TensorKind(job.dtype, (None, width))}
    if job.encoder in ("clip", "siglip"):
        tensors["pooled"] = TensorKind(job.dtype, (width,))
    return SidecarSet(job.set_name, BY_CAPTION if job.from_column is None else BY_ID, tensors, parts)


def max_tokens(job: EmbedJob) -> int:
    """Tokens of a text that are stored."""
    return job.max_tokens or MAX_TOKENS.get(job.encoder, DEFAULT_TOKENS)


def local_folder(uri: str, storage: StorageConfig) -> Path:
    """Local folder with the files at `uri`, fetched if it is remote.

    Raises:
        CheckpointError: no such folder.
        AccessError, StorageUnavailable: the store refuses or fails.
    """
    if uri.partition("://")[0] == "hf":
        return _from_hub(uri)
    if is_remote(uri):
        return _from_store(uri, storage)
    store = open_store(uri, storage)
    folder = Path(store.root)
    if not folder.is_dir():
        raise CheckpointError(f"checkpoint {uri} is not a folder; expected one with config.json and safetensors")
    return folder


def _from_hub(uri: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    match = _HUB.fullmatch(uri)
    if match is None:
        raise CheckpointError(f"checkpoint {uri}: expected hf://owner/repo[/folder][@revision]")
    inside = f"{match['folder']}/" if match["folder"] else ""
    patterns = [f"{inside}*.{suffix}" for suffix in ("json", "safetensors", "model", "txt", "jinja")]
    try:
        root = snapshot_download(match["repo"], revision=match["revision"], allow_patterns=patterns)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(f"checkpoint {uri} cannot be fetched: {' '.join(str(error).split())[:300]}") from None
    return Path(root) / inside


def _from_store(uri: str, storage: StorageConfig) -> Path:
    """A folder of links to cached copies of the objects. Another version of an object is another folder."""
    store = open_store(uri, storage)
    found = [info for info in store.list("", recursive=False) if WANTED.fullmatch(info.key)]
    if not found:
        raise CheckpointError(f"checkpoint {uri} has no object such as config.json", uri=uri)
    try:
        copies = {info.key: Path(fetch(store.uri(info.key), storage)) for info in found}
    except FileNotFoundError as error:  # deleted since it was listed
        raise CheckpointError(f"checkpoint {uri}: {error}", uri=uri) from None
    folder = cache_folder() / "encoders" / stable_hash(sorted(map(str, copies.values())))
    if not folder.is_dir():
        made = folder.with_name(f"{folder.name}.{secrets.token_hex(8)}.part")  # each actor of a machine makes its own
        made.mkdir(parents=True)
        for name, path in copies.items():
            (made / name).symlink_to(path)
        try:
            made.replace(folder)
        except OSError:
            shutil.rmtree(made)
            if not folder.is_dir():  # else another process was first
                raise
    return folder


def weight_files(folder: Path) -> list[Path]:
    """Files of the weights that transformers loads from a folder: others, such as `model.fp16.safetensors` beside them, do not count.

    Raises:
        CheckpointError: there are none, or not all that the index names.
    """
    if (single := folder / "model.safetensors").is_file():
        return [single]
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{index} cannot be read as an index of weights: {error!r}") from None
        if missing := [name for name in names if not (folder / name).is_file()]:
            raise CheckpointError(
                f"checkpoint {folder} lacks {len(missing)} of {len(names)} files, such as {missing[0]}"
            )
        return [folder / name for name in names]
    if pickles := sorted(path.name for path in folder.glob("*.bin")):
        there = f"{pickles[0]} is pickle, which is not read: convert it to safetensors"
    else:
        there = f"there are {', '.join(sorted(path.name for path in folder.iterdir())[:10]) or 'no files'}"
    raise CheckpointError(f"checkpoint {folder} has no {single.name}, and no index of its parts; {there}")


def hash_weights(folder: Path) -> str:
    """Hex SHA-256 over name, type, shape and bytes of every tensor, by name, whatever file it is in.

    Raises:
        CheckpointError: a file that is not safetensors.
    """
    places: dict[str, tuple[Path, dict[str, Any], int]] = {}
    for path in weight_files(folder):
        try:
            header, base = safetensors_header(path)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path} cannot be read as safetensors: {error}") from None
        places |= {name: (path, one, base) for name, one in header.items()}
    digest = hashlib.sha256()
    for name in sorted(places):
        path, one, base = places[name]
        digest.update(json.dumps([name, one["dtype"], one["shape"]]).encode())
        begin, end = one["data_offsets"]
        with path.open("rb") as file:
            if end == begin:
                continue
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content, memoryview(content) as view:
                if base + end > len(view):
                    raise CheckpointError(f"{path} is cut off: {name} ends at {base + end} of {len(view)} bytes")
                digest.update(view[base + begin : base + end])
    return digest.hexdigest()


def safetensors_header(path: Path) -> tuple[dict[str, dict[str, Any]], int]:
    """`dtype`, `shape` and `data_offsets` of each tensor by name, and where offsets count from.

    Raises:
        OSError, ValueError: not a safetensors file.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > path.stat().st_size:
            raise ValueError(f"its header of {length} bytes does not fit the file")
        header = json.loads(file.read(length))
    if not isinstance(header, dict):
        raise ValueError("its header is not an object")
    return {name: one for name, one in header.items() if name != "__metadata__"}, 8 + length


def _hash_files(folder: Path, names: tuple[str, ...]) -> str:
    found = {
        name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names if (folder / name).is_file()
    }
    return stable_hash(found)


def _width(config: dict[str, Any], *, images: bool, where: str) -> int:
    """Values of a token."""
    inner = config.get("vision_config" if images else "text_config")
    found = inner if isinstance(inner, dict) else config
    width = found.get("d_model", found.get("hidden_size"))
    if not isinstance(width, int):
        raise CheckpointError(f"checkpoint {where}: config.json says neither d_model nor hidden_size")
    return width
