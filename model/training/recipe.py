"""Training recipe: everything that decides what a run does, as plain data from a YAML file and overrides. No torch.

Recipes are `model/training/recipes/NAME.yaml` or the user's own. Two runs of the same recipe on the same clips are the same run.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, ValidationError, model_validator

from model import registry
from model.training.objective_recipe import ObjectiveRecipe, objective_recipe, objective_section

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

RECIPES = Path(__file__).with_name("recipes")
# May differ between a run and its continuation: affects what is written, not what is learned.
ONLY_BOOKKEEPING = ("log_every", "sheet_every", "checkpoint_every", "keep_checkpoints", "compile", "recompute")


class Part(BaseModel):
    """Frozen part of a recipe that refuses unknown keys."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", arbitrary_types_allowed=True, use_attribute_docstrings=True, allow_inf_nan=False
    )


class Group(Part):
    """Clips of one size. A micro-batch holds clips of one group. One frame: images."""

    frames: int = Field(ge=1)
    """Frames of a clip; the network's rule (4n+1) must allow them."""
    height: int = Field(ge=1)
    """Pixels, like `width`; larger clips are randomly cropped to this size."""
    width: int = Field(ge=1)
    """Pixels."""
    batch: int = Field(ge=1)
    """Clips per micro-batch."""
    weight: float = Field(1.0, gt=0)
    """Relative frequency of this group."""


class OptimizerRecipe(Part):
    """Optimizer and its options; learning rates belong to the stages."""

    name: Literal["adam", "adamw", "muon"] = "adamw"
    """`muon`: orthogonalised momentum for the matrices of token layers (LeanVAE), AdamW for the other parameters."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of Adam's two moments."""
    weight_decay: float = Field(0.0, ge=0)
    """For matrices and kernels; biases and gains have none."""
    clip: float | None = Field(1.0, gt=0)
    """Largest gradient norm, over all parameters; null: no clipping."""
    muon_factor: float = Field(2.0, gt=0)
    """Learning rate of orthogonalised matrices, relative to the others'."""


class Start(Part):
    """Initial weights: at most one of these; none: random, from the seed."""

    linear: int | None = Field(None, ge=1)
    """Principal components of this many clips of the first stage's first group (LeanVAE)."""
    image: str | None = None
    """Checkpoint of an image VAE, inflated in time (IV-VAE)."""
    weights: str | None = None
    """Checkpoint of this network."""

    @model_validator(mode="after")
    def _one(self) -> Start:
        given = [name for name in ("linear", "image", "weights") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"start takes one of linear, image, weights; got {' and '.join(given)}")
        return self


def _parse_objective(value: Any) -> Any:
    return value if isinstance(value, ObjectiveRecipe) else objective_recipe(value)


class Stage(Part):
    """Part of a run with one objective and one set of groups."""

    name: str = Field(min_length=1)
    """Unique in the recipe; overrides and logs use it."""
    steps: int = Field(ge=1)
    """Optimizer steps."""
    learning_rate: float = Field(gt=0)
    """Of the autoencoder, after `warm_up`."""
    final_learning_rate: float = Field(ge=0)
    """Reached by a cosine at the stage's last step, or after `decay_steps`."""
    decay_steps: int | None = Field(None, ge=1)
    """Steps of the cosine; null: the stage's length. If shorter than the stage, the final rate is held; if longer, it is not reached."""
    warm_up: int = Field(0, ge=0)
    """Steps from zero to `learning_rate`."""
    discriminator_learning_rate: float | None = Field(None, gt=0)
    """Constant; null: the autoencoder's rate."""
    new_discriminator: bool = False
    """Start with a new discriminator. Otherwise one of the same architecture is kept from the last stage."""
    objective: Annotated[ObjectiveRecipe, BeforeValidator(_parse_objective), PlainSerializer(objective_section)]
    """Terms and weights; an adversarial term's `start` counts from the stage's first step."""
    groups: tuple[Group, ...] = Field(min_length=1)
    """Clip sizes; each micro-batch is drawn from one of them."""
    batches: int = Field(1, ge=1)
    """Micro-batches per step, shared among all processes; a process accumulates its own."""
    frame_interval: int = Field(1, ge=1)
    """Clips take every n-th frame of their source; 2 halves the frame rate. Images take any frame."""

    @model_validator(mode="after")
    def _rates(self) -> Stage:
        if self.final_learning_rate > self.learning_rate:
            raise ValueError(
                f"final_learning_rate must not exceed learning_rate {self.learning_rate}, got {self.final_learning_rate}"
            )
        if self.warm_up > self.steps:
            raise ValueError(f"warm_up must not exceed the stage's {self.steps} steps, got {self.warm_up}")
        if self.decay_steps is not None and self.decay_steps <= self.warm_up:
            raise ValueError(f"decay_steps must exceed warm_up {self.warm_up}, got {self.decay_steps}")
        return self

    @property
    def alternates(self) -> bool:
        """Whether steps train autoencoder and discriminator in turn."""
        return self.objective.adversarial is not None and self.objective.adversarial.alternate

    def source_frames(self, group: Group) -> int:
        """Frames that a clip of the group spans in its source."""
        return 1 + (group.frames - 1) * self.frame_interval


class TrainingRecipe(Part):
    """Recipe of a whole run."""

    network: str
    """Family or preset of `lathe models`."""
    config: dict[str, Any] = Field(default_factory=dict)
    """Published keys, which override the preset's."""
    seed: int = Field(0, ge=0)
    """For all random draws: parameters, groups, crops, latents."""
    start: Start = Start()
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of the large products; pixels, norms, latents and losses stay float32."""
    compile: bool = False
    """Use `torch.compile`."""
    recompute: bool = False
    """Layers keep only their inputs and run again in the backward pass: less memory, a third more time."""
    optimizer: OptimizerRecipe = OptimizerRecipe()
    discriminator_optimizer: OptimizerRecipe = OptimizerRecipe()
    ema: float | None = Field(None, ge=0, lt=1)
    """Decay per step of the averaged weights, which a run publishes; null: it publishes the last weights."""
    log_every: int = Field(10, ge=1)
    """Steps between lines of `metrics.jsonl`."""
    sheet_every: int = Field(1000, ge=1)
    """Steps between picture sheets."""
    checkpoint_every: int = Field(1000, ge=1)
    """Steps between checkpoints."""
    keep_checkpoints: int = Field(2, ge=1)
    """Newest checkpoints kept in the folder of the run."""
    stages: tuple[Stage, ...] = Field(min_length=1)
    """Run one after the other."""

    @model_validator(mode="after")
    def _fits(self) -> TrainingRecipe:
        names = [stage.name for stage in self.stages]
        if len(set(names)) < len(names):
            raise ValueError(f"stages need different names, got {', '.join(names)}")
        spec = registry.spec(self.network, self.config)
        flows = registry.family_of(registry.resolve(self.network)).name == "wfvae"
        for stage in self.stages:
            if stage.objective.wants("wl") and not flows:
                raise ValueError(
                    f"stage {stage.name!r} has the term wl, which needs a WF-VAE's energy flow; {self.network} has none"
                )
            for group in stage.groups:
                spec.latent_frames(group.frames)
                spec.check_size(group.height, group.width)
        return self

    @property
    def steps(self) -> int:
        """Steps of all stages."""
        return sum(stage.steps for stage in self.stages)

    def to_dict(self) -> dict[str, Any]:
        """JSON- and YAML-ready; the inverse of `training_recipe`."""
        return self.model_dump(mode="json")


def training_recipe(section: Mapping[str, Any]) -> TrainingRecipe:
    """Recipe from plain data. Raises ValueError with one line per failure: where, what was got, what was expected."""
    if not isinstance(section, dict) or not all(isinstance(key, str) for key in section):
        raise ValueError(f"recipe: expected a mapping with {', '.join(TrainingRecipe.model_fields)}, got {section!r}")
    try:
        return TrainingRecipe(**section)
    except ValidationError as error:
        errors = error.errors()
        # a refused item also makes its list too short, which adds nothing and repeats the whole list
        shown = [item for item in errors if item["type"] != "too_short" or _alone(item, errors)]
        raise ValueError(f"recipe: {'; '.join(_explain(item) for item in shown)}") from None


def load_recipe(name_or_path: str | Path, overrides: Mapping[str, Any] | None = None) -> TrainingRecipe:
    """Loads a built-in recipe by name, or a recipe file; `overrides` replace its values as in `overridden`.

    Raises:
        FileNotFoundError: neither a built-in recipe nor a file; names the built-in ones.
        ValueError: not YAML, or not a recipe.
    """
    path = recipe_path(name_or_path)
    try:
        section = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from None
    if not isinstance(section, dict):
        raise ValueError(f"{path} must hold a mapping with {', '.join(TrainingRecipe.model_fields)}, got {section!r}")
    return training_recipe(overridden(section, overrides or {}))


def recipe_path(name_or_path: str | Path) -> Path:
    """Path of a recipe. Raises FileNotFoundError with the names of the built-in recipes."""
    for path in (RECIPES / f"{name_or_path}.yaml", Path(name_or_path)):
        if path.is_file():
            return path
    known = ", ".join(sorted(path.stem for path in RECIPES.glob("*.yaml")))
    raise FileNotFoundError(f"no recipe {str(name_or_path)!r}: neither a file nor one of {known}")


def differences(begun: TrainingRecipe, wanted: TrainingRecipe) -> list[str]:
    """Differences that keep `wanted` from continuing a run of `begun`, as `key: was A, is B`; bookkeeping may differ."""
    old, new = begun.to_dict(), wanted.to_dict()
    return [
        f"{key}: was {old[key]!r}, is {new[key]!r}"
        for key in new
        if key not in ONLY_BOOKKEEPING and old[key] != new[key]
    ]


def overridden(section: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's plain data with overrides: mappings are merged by key, stages by name, other values replaced.

    `{"stages": {"reconstruction": {"steps": 100}}}` changes that stage only.

    Raises:
        ValueError: no stage of that name.
    """
    return {**section, **{key: _over(section.get(key), value) for key, value in over.items()}}


def _over(base: Any, value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    if isinstance(base, dict):
        return overridden(base, value)
    if isinstance(base, list) and all(isinstance(part, dict) and "name" in part for part in base):
        names = [part["name"] for part in base]
        if unknown := [str(name) for name in value if name not in names]:
            raise ValueError(f"no stage is named {', '.join(unknown)}; expected one of {', '.join(map(str, names))}")
        return [_over(part, value.get(part["name"], {})) for part in base]
    return value


def _alone(item: Any, found: Sequence[Any]) -> bool:
    return not any(other["loc"][: len(item["loc"])] == item["loc"] for other in found if other is not item)


def _explain(item: Any) -> str:
    place = ".".join(str(part) for part in item["loc"])
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] == "extra_forbidden":
        message = "no such key"
    elif item["type"] == "missing":
        message = "is required"
    elif item["type"] != "value_error":
        message = f"{message}, got {item['input']!r}"
    return f"{place}: {message}" if place else message
