"""Objective as plain data: the `objective` section of a recipe file, with weights by name of term, and the published objectives.

`LEANVAE`, `WFVAE` and `IVVAE` are those of the papers. `model.training.objective` computes them.
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
GENERATORS = ("non_saturating", "hinge")


@dataclass(frozen=True, slots=True)
class AdversarialRecipe:
    """The adversarial term."""

    weight: float  # of the generator's term; with `adaptive` a factor on the measured ratio
    discriminator: str = "patch2d"
    channels: int = 64
    layers: int = 3
    generator: str = "non_saturating"
    adaptive: bool = False
    start: int = 0  # first step with this term
    lecam: float = 0.0
    lecam_decay: float = 0.999

    def __post_init__(self) -> None:
        _known("discriminator", self.discriminator, DISCRIMINATORS)
        _known("generator", self.generator, GENERATORS)
        for name in ("weight", "lecam"):
            _weight(f"adversarial.{name}", getattr(self, name))
        _weight("adversarial.lecam_decay", self.lecam_decay)
        if self.lecam_decay >= 1:
            raise ValueError(f"adversarial.lecam_decay must be in [0, 1), got {self.lecam_decay!r}")
        if type(self.adaptive) is not bool:
            raise ValueError(f"adversarial.adaptive must be true or false, got {self.adaptive!r}")
        for name, least in (("channels", 1), ("layers", 1), ("start", 0)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise ValueError(f"adversarial.{name} must be a whole number of at least {least}, got {value!r}")


@dataclass(frozen=True, slots=True)
class ObjectiveRecipe:
    """Weights by name of term. Terms of weight zero are not computed."""

    terms: Mapping[str, float] = field(default_factory=dict)
    perceptual_frames: str = "all"  # "group": frame 0 and one random group of four of every video (LeanVAE)
    reference_area: int | None = None  # the loss is multiplied by this over a frame's pixels (IV-VAE equation 5)
    adversarial: AdversarialRecipe | None = None

    def __post_init__(self) -> None:
        for name, weight in self.terms.items():
            _known("term", name, TERMS)
            _weight(f"terms.{name}", weight)
        _known("perceptual_frames", self.perceptual_frames, FRAMES)
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
    return ObjectiveRecipe(**given, adversarial=adversarial)


def objective_section(recipe: ObjectiveRecipe) -> dict[str, Any]:
    """The `objective` section of a file for this recipe."""
    return asdict(recipe)


def _known(what: str, name: Any, names: Mapping[str, Any] | Sequence[str]) -> None:
    if name not in names:
        raise ValueError(f"unknown {what} {name!r}; known: {', '.join(names)}")


def _weight(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not isfinite(value) or value < 0:
        hint = " (YAML reads 1e-7 as text; write 1.0e-7)" if isinstance(value, str) else ""
        raise ValueError(f"{name} must be a number of at least 0, got {value!r}{hint}")


def _keys(where: str, given: Any, kind: type) -> None:
    known = [entry.name for entry in fields(kind)]
    if not isinstance(given, dict):
        raise ValueError(f"{where} must be a mapping with {', '.join(known)}; got {given!r}")
    unknown = [str(key) for key in given if key not in known]
    if unknown:
        raise ValueError(f"{where} has unknown keys {', '.join(unknown)}; known: {', '.join(known)}")


# Spec section 13 of LeanVAE: 4 on pixels, 4 * 0.05 and 4 * 0.1 on bands, 600k steps without the adversarial term.
LEANVAE = ObjectiveRecipe(
    terms={"l1": 4.0, "haar_low": 0.2, "haar_high": 0.4, "lpips": 4.0, "kl": 1e-7},
    perceptual_frames="group",
    adversarial=AdversarialRecipe(weight=0.2, start=600_000, lecam=0.005),
)
# Spec section 14 of WF-VAE, stage I; stage III lowers lpips_sum to 0.1.
WFVAE = ObjectiveRecipe(
    terms={"frame_sum": 1.0, "lpips_sum": 1.0, "kl": 1e-6, "wl": 0.1},
    adversarial=AdversarialRecipe(weight=0.5, discriminator="patch3d", generator="hinge", adaptive=True),
)
# Supplement 3.1 of IV-VAE, last stage; earlier stages have no adversarial term. The discriminator is not published.
IVVAE = ObjectiveRecipe(
    terms={"frame_sum": 1.0, "lpips_sum": 1.0, "kl": 3e-6},
    reference_area=256 * 256,
    adversarial=AdversarialRecipe(weight=0.8, discriminator="patch3d", generator="hinge"),
)
