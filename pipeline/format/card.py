"""Data card of an output, `_README.md`, and `.huggingface.yaml`, which names the data files for `datasets.load_dataset(root)`.

Engines that scan the root skip both names. Spark and pyarrow would open a `README.md` as Parquet. The Hub shows the card once it is
renamed to `README.md`; it contains the same configuration.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from pipeline.format.codec import INT8, element_of, value_type
from pipeline.format.stored import FIRST_FRAME, I2V_COND, OPTIONAL

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

_OTHERS = {
    I2V_COND: "latent of the clip's first frame followed by zeros, shape and type of the tensor",
    FIRST_FRAME: "the clip's first frame, a lossless WebP or PNG",
}
OURS = "# Written by Lathe, which adds an entry for each fingerprint. Remove this line to keep what you change.\n"


def hugging_face_config(
    existing: str | None,
    fingerprint: str,
    container: str,
    state: str | None = None,
    files: Sequence[str] | None = None,
) -> str | None:
    """`.huggingface.yaml` with an entry for the data files of this fingerprint and container.

    `datasets` keeps what it has read from a local folder under the folder's name and this configuration, and does not look for new files.
    `state` becomes the description of the entry: another state makes it read the folder again.

    Takes the present contents, or None; `files`: keys of the data files, or None for a glob. Returns None if the user has removed the
    first line to keep own changes.
    """
    if existing is None:
        existing = f"{OURS}configs:\n"
    if not existing.startswith(OURS):
        return None
    name = f"{container}-{fingerprint[:8]}"
    named = f" data/{fingerprint[:8]}/**/*.{container}\n"
    if files is not None:
        named = "".join(["\n", *(f"  - {key}\n" for key in files)]) if files else " []\n"
    entry = f"- config_name: {name}\n  data_files:{named}"
    if state is not None:
        entry += f"  description: {state}\n"
    present = re.compile(rf"^- config_name: {name}\n(?:  .*\n)*", re.MULTILINE)
    return present.sub(lambda _: entry, existing) if present.search(existing) else existing + entry


def data_card(
    fingerprint: str,
    metadata: dict[str, Any],
    *,
    container: str,
    dtype: str,
    moments: bool,
    store: Collection[str] = (),
) -> str:
    """Markdown for users of the output: network, meaning of the values, how to read them.

    Takes the metadata of the output's data files (`spec`, `encoder`, `versions`), see docs/formats.md. `dtype`: storage name
    (`format.codec`).
    """
    spec, checkpoint = metadata["spec"], metadata["encoder"].get("checkpoint", {})
    weights = checkpoint.get("uri") or "untrained"
    constants = ", ".join(
        f"{name} {spec[name]}" for name in ("scale", "shift", "mean", "std") if spec.get(name) is not None
    )
    tensors = "posterior mean and log-variance" if moments else "posterior mean"
    others = "".join(f"| column `{name}` | {_OTHERS[name]} |\n" for name in OPTIONAL if name in store)
    entry = (hugging_face_config(None, fingerprint, container) or "").removeprefix(OURS)
    return f"""---
{entry}---
# Video latents

Written by Lathe {metadata["versions"].get("lathe", "")}: one row per clip, with its caption and source.

| | |
|---|---|
| network | `{spec["network"]}`, weights `{weights}` |
| tensor | {tensors}, `{dtype}`, shape C T H W, little-endian, {spec["latent_channels"]} channels |
{others}| one latent pixel | {spec["time_stride"]} frames x {spec["space_stride"]} x {spec["space_stride"]} pixels |
| frames that have a latent frame of their own, at the start | {spec["lead_frames"]} |
| values | as the network gives them, **never normalised** |
| constants of the network's authors, not applied | {constants or "none"} |
| fingerprint | `{fingerprint}` |

The fingerprint is a hash of everything that can change a value. Rows with another one are in another folder of `data/`.

{_recipe(fingerprint[:8], container, dtype)}
`lathe inspect` and `lathe status` describe the output, `lathe preview` shows clips, `lathe verify` checks every byte.
To publish on the Hugging Face Hub, copy this file to `README.md`. Lathe writes it once and never changes it.
"""


def _recipe(fp8: str, container: str, dtype: str) -> str:
    if container == "tar":
        return f"""```python
import webdataset as wds

for sample in wds.WebDataset("data/{fp8}/v17x256x256/...tar", shardshuffle=False):
    latent, caption = sample["latent.npy"], sample["txt"]
    # bfloat16, int8, zstd and moments: sample["latent.safetensors"], see docs/formats.md of Lathe
```
"""
    return f"""```python
import math, numpy as np, pyarrow, pyarrow.dataset

for batch in pyarrow.dataset.dataset("data/{fp8}").to_batches(batch_size=64):
    for row in batch.to_pylist():
        stored, shape = row["vae_latent_bytes"], row["vae_latent_shape"]
        {_decoding(dtype)}
```
{"`<u2` holds the bits of bfloat16; PyTorch reads them with `torch.frombuffer`." if value_type(dtype) == "bfloat16" else ""}
"""


def _decoding(dtype: str) -> str:
    """Statements that make `latent` of `stored` and `shape`."""
    element = element_of(dtype)
    kind = {"float16": "<f2", "float32": "<f4", "bfloat16": "<u2", INT8: "i1"}[element]
    head = "8 * shape[0] + " if element == INT8 else ""
    lines = []
    if dtype != element:
        width = int(kind[-1])
        lines = [
            f'planes = pyarrow.decompress(stored, {head}math.prod(shape) * {width}, codec="zstd", asbytes=True)',
            f'stored = np.frombuffer(planes, "u1").reshape({width}, -1).T.tobytes()',
        ]
    if element == INT8:
        lines += [
            'scale, zero = np.frombuffer(stored, "<f4", 2 * shape[0]).reshape(2, -1, 1, 1, 1)',
            'latent = np.frombuffer(stored, "i1", offset=8 * shape[0]).reshape(shape) * scale + zero',
        ]
    else:
        lines += [f'latent = np.frombuffer(stored, "{kind}").reshape(shape)']
    return "\n        ".join(lines)
