"""What the keys of community files are called here: one table per layout, used in both directions.

The library's own names are diffusers' and transformers' names, so that most tables are short. A table of another layout
lists modules, (ours, theirs); what lies below a module is called the same in both. `formats.networks` has the tables of
each network.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

Pairs = tuple[tuple[str, str], ...]

# What files hold beside networks and no network needs, by whole keys.
_IGNORABLE = re.compile(
    r"(.*\.)?(position_ids|logit_scale|logit_bias|num_batches_tracked)"
    r"|betas|alphas_cumprod(_prev)?|alphas|(sqrt|log)_\w*alphas_cumprod|posterior_\w+|lvlb_weights|logvar|scale_factor"
    r"|denoiser\.sigmas|v_pred|ztsnr"  # buffers of the noise schedule, marks of web interfaces
    r"|model_ema\..*|n_averaged|decay|num_updates"  # an average that was not asked for, its counters
    r"|(cond_stage_model|text_encoders)\.(clip_[lg]\.)?text_projection"  # a matrix beside a tower that has its own
    r"|loss\..*|(optimizer\w*|lr_schedulers?|callbacks|loops)(\..*)?|global_step|epoch|step"  # of training
)


@dataclass(frozen=True)
class KeyTable:
    """How the keys of one kind of file differ from this library's.

    Attributes:
      prefix: what this library's keys begin with, and what is written.
      accepted: prefixes that a file may have in its place; "" stands for none.
      outside: pattern of names, ours and the file's, that do not begin with the prefix.
      ignored: patterns of keys that carry nothing the network needs (buffers, parts of a larger file).
      modules: (ours, theirs), names of modules without the prefix.
      splits: (ours, theirs), names without the prefix of a tensor that the file has once and of the leaves that are the
        equal parts of its rows here, in their order (a fused projection).
      embeddings: pattern of our names of weights that are tables of embeddings, a row for each id.
      convolutions: pattern of our names of the linear layers that the file keeps as 1x1 convolutions.
      transposed: pattern of our names of the linear layers that the file keeps as (in, out), without `weight`.
    """

    prefix: str = ""
    accepted: tuple[str, ...] = ()
    outside: str = r"(?!)"
    ignored: tuple[str, ...] = ()
    modules: Pairs = ()
    splits: tuple[tuple[tuple[str, ...], str], ...] = ()
    embeddings: str = r"(?!)"
    convolutions: str = r"(?!)"
    transposed: str = r"(?!)"

    def to_ours(self, key: str) -> tuple[str, ...]:
        """The library's names of a file's key: one, several for a tensor that is split here, none for an ignored."""
        if any(re.fullmatch(pattern, key) for pattern in self.ignored):
            return ()
        if re.fullmatch(self.outside, key):
            return (_rename(key, self._ours),)
        if not (self.prefix and key.startswith(self.prefix)):
            for prefix in sorted(self.accepted, key=len, reverse=True):
                if key.startswith(prefix):
                    key = self.prefix + key.removeprefix(prefix)
                    break
        return self.parts(key) or (self.prefix + _rename(key.removeprefix(self.prefix), self._ours),)

    def to_theirs(self, key: str) -> str:
        """The file's name of a key of the library's, with `prefix`: the inverse of `to_ours`."""
        if re.fullmatch(self.outside, key):
            return _rename(key, self._theirs)
        key = key.removeprefix(self.prefix)
        return self.prefix + (self._fused.get(key) or _rename(key, self._theirs))

    def prefix_of(self, keys: Iterable[str]) -> str:
        """What most of a file's keys begin with, of the prefixes that it may have."""
        keys = list(keys)
        counts = {prefix: sum(map(lambda key, p=prefix: key.startswith(p), keys)) for prefix in self.accepted}
        own = sum(key.startswith(self.prefix) for key in keys) if self.prefix else 0
        best = max((prefix for prefix in counts if prefix), key=counts.__getitem__, default="")
        return best if best and counts[best] > own else self.prefix if own else ""

    def parts(self, key: str) -> tuple[str, ...]:
        """The library's names of what lies in a file's fused tensor, none for any other; the key is with `prefix`."""
        return tuple(self.prefix + name for name in self._split.get(key.removeprefix(self.prefix), ()))

    def keeps_transposed(self, key: str) -> bool:
        """Whether the file's tensor of this key is the matrix of a linear layer as (in, out)."""
        return any(re.fullmatch(self.transposed, name) for name in self.to_ours(key))

    @cached_property
    def _ours(self) -> dict[str, str]:
        return {theirs: ours for ours, theirs in self.modules}

    @cached_property
    def _theirs(self) -> dict[str, str]:
        return dict(self.modules)

    @cached_property
    def _split(self) -> dict[str, tuple[str, ...]]:
        return {theirs: ours for ours, theirs in self.splits}

    @cached_property
    def _fused(self) -> dict[str, str]:
        return {name: theirs for ours, theirs in self.splits for name in ours}


PLAIN = KeyTable()


def ignorable(key: str) -> bool:
    """Whether a file's key, whole, is one of those that files hold beside networks and that no network needs."""
    return _IGNORABLE.fullmatch(key) is not None


def _rename(key: str, names: Mapping[str, str]) -> str:
    """The longest module that the key lies in, renamed."""
    end = len(key) if names else -1
    while end > 0:
        if key[:end] in names:
            return names[key[:end]] + key[end:]
        end = key.rfind(".", 0, end)
    return key
