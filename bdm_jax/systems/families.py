"""Whole systems, one row each: their parts, who reads which text, schedule, defaults, what diffusers calls them.

This is the one place that lists the parts of systems by name: loading and saving, plug-ins, metadata and flags read
their lists from it. Adding a system is adding a row (docs/architecture.md). Knows no JAX, so that a command line can be
checked before it is loaded.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pkgutil import resolve_name
from typing import Any

from bdm_jax.models.config import (
    BDM_BRANCH,
    BDM_SDXL_BRANCH,
    CHATGLM3_TEXT,
    CHINESE_CLIP_H_PROJECTED_TEXT,
    CHINESE_CLIP_H_TEXT,
    CHINESE_CLIP_L_TEXT,
    CLIP_L_TEXT,
    KOLORS_UNET,
    OPENCLIP_BIGG_TEXT,
    SD15_UNET,
    SD15_VAE,
    SDXL_UNET,
    SDXL_VAE,
    BranchConfig,
    ChatGLMConfig,
    CLIPTextConfig,
    CLIPVisionConfig,
    ControlNetConfig,
    RobertaConfig,
    T2IAdapterConfig,
    TextStatesConfig,
    TinyVAEConfig,
    UNetConfig,
    VAEConfig,
)
from bdm_jax.text.towers import Reader, Tower


@dataclass(frozen=True)
class Part:
    """A network or a tokenizer of a system, under the name that its folder has.

    Attributes:
      name: of its folder, and of the pipeline's attribute.
      configs: the config classes that may stand there; none for a tokenizer.
      kinds: what else a network is called, by itself in a file, that may stand there (see `formats.detect`).
      entry: (library, class) in model_index.json; None for what diffusers' pipelines do not have.
      lora: what the keys of this network begin with in LoRA files, in kohya's names, of which the first is written, and
        in ComfyUI's.
      embedding: what files of textual inversion for several text encoders call this one.
      pad: of a tokenizer that comes with no system of its own: the token that fills windows, if not its usual one.
      mirrors: of a bridge's part: the backbone's part whose plug-ins may change this one in its place.
      flag: help of the flag that names another in its place; "" for none.
    """

    name: str
    configs: tuple[type, ...] = ()
    kinds: tuple[str, ...] = ()
    entry: tuple[str, str] | None = None
    lora: tuple[str, ...] = ()
    embedding: str | None = None
    pad: str | None = None
    mirrors: str | None = None
    flag: str = ""


@dataclass(frozen=True)
class Family:
    """One row: a kind of system.

    Attributes:
      name: the key in `FAMILIES`.
      title: what people call it.
      backbone: the parts that there must be, in the order in which they are listed and loaded; the denoiser first.
      bridge: the parts that a branch adds, all of them or none; the branch first.
      readers: who reads which text; one whose parts are not there reads nothing.
      schedule: class of the noise schedule, or "module:class" where importing it would load JAX.
      schedule_values: where the system's schedule differs from the class's defaults.
      sampler, guidance: the defaults.
      pipeline_class, scheduler_class: diffusers' names of the system and of its usual scheduler.
      index: what else model_index.json holds.
      sizes: of the published networks, by part: what is planned with where no folder is there.
    """

    name: str
    title: str
    backbone: tuple[Part, ...]
    readers: tuple[Reader, ...]
    pipeline_class: str
    scheduler_class: str = "DDIMScheduler"
    bridge: tuple[Part, ...] = ()
    schedule: str | type = "bdm_jax.diffusion.schedule:DiscreteSchedule"
    schedule_values: Mapping[str, Any] = field(default_factory=dict)
    sampler: str = "dpmpp-2m"
    guidance: float = 7.5
    index: Mapping[str, Any] = field(default_factory=dict)
    sizes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def parts(self) -> dict[str, Part]:
        """All by name, the backbone's first."""
        return {part.name: part for part in (*self.backbone, *self.bridge)}

    @property
    def networks(self) -> tuple[str, ...]:
        """Names of the parts that are networks."""
        return tuple(name for name, part in self.parts.items() if part.configs)

    @property
    def tokenizers(self) -> tuple[str, ...]:
        """Names of the parts that are not."""
        return tuple(name for name, part in self.parts.items() if not part.configs)

    @property
    def backbone_names(self) -> tuple[str, ...]:
        """Names of the parts that there must be."""
        return tuple(part.name for part in self.backbone)

    @property
    def bridge_names(self) -> tuple[str, ...]:
        """Names of the parts that a branch adds."""
        return tuple(part.name for part in self.bridge)

    @property
    def towers(self) -> tuple[Tower, ...]:
        """The text encoders with their tokenizers, of all readers."""
        return tuple(tower for reader in self.readers for tower in reader.towers)

    @property
    def text_encoders(self) -> tuple[str, ...]:
        """Names of the text encoders."""
        return tuple(tower.encoder for tower in self.towers)

    @property
    def lora_networks(self) -> tuple[str, ...]:
        """Names of the networks that plug-ins of the LoRA family may change."""
        return tuple(name for name, part in self.parts.items() if part.lora)

    @property
    def backbone_networks(self) -> tuple[str, ...]:
        """Names of the networks that there must be."""
        return tuple(part.name for part in self.backbone if part.configs)

    def step_networks(self, source: str) -> tuple[str, ...]:
        """Names of the networks that a training step works with whose prompts are a source's: the denoiser, for the
        branch's prompts the branch, and the text encoders.
        """
        denoisers = (self.backbone[0].name, *([self.bridge[0].name] if source == "branch" else []))
        return (*denoisers, *self.reader(source).encoders)

    @property
    def zero_empty(self) -> bool:
        """Whether an empty prompt of the backbone is zeros, unless a folder says otherwise."""
        return any(reader.zero_empty for reader in self.readers)

    def reader(self, source: str) -> Reader:
        """The reader of a text. Raises KeyError for a text that the system does not have."""
        found = {reader.source: reader for reader in self.readers}
        return found[source]

    @property
    def branch_towers(self) -> tuple[Tower, ...]:
        """The text encoders of the branch's texts, unless a folder says otherwise; none without a bridge."""
        return next((reader.towers for reader in self.readers if reader.source == "branch"), ())

    def tower(self, encoder: str) -> Tower:
        """How a text encoder is used. Raises KeyError for another part."""
        return {tower.encoder: tower for tower in self.towers}[encoder]

    def mirror(self, name: str) -> str:
        """The bridge's part that stands for a part of the backbone; the part itself where there is none."""
        return next((part.name for part in self.bridge if part.mirrors == name), name)

    @property
    def schedule_class(self) -> type:
        """The class of its noise schedule; imports it."""
        return resolve_name(self.schedule) if isinstance(self.schedule, str) else self.schedule

    def default_schedule(self, **values: Any) -> Any:
        """The system's noise schedule, with other values of some fields; imports its class."""
        return self.schedule_class(**{**self.schedule_values, **values})

    def holds(self, name: str, config: Any) -> bool:
        """Whether a network of these sizes may be the part of that name. A denoiser may if it reads pooled texts, and
        projects the text's states, where the published one does.
        """
        if (part := self.parts.get(name)) is None or not isinstance(config, part.configs):
            return False
        published = self.sizes.get(name)
        if not isinstance(config, UNetConfig) or published is None:
            return True
        return _form(config) == _form(published)


_DIFFUSERS, _TRANSFORMERS = "diffusers", "transformers"
_STATES = ("text_states",)  # texts that were read before may stand in any text encoder's place
_UNET = Part(
    "unet",
    (UNetConfig,),
    entry=(_DIFFUSERS, "UNet2DConditionModel"),
    lora=("lora_unet_", "oft_unet_", "diffusion_model.", "model.diffusion_model."),
)
_VAE = Part(
    "vae",
    (VAEConfig, TinyVAEConfig),
    entry=(_DIFFUSERS, "AutoencoderKL"),
    flag="Another autoencoder: a component folder or a file.",
)
_CLIP = Part(
    "text_encoder",
    (CLIPTextConfig, TextStatesConfig),
    kinds=_STATES,
    entry=(_TRANSFORMERS, "CLIPTextModel"),
    lora=("lora_te_", "lora_te1_", "text_encoders.clip_l.transformer."),
    embedding="clip_l",
    flag="Another English text encoder: a component folder or a file.",
)
_CLIP_TOKENIZER = Part("tokenizer", entry=(_TRANSFORMERS, "CLIPTokenizer"))
_BRANCH = Part(
    "branch",
    (BranchConfig,),
    kinds=("controlnet",),  # 360's branch calls itself a ControlNet
    lora=("lora_branch_",),
    mirrors="unet",
    flag="Another branch: a component folder or a file.",
)
_CHINESE = Part(
    "branch_text_encoder",
    (RobertaConfig, ChatGLMConfig, TextStatesConfig),
    kinds=("text_encoder", *_STATES),  # ChatGLM, as Kolors has it
    lora=("lora_branch_te_",),
    mirrors="text_encoder",
    flag="Another text encoder for the branch: a component folder or a file.",
)
_CHINESE_TOKENIZER = Part("branch_tokenizer")
_BIGG = Part(
    "text_encoder_2",
    (CLIPTextConfig, TextStatesConfig),
    kinds=("text_encoder", *_STATES),
    entry=(_TRANSFORMERS, "CLIPTextModelWithProjection"),
    lora=("lora_te2_", "text_encoders.clip_g.transformer."),
    embedding="clip_g",
    flag="Another second English text encoder (SDXL): a component folder or a file.",
)

_CHINESE_2 = Part(
    "branch_text_encoder_2",
    (RobertaConfig, TextStatesConfig),
    kinds=("branch_text_encoder", *_STATES),
    lora=("lora_branch_te2_",),
    mirrors="text_encoder_2",
    flag="Another second text encoder for the branch (SDXL), with its projection: a component folder or a file.",
)

SD15 = Family(
    "sd15",
    "SD1.x",
    backbone=(_UNET, _VAE, _CLIP, _CLIP_TOKENIZER),
    bridge=(_BRANCH, _CHINESE, _CHINESE_TOKENIZER),
    readers=(
        Reader("backbone", (Tower("text_encoder", "tokenizer"),)),
        Reader("branch", (Tower("branch_text_encoder", "branch_tokenizer"),)),
    ),
    pipeline_class="StableDiffusionPipeline",
    index={
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
    },
    sizes={
        "unet": SD15_UNET,
        "vae": SD15_VAE,
        "text_encoder": CLIP_L_TEXT,
        "branch": BDM_BRANCH,
        "branch_text_encoder": CHINESE_CLIP_H_TEXT,
    },
)
SDXL = Family(
    "sdxl",
    "SDXL",
    backbone=(
        *(_UNET, _VAE, replace(_CLIP, lora=("lora_te1_", *_CLIP.lora)), _BIGG, _CLIP_TOKENIZER),
        Part("tokenizer_2", entry=(_TRANSFORMERS, "CLIPTokenizer"), pad="!"),
    ),
    bridge=(_BRANCH, _CHINESE, _CHINESE_2, _CHINESE_TOKENIZER),
    readers=(
        Reader(
            "backbone",
            (
                Tower("text_encoder", "tokenizer", layer=2, final_norm=False),
                Tower("text_encoder_2", "tokenizer_2", layer=2, final_norm=False, pooled=True),
            ),
            zero_empty=True,
        ),
        Reader(
            "branch",
            (
                Tower("branch_text_encoder", "branch_tokenizer"),
                Tower("branch_text_encoder_2", "branch_tokenizer", pooled="projected"),
            ),
        ),
    ),
    pipeline_class="StableDiffusionXLPipeline",
    scheduler_class="EulerDiscreteScheduler",
    sampler="euler-leading",
    guidance=5.0,
    index={"feature_extractor": [None, None], "image_encoder": [None, None]},
    sizes={
        "unet": SDXL_UNET,
        "vae": SDXL_VAE,
        "text_encoder": CLIP_L_TEXT,
        "text_encoder_2": OPENCLIP_BIGG_TEXT,
        "branch": BDM_SDXL_BRANCH,
        "branch_text_encoder": CHINESE_CLIP_L_TEXT,
        "branch_text_encoder_2": CHINESE_CLIP_H_PROJECTED_TEXT,
    },
)
KOLORS = Family(
    "kolors",
    "Kolors",
    backbone=(
        *(_UNET, _VAE),
        Part(
            "text_encoder",
            (ChatGLMConfig, TextStatesConfig),
            kinds=_STATES,
            entry=("kolors", "ChatGLMModel"),
            lora=("lora_te_", "lora_te1_"),
            flag=_CLIP.flag,
        ),
        Part("tokenizer", entry=("kolors", "ChatGLMTokenizer")),
    ),
    readers=(Reader("backbone", (Tower("text_encoder", "tokenizer", layer=2, pooled=True),)),),
    pipeline_class="KolorsPipeline",
    scheduler_class="EulerDiscreteScheduler",
    schedule_values={"num_train_timesteps": 1100, "beta_end": 0.014},
    sampler="euler-leading",
    guidance=5.0,
    index={"feature_extractor": [None, None], "image_encoder": [None, None]},
    sizes={"unet": KOLORS_UNET, "vae": SDXL_VAE, "text_encoder": CHATGLM3_TEXT},
)
PIXELS = Family(
    "pixels",
    "a pixel-space system",
    backbone=(_UNET, _CLIP, _CLIP_TOKENIZER),
    readers=(Reader("backbone", (Tower("text_encoder", "tokenizer"),)),),
    pipeline_class="BDMPixelPipeline",  # diffusers has none
)
FAMILIES: dict[str, Family] = {family.name: family for family in (SD15, SDXL, KOLORS, PIXELS)}

# Networks that are no part of a system and are used beside one.
BESIDE = (
    Part("controlnet", (ControlNetConfig,)),
    Part("t2i_adapter", (T2IAdapterConfig,)),
    Part("image_encoder", (CLIPVisionConfig,)),
)


def parts() -> Iterator[Part]:
    """Every part of every family, and those beside: each name once, as the first family has it."""
    found = {}
    for family in FAMILIES.values():
        for name, part in family.parts.items():
            found.setdefault(name, part)
    yield from (*found.values(), *BESIDE)


def part(name: str) -> Part:
    """The part of that name. Raises KeyError for a name that no family has."""
    return {part.name: part for part in parts()}[name]


def other_kinds(name: str | None) -> tuple[str, ...]:
    """What else a network is called in a file that may stand in the place of a part of that name."""
    return next((part.kinds for part in parts() if part.name == name), ())


def names() -> frozenset[str]:
    """Names of all parts of all families."""
    return frozenset(name for family in FAMILIES.values() for name in family.parts)


def in_bridge(name: str) -> bool:
    """Whether a part of that name is one that a branch adds."""
    return any(name in family.bridge_names for family in FAMILIES.values())


def tokenizer_of(encoder: str) -> str | None:
    """The tokenizer of a text encoder; None for what is none."""
    towers = (tower for family in FAMILIES.values() for tower in family.towers)
    return next((tower.tokenizer for tower in towers if tower.encoder == encoder), None)


def is_pooled(encoder: str) -> bool:
    """Whether some family takes the pooled text of a text encoder of that name, through the projection that it has."""
    towers = (tower for family in FAMILIES.values() for tower in family.towers)
    return any(tower.pooled for tower in towers if tower.encoder == encoder)


def kind_of(config: Any) -> str:
    """The first part in whose place a network of these sizes may stand. Raises KeyError where there is none."""
    whole = [part for family in FAMILIES.values() for part in family.backbone]
    bridges = [part for family in FAMILIES.values() for part in family.bridge]
    for part in (*whole, *bridges, *BESIDE):
        if isinstance(config, part.configs):
            return part.name
    raise KeyError(type(config).__name__)


def family_of(
    names: Iterable[str], pipeline_class: str | None = None, configs: Mapping[str, Any] | None = None
) -> Family:
    """The family of a set of parts: the one that diffusers calls so, or else the one that they are most of.

    Parts that no family has count for none. A system without an autoencoder is known by its class alone: one that lacks
    its autoencoder must not be taken for it. `configs`: sizes of the networks among them; a family that cannot hold
    these is not it if another can.
    """
    names, configs = set(names), configs or {}
    known = {name: config for name, config in configs.items() if name in names}
    able = [family for family in FAMILIES.values() if all(family.holds(*network) for network in known.items())]
    able = able or [*FAMILIES.values()]
    for family in able:
        if family.pipeline_class == pipeline_class:
            return family
    latent = [family for family in able if "vae" in family.parts] or [SD15]
    found = {family.name: names & family.parts.keys() for family in latent}
    missing = {family.name: sum(part.name not in names for part in family.backbone) for family in latent}
    return max(latent, key=lambda family: (len(found[family.name]), -missing[family.name]))


def flags() -> dict[str, str]:
    """The networks that a command may name others for -> the flag's help."""
    return {part.name: part.flag for part in parts() if part.flag}


def mirror(name: str) -> str:
    """The bridge's part whose plug-ins may be those of a part of the backbone; the part itself where there is none."""
    return next((part.name for part in parts() if part.mirrors == name), name)


def lora_networks() -> tuple[str, ...]:
    """Networks that plug-ins of the LoRA family may change, in the order in which a nameless one is looked for."""
    return tuple(part.name for part in parts() if part.lora)


def embedding_names() -> dict[str, str]:
    """What files of textual inversion for several text encoders call them -> the part."""
    return {part.embedding: part.name for part in parts() if part.embedding}


def lora_prefixes() -> dict[str, str]:
    """What the keys of LoRA files begin with -> the network: `Part.lora`, and diffusers' names (the part's own)."""
    changed = [part for part in parts() if part.lora]
    named = {prefix: part.name for part in changed for prefix in part.lora}
    return named | {f"{part.name}.": part.name for part in changed}


def _form(unet: UNetConfig) -> tuple[bool, bool]:
    return unet.has_addition, unet.encoder_hid_dim is not None
