"""What the keys of community files are called here: one table per layout, used in both directions.

The library's own names are diffusers' and transformers' names, so that most tables are short.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class KeyTable:
    """How the keys of one kind of file differ from this library's.

    Attributes:
      prefix: what this library's keys begin with, and what is written.
      accepted: prefixes that a file may have in its place; "" stands for none.
      ignored: patterns of keys that carry nothing the network needs (buffers, parts of a larger file).
    """

    prefix: str = ""
    accepted: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()

    def here(self, key: str) -> str | None:
        """The library's name of a file's key; None for one that is ignored."""
        if any(re.fullmatch(pattern, key) for pattern in self.ignored):
            return None
        if self.prefix and key.startswith(self.prefix):
            return key
        for prefix in sorted(self.accepted, key=len, reverse=True):
            if key.startswith(prefix):
                return self.prefix + key.removeprefix(prefix)
        return key


PLAIN = KeyTable()
# transformers 5 writes CLIP text keys without their prefix and reads both; earlier ones kept position_ids as a buffer.
CLIP_TEXT = KeyTable(prefix="text_model.", accepted=("",), ignored=(r"(.*\.)?position_ids",))
# The Chinese tower alone, or as a part of a whole Chinese-CLIP; its pooler and projection play no part in BDM.
CHINESE_TEXT = KeyTable(
    accepted=("text_model.",),
    ignored=(
        r"(.*\.)?position_ids",
        r"(text_model\.)?pooler\..*",
        r"(vision_model|visual_projection|text_projection)\..*|logit_scale",
    ),
)
# A branch has no hint network; a ControlNet file used as one may still carry it.
BRANCH = KeyTable(ignored=(r"controlnet_cond_embedding\..*",))


def table_for(config: Mapping[str, Any]) -> KeyTable:
    """The table of the network that a component's config.json describes."""
    return BRANCH if config.get("bdm_branch") else _BY_TYPE.get(config.get("model_type"), PLAIN)


_BY_TYPE = {
    "clip": CLIP_TEXT,
    "clip_text_model": CLIP_TEXT,
    "bert": CHINESE_TEXT,
    "chinese_clip": CHINESE_TEXT,
    "chinese_clip_text_model": CHINESE_TEXT,
}
