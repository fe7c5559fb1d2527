"""Text encoders with their matrices in int8, for machines whose memory is short.

A matrix is kept as integers with a scale for each of its outputs, a table of embeddings with one for each token (qwix);
`functional.bind` makes numbers of them again inside the program that reads them.
"""

import re
from typing import Any

from bdm_jax.errors import UserError
from bdm_jax.models.functional import is_int8
from bdm_jax.systems.components import Component

_AXES = {"kernel": 1, "embedding": 0}
_MATRIX = re.compile(r"(?:^|\.)(kernel|embedding)$")


def quantised(path: str, value: Any) -> Any:
    """A text encoder's parameter in int8 with its scales, if it is a matrix or a table; a norm or bias as it is.

    Raises UserError where qwix is not installed.
    """
    try:
        import qwix
    except ImportError as error:
        raise UserError(f'int8 weights need {error.name}: pip install -e ".[int8]"') from error
    match = _MATRIX.search(path)
    if not match or is_int8(value):
        return value
    return qwix.quantize(value, "int8", channelwise_axes=[_AXES[match[1]]])


def to_int8(component: Component) -> Component:
    """A text encoder in a quarter of fp32's memory; norms and biases stay as they are."""
    config, params = component
    return Component(config, {path: quantised(path, value) for path, value in params.items()})
