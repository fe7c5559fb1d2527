"""What a user names -> a path on this machine: what lies here under that text, else of a repository on a hub
(`formats.hub`) the files that are read, or the one file of a link (`formats.links`).

What is read is decided as for folders here: of a pipeline its networks and tokenizers, of each network the one weight
file that `formats.weights` would take, never a second format or precision beside it. Configs come first: what this
library would refuse by them is refused before its weights are fetched.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any

from bdm_jax.errors import FileError, UserError
from bdm_jax.formats import hub, links
from bdm_jax.formats.detect import kind_of
from bdm_jax.formats.files import few, read_json
from bdm_jax.formats.hub import HubName, Repository, is_remote, parse_name
from bdm_jax.formats.lora import LORA_STEMS, PEFT_CONFIG
from bdm_jax.formats.outlines import outline, outline_of_link
from bdm_jax.formats.weights import TAESD_FILES, VARIANTS, is_index, weight_map, weights_among
from bdm_jax.systems import families
from bdm_jax.systems.index import CHECKERS, INDEX, SCHEDULE, read_index

_CONFIG = "config.json"
# What of a tokenizer's folder is read.
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_TOKENIZER += ("vocab.json", "merges.txt", "vocab.txt", "spiece.model", "tokenizer.model")
_TRAINING = "training.json"  # what a pipeline was trained on
# A single weight file, the safe format first; of several at one place these are the usual names.
_SUFFIXES = (".safetensors", ".ckpt", ".bin", ".pt", ".pth")
_USUAL = (*LORA_STEMS, "learned_embeds")

_known: dict[tuple, Path] = {}  # a name stands for one commit as long as a process lives


def local(
    source: str | Path, part: str | None = None, variant: str | None = None, without: Collection[str] = ()
) -> Path:
    """The path of what a user names, fetched where it is not here; a path that is here, and one that is none, as it is.

    Args:
      source: a path, a name (OWNER/NAME[@REVISION][:PLACE]) or an http(s) link.
      part: of a system (`families`), where it is one: of a tokenizer no weights are fetched.
      variant: which of a folder's weight files ("fp16"); of a part by itself where it has it.
      without: the parts of a pipeline that are not needed.

    Raises UserError or FileError, one line, for what is neither here nor to be had.
    """
    if not is_remote(source):
        return Path(source)
    key = str(source), part, variant, tuple(sorted(without))
    if (found := _known.get(key)) is None or not found.exists():
        asked = parse_name(str(source))
        found = links.fetch(str(source)) if asked is None else _fetched(asked, part, variant, without)
        _known[key] = found
    return found


def local_parts(
    model: str | Path, backbone: str | Path | None, networks: Mapping[str, str | Path | None], variant: str | None
) -> tuple[Path, Path | None, dict[str, Path]]:
    """The paths of what `BridgePipeline.from_pretrained` is given; of a system not the parts that others replace."""
    given = {name: path for name, path in networks.items() if path is not None}
    found = {name: local(path, name, variant) for name, path in given.items()}
    bridges = {name for name in families.names() if families.in_bridge(name)}
    other = None if backbone is None else local(backbone, None, variant, {*given, *bridges})
    return local(model, None, variant, given), other, found


def local_blended(source: str | Path) -> Path:
    """The path of a model to blend with: of its parts those that are blended (`plugins.install.with_blend`)."""
    return local(source, without=families.names() - {*families.lora_networks()})


def local_config(source: str | Path) -> Path:
    """The config.json of a network's folder, which alone is fetched. Raises UserError or FileError as `local`."""
    if not is_remote(source) or (asked := parse_name(str(source))) is None:
        return Path(source) / _CONFIG if Path(source).is_dir() else local(source)
    name = f"{asked.place}/{_CONFIG}" if asked.place else _CONFIG
    return local(f"{asked.name}@{asked.revision}:{name}")


@contextmanager
def outlined(source: str | Path, variant: str | None = None) -> Iterator[Path]:
    """A copy, while the block lasts, of what a user names on a hub or by a link: configs whole, of weight files only
    what says which tensors they hold, read by ranges. The tensors are zeros.

    Raises UserError or FileError as `local`.
    """
    asked = parse_name(str(source))
    with TemporaryDirectory(prefix="bdm_jax-", ignore_cleanup_errors=True) as folder:
        if asked is None:
            yield outline_of_link(str(source), Path(folder))
            return
        repository = hub.open_repository(asked)
        root = Path(folder) / "file"

        def get(names: Sequence[str]) -> Path:
            for name in names:
                outline(repository, name, root / name)
            return root

        yield _selected(repository, get, None, variant, ())


def remote_name(path: str | Path) -> str | None:
    """What a path was fetched by: OWNER/NAME@COMMIT[:PLACE], or a link; None of what was not fetched."""
    return hub.name_of(path) or links.link_of(path)


def recorded(path: str | Path) -> str:
    """What images and configs record of a part: what it was fetched by, else its name without folders."""
    return remote_name(path) or Path(path).name


def written(value: Any) -> Any:
    """A setting as reports and configs keep it: a path as what it was fetched by or as it is, others as they are."""
    return (remote_name(value) or str(value)) if isinstance(value, Path) else value


def _fetched(asked: HubName, part: str | None, variant: str | None, without: Collection[str]) -> Path:
    repository = hub.open_repository(asked)

    def get(names: Sequence[str]) -> Path:
        hub.fetch(repository, names)
        return repository.folder

    return _selected(repository, get, part, variant, without)


Get = Callable[[Sequence[str]], Path]  # fetches files; the folder of the repository


def _selected(
    repository: Repository, get: Get, part: str | None, variant: str | None, without: Collection[str]
) -> Path:
    """Fetch what is read of a repository, or of a file or folder in it; where that is then."""
    place, written = repository.asked.place, repository.asked.written
    if place in repository.files:
        root = get([place])
        _take_shards(repository, get, root, place, repository.files)
        return root / place
    there = _inside(repository.files, place)
    if not there:
        _check_cached(repository, [place or "all of it"])
        raise UserError(f"{written}: no file or folder {place} in it; it has {few(sorted(repository.files), 8)}")
    prefix = f"{place}/" if place else ""

    def take(names: Sequence[str]) -> Path:
        return get([prefix + name for name in names]) / place

    if part is not None and part in families.names() and not families.part(part).configs:
        return take([name for name in _TOKENIZER if name in there])
    if all(f"{name}.safetensors" in there for name in TAESD_FILES):
        return take([*(f"{name}.safetensors" for name in TAESD_FILES), *({_CONFIG} & there)])
    if _CONFIG in there:
        # a part that is named by itself need not have the variant of the others
        _component(repository, take, "", there, variant if part is None or weights_among(there, variant) else None)
        _beside(repository, get, place)
        return take(())
    if INDEX in there or any(f"{child}/{_CONFIG}" in there for child in _folders(there)):
        if part is not None and part in families.names():
            raise UserError(f"{written}: a whole system; for one part of it name its folder, as in {written}:{part}")
        return _pipeline(repository, take, there, variant, without)
    if PEFT_CONFIG in there:
        return take([PEFT_CONFIG, _single(written, [n for n in there if n.startswith(LORA_STEMS[0])], variant)])
    name = _single(written, there, variant)
    return take([name]) / name


def _pipeline(
    repository: Repository, take: Get, there: Collection[str], variant: str | None, without: Collection[str]
) -> Path:
    """The parts that systems have, their configs first; of other component folders the configs, which are named."""
    root = take([name for name in (INDEX, _TRAINING) if name in there])
    read_index(root / INDEX)
    known = families.names() - {*without}
    wanted = [name for name in _folders(there) if name in known]
    if repository.offline and INDEX in there:  # online they are not there at all, which who reads the folder says
        listed = {name for name, entry in read_json(root / INDEX).items() if isinstance(entry, list) and any(entry)}
        _check_cached(repository, sorted((listed & known) - {*wanted}))
    networks = [name for name in wanted if families.part(name).configs]
    texts = [f"{name}/{text}" for name in wanted for text in _TOKENIZER if name not in networks]
    others = sorted({*_folders(there)} - families.names() - CHECKERS)
    texts += [f"{name}/{_CONFIG}" for name in others]
    take([name for name in (*texts, f"scheduler/{SCHEDULE}") if name in there])
    for name in networks:
        _component(repository, take, f"{name}/", there, variant)
    return root


def _component(repository: Repository, take: Get, prefix: str, there: Collection[str], variant: str | None) -> None:
    """A network's folder: its config and tokenizer, then its weights."""
    written, inside = repository.asked.written, _inside(there, prefix.rstrip("/"))
    root = take([prefix + name for name in (_CONFIG, *_TOKENIZER) if name in inside])
    if _CONFIG in inside and kind_of(values := read_json(root / prefix / _CONFIG)) is None:
        name = values.get("_class_name") or values.get("model_type")
        raise UserError(f"{written}: {prefix}{_CONFIG}: {name!r} is not a network this library has")
    weights = weights_among(inside, variant)
    if weights is None:
        _check_cached(repository, [f"{prefix}*{f'.{variant}' if variant else ''}.safetensors"])
        known = [kind for kind in VARIANTS if kind and weights_among(inside, kind)]
        others = f"; there are the variants {', '.join(known)}" if known else ""
        which = f"weights of the variant {variant!r}" if variant else "weights that are read here"
        raise FileError(f"{written}: no {which} in {prefix or 'it'}{others}")
    take([prefix + weights])
    _take_shards(repository, take, root, prefix + weights, there)


def _check_cached(repository: Repository, missing: Sequence[str]) -> None:
    """Raises UserError for what the cache lacks, where there is nothing but the cache."""
    if repository.offline and missing:
        raise hub.lacking(repository, missing)


def _take_shards(repository: Repository, take: Get, root: Path, name: str, there: Collection[str]) -> None:
    """The files that a weight file names, where it is the index of others."""
    if is_index(name):
        beside = PurePosixPath(name).parent
        shards = sorted({str(beside / shard) for shard in weight_map(root / name).values()})
        if lost := [shard for shard in shards if shard not in there]:
            _check_cached(repository, lost)
            raise FileError(f"{repository.asked.written}: {name} names {few(lost)}, which it does not have")
        take(shards)


def _beside(repository: Repository, get: Get, place: str) -> None:
    """The tokenizer that lies beside or in a text encoder's folder (`systems.folder.tokenizer_beside`)."""
    path = PurePosixPath(place)
    if (name := families.tokenizer_of(path.name)) is not None:
        texts = [str(path.parent / name / text) for text in _TOKENIZER]
        get([text for text in texts if text in repository.files])


def _single(written: str, there: Collection[str], variant: str | None) -> str:
    """The only weight file of a folder, or the one that is called as such files are."""
    weights = [name for name in there if _is_weights(name)]
    top = [name for name in weights if "/" not in name] or weights
    for suffix in _SUFFIXES:
        found = sorted(name for name in top if name.lower().endswith(suffix))
        plain = [name for name in found if _variant(name) is None]
        found = [name for name in found if _variant(name) == variant] if variant else plain or found
        usual = [name for name in found if PurePosixPath(name).stem.partition(".")[0] in _USUAL]
        if len(found) == 1 or len(usual) == 1:
            return (usual or found)[0]
        if found:
            raise UserError(f"{written}: holds several files: name one, as in {written}:{found[0]} ({few(found, 8)})")
    which = f" of the variant {variant!r}" if variant else ""
    raise UserError(f"{written}: no weights{which} that are read here; it holds {few(sorted(there), 8)}")


def _is_weights(name: str) -> bool:
    return name.lower().endswith(_SUFFIXES)


def _variant(name: str) -> str | None:
    """The variant that a file's name tells of: "fp16" of ink.fp16.safetensors."""
    kind = PurePosixPath(name).stem.rpartition(".")[2]
    return kind if kind in VARIANTS else None


def _inside(files: Collection[str], place: str) -> set[str]:
    prefix = f"{place}/" if place else ""
    return {name.removeprefix(prefix) for name in files if name.startswith(prefix)}


def _folders(there: Collection[str]) -> list[str]:
    return sorted({name.partition("/")[0] for name in there if "/" in name})
