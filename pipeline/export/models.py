"""Models that trainers can train: the latents each expects, and whether a network's latents are those.

Takes the network's facts of a snapshot and the name of a trainer's model. Gives the model, with notices where latents fit by shape only.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from pipeline.errors import ConfigError, InputError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pipeline.export.rows import Source

CUSTOM = "custom"
"""Model of the user's own in a trainer: latents of any shape, `normalize` as asked."""

NORMALIZE = ("model", "none")


@dataclass(frozen=True, slots=True)
class Model:
    """Latents that one model of a trainer takes.

    `shapes`: (channels, frames per latent frame, pixels per latent pixel) that fit. `networks`: classes whose latents it was trained on.
    """

    name: str
    shapes: tuple[tuple[int, int, int], ...] = ()
    networks: tuple[str, ...] = ()
    normalize: bool = False
    text_width: int | None = None  # of a text embedding; None: not fixed
    text_length: int | None = None  # tokens that every embedding is padded to; None: as given
    notices: tuple[str, ...] = ()


WAN_21 = (16, 4, 8)
WAN_22 = (48, 4, 16)
LTX = (128, 8, 32)


def choose_model(
    source: Source, models: Mapping[str, Model], asked: str | None, normalize: str | None
) -> tuple[Model, list[str]]:
    """The model of a trainer for these latents, and notices for the user.

    `asked`: a name of `models`, `custom`, or None for the one whose network made the latents. `normalize`: `model` or `none`, only with
    `custom`.

    Raises:
        ConfigError: no such model; none was asked for and none is for this network; `normalize` where the model decides it.
        InputError: latents of other channels or strides than the model's; constants that are missing or were applied already.
    """
    model, notices = _named(source, models, asked)
    if normalize is not None:
        if model.name != CUSTOM:
            value = "normalised" if model.normalize else "raw"
            raise ConfigError(
                f"--normalize: the model {model.name} takes {value} latents, so there is no choice; leave it out, or use --as {CUSTOM}"
            )
        model = replace(model, normalize=normalize == "model")
    check_values(source, normalize=model.normalize)
    return model, notices


def _named(source: Source, models: Mapping[str, Model], asked: str | None) -> tuple[Model, list[str]]:
    names = ", ".join([*models, CUSTOM])
    if asked == CUSTOM:
        return Model(CUSTOM), []
    if asked is None:
        fitting = [m for m in models.values() if source.network_class in m.networks and source.shape_facts in m.shapes]
        if len(fitting) != 1:
            found = "none of the trainer's models" if not fitting else "more than one of the trainer's models"
            raise ConfigError(
                f"--as: {found} is known to use latents of {source.network} ({_facts(source.shape_facts)}); "
                f"name the model that you train, one of {names}"
            )
        return fitting[0], list(fitting[0].notices)
    if asked not in models:
        raise ConfigError(f"--as: expected one of {names}, got {asked!r}")
    model = models[asked]
    if source.shape_facts not in model.shapes:
        expected = " or ".join(_facts(shape) for shape in model.shapes)
        raise InputError(
            f"{source.uri} has latents of {source.network} with {_facts(source.shape_facts)}; the model {asked} takes {expected}. "
            f"Encode with its network, or use --as {CUSTOM} for a model of your own",
        )
    notices = list(model.notices)
    if source.network_class not in model.networks:
        notices.append(
            f"latents of {source.network} have the shape that {asked} takes but are not of its network "
            f"({' or '.join(model.networks)}): train from scratch, published weights do not know them"
        )
    return model, notices


def check_values(source: Source, *, normalize: bool) -> None:
    """Whether raw or normalised values can be had of these latents.

    Raises:
        InputError: constants that are missing, or were applied already.
    """
    if source.applied:
        wanted = "once" if normalize else "not at all"
        raise InputError(
            f"{source.uri} holds normalised latents; the target wants them normalised {wanted} by the export"
        )
    spec = source.spec
    if normalize and spec.get("mean") is None and spec.get("scale") is None:
        raise InputError(
            f"{source.uri} has no constants of {source.network} (mean and std, or scale), which this target needs for normalised "
            "latents. Encode with a configuration that has them, see `lathe stats` for measured ones"
        )


def _facts(shape: tuple[int, int, int]) -> str:
    channels, time, space = shape
    return f"{channels} channels, {time}x{space}x{space} compression"
