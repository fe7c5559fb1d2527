"""The claims, each in a file: what is drawn for it, and what counts as right. `CLAIMS` has them in order."""

from collections.abc import Callable

from bdm_jax.evaluate.claims import ambiguity, compatibility, composition, mixing, native
from bdm_jax.evaluate.studio import Outcome, Studio

CLAIMS: dict[str, Callable[[Studio], Outcome]] = {
    "native": native.measure,
    "mixing": mixing.measure,
    "ambiguity": ambiguity.measure,
    "composition": composition.measure,
    "compatibility": compatibility.measure,
}
