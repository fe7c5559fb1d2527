"""Which text encoders read a prompt, and how what they give is joined. Data only: knows no JAX."""

from dataclasses import dataclass
from typing import Literal

SETTING = "_bdm_branch_towers"  # of model_index.json: how a branch's text encoders are read, if not as its family's


@dataclass(frozen=True)
class Tower:
    """A text encoder as one reader uses it.

    Attributes:
      encoder, tokenizer: names of the system's parts.
      layer: whose states are taken, counted from the last: 1 the last, 2 the penultimate.
      final_norm: whether CLIP's last norm follows them.
      pooled: whether the one vector of the whole text is taken too: True as the tower gives it, "projected" of a tower
        that has a projection into a joint space of texts and images, "raw" before that projection.
    """

    encoder: str
    tokenizer: str
    layer: int = 1
    final_norm: bool = True
    pooled: bool | Literal["projected", "raw"] = False


@dataclass(frozen=True)
class Reader:
    """How one of a system's texts is read.

    Attributes:
      source: what the text is called: "backbone" (English), "branch" (the branch's language).
      towers: the text encoders that read it.
      join: their states side by side in each token ("width", as SDXL's) or one after the other ("tokens", as
        eDiff-I's). The pooled vectors are laid side by side.
      zero_empty: an empty prompt is zeros, not the states of an empty text (SDXL's `force_zeros_for_empty_prompt`).
    """

    source: str
    towers: tuple[Tower, ...]
    join: Literal["width", "tokens"] = "width"
    zero_empty: bool = False

    @property
    def tokenizers(self) -> tuple[str, ...]:
        """Names of the tokenizers, each once, in the towers' order."""
        return tuple(dict.fromkeys(tower.tokenizer for tower in self.towers))

    @property
    def encoders(self) -> tuple[str, ...]:
        """Names of the text encoders."""
        return tuple(tower.encoder for tower in self.towers)
