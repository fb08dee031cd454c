"""Objective as plain data: the `objective` section of a recipe file, with weights by name of term.

`model.training.objective` computes it. The published objectives are in `model/training/recipes/`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from math import isfinite
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

TERMS = {
    "l1": "mean |x - y| over pixels",
    "mse": "mean (x - y)^2 over pixels; not in the papers",
    "haar_low": "L1 on low Haar bands",
    "haar_high": "L1 on high Haar bands",
    "frame_sum": "sum of |x - y| over a frame",
    "lpips": "LPIPS-VGG, mean over the frames compared",
    "lpips_sum": "LPIPS-VGG times the number of values in a frame, to match frame_sum",
    "pyramid": "Laplacian pyramid L1, needs no weights and is not LPIPS",
    "kl": "KL to the standard normal, summed over a latent",
    "wl": "L1 between the energy-flow coefficients of encoder and decoder (WF-VAE)",
}
FRAMES = ("all", "group")
DISCRIMINATORS = ("patch2d", "patch3d")  # built in `model.training.discriminators`
GENERATORS = ("non_saturating", "hinge", "hinge_sum")


ADVERSARIAL_KEYS = {
    "weight": "weight of the generator's term; with `adaptive` a factor on the measured ratio",
    "discriminator": "`patch2d` judges single frames, `patch3d` clips",
    "channels": "width of the discriminator's first layer",
    "layers": "downsamplings in space",
    "generator": "the autoencoder's term: `non_saturating`, `hinge` (mean of logits), or `hinge_sum` (sum over a frame's logits)",
    "adaptive": "measure the ratio of the gradients of reconstruction and adversarial term at the last layer (WF-VAE equation 7)",
    "ceiling": "largest ratio; VQGAN's by default",
    "dropout": "share of the discriminator's values set to zero after each of its norms",
    "alternate": "even steps train the autoencoder only, odd steps the discriminator only",
    "start": "first step of the stage with this term",
    "lecam": "weight of the LeCam regulariser of the discriminator",
    "lecam_decay": "decay per step of its running means",
}
OBJECTIVE_KEYS = {
    "terms": "weights by name of term, below",
    "perceptual_frames": "frames that LPIPS and `pyramid` compare: `all`, or `group` (frame 0 and one random group of four of every video)",
    "perceptual_range": "of black and white as LPIPS gets them; it was made for [-1, 1]",
    "reference_area": "multiply the loss by this number of pixels over a frame's (IV-VAE equation 5)",
    "adversarial": "adversarial term, below",
}


@dataclass(frozen=True, slots=True)
class AdversarialRecipe:
    """The adversarial term; `ADVERSARIAL_KEYS` has the meaning of its keys."""

    weight: float
    discriminator: str = "patch2d"
    channels: int = 64
    layers: int = 3
    generator: str = "non_saturating"
    adaptive: bool = False
    ceiling: float = 1e4
    dropout: float = 0.0
    alternate: bool = False
    start: int = 0
    lecam: float = 0.0
    lecam_decay: float = 0.999

    def __post_init__(self) -> None:
        _known("discriminator", self.discriminator, DISCRIMINATORS)
        _known("generator", self.generator, GENERATORS)
        for name in ("weight", "lecam"):
            _weight(f"adversarial.{name}", getattr(self, name))
        for name in ("lecam_decay", "dropout"):
            _weight(f"adversarial.{name}", share := getattr(self, name))
            if share >= 1:
                raise ValueError(f"adversarial.{name} must be in [0, 1), got {share!r}")
        _weight("adversarial.ceiling", self.ceiling)
        if not self.ceiling:
            raise ValueError("adversarial.ceiling must be above 0, or the adversarial term has no weight; got 0")
        for name in ("adaptive", "alternate"):
            if type(value := getattr(self, name)) is not bool:
                raise ValueError(f"adversarial.{name} must be true or false, got {value!r}")
        for name, least in (("channels", 1), ("layers", 1), ("start", 0)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise ValueError(f"adversarial.{name} must be a whole number of at least {least}, got {value!r}")


@dataclass(frozen=True, slots=True)
class ObjectiveRecipe:
    """Weights by name of term; terms of weight zero are not computed. `OBJECTIVE_KEYS` has the meaning of its keys."""

    terms: Mapping[str, float] = field(default_factory=dict)
    perceptual_frames: str = "all"
    perceptual_range: tuple[float, float] = (-1.0, 1.0)
    reference_area: int | None = None
    adversarial: AdversarialRecipe | None = None

    def __post_init__(self) -> None:
        for name, weight in self.terms.items():
            _known("term", name, TERMS)
            _weight(f"terms.{name}", weight)
        _known("perceptual_frames", self.perceptual_frames, FRAMES)
        _check_range("perceptual_range", self.perceptual_range)
        area = self.reference_area
        if area is not None and (type(area) is not int or area < 1):
            raise ValueError(f"reference_area must be a whole number of pixels, got {area!r}")
        if not any(self.terms.values()):
            raise ValueError(f"an objective needs at least one term with a weight; known: {', '.join(TERMS)}")

    def wants(self, *names: str) -> bool:
        """Whether any of these terms has a weight."""
        return any(self.terms.get(name, 0.0) for name in names)


def objective_recipe(section: Mapping[str, Any]) -> ObjectiveRecipe:
    """Recipe from a file's `objective` section. Raises ValueError for unknown keys or names and impossible values."""
    _keys("objective", section, ObjectiveRecipe)
    given = dict(section)
    adversarial = given.pop("adversarial", None)
    if adversarial is not None:
        _keys("objective.adversarial", adversarial, AdversarialRecipe)
        if "weight" not in adversarial:
            raise ValueError("objective.adversarial needs a weight")
        adversarial = AdversarialRecipe(**adversarial)
    if not isinstance(given.get("terms", {}), dict):
        raise ValueError(f"objective.terms must map names to weights, got {given['terms']!r}")
    if isinstance(given.get("perceptual_range"), list):
        given["perceptual_range"] = tuple(given["perceptual_range"])
    return ObjectiveRecipe(**given, adversarial=adversarial)


def objective_section(recipe: ObjectiveRecipe) -> dict[str, Any]:
    """The `objective` section of a file for this recipe."""
    return asdict(recipe) | {"perceptual_range": list(recipe.perceptual_range)}


def _known(what: str, name: Any, names: Mapping[str, Any] | Sequence[str]) -> None:
    if name not in names:
        raise ValueError(f"unknown {what} {name!r}; known: {', '.join(names)}")


def _weight(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not isfinite(value) or value < 0:
        hint = " (YAML reads 1e-7 as text; write 1.0e-7)" if isinstance(value, str) else ""
        raise ValueError(f"{name} must be a number of at least 0, got {value!r}{hint}")


def _check_range(name: str, value: Any) -> None:
    numbers = isinstance(value, tuple) and len(value) == 2 and all(type(part) in (int, float) for part in value)
    if not numbers or not all(map(isfinite, value)) or value[0] >= value[1]:
        raise ValueError(f"{name} must be two increasing numbers, such as [-1, 1], got {value!r}")


def _keys(where: str, given: Any, kind: type) -> None:
    known = [entry.name for entry in fields(kind)]
    if not isinstance(given, dict):
        raise ValueError(f"{where} must be a mapping with {', '.join(known)}; got {given!r}")
    unknown = [str(key) for key in given if key not in known]
    if unknown:
        raise ValueError(f"{where} has unknown keys {', '.join(unknown)}; known: {', '.join(known)}")
