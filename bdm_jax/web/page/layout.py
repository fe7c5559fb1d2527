"""Where everything stands on the page, and what calls what."""

from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from bdm_jax.diffusion.samplers import SAMPLERS
from bdm_jax.errors import UserError
from bdm_jax.images.decode import read_image
from bdm_jax.plugins.hints import HINTS
from bdm_jax.web.page import show
from bdm_jax.web.page.actions import Actions, View, Visitor
from bdm_jax.web.page.editor import painted_image
from bdm_jax.web.page.fields import AS_STARTED, BARE, FormFields, PickedControl
from bdm_jax.web.page.texts import LANGUAGES, language_of, say, table
from bdm_jax.web.page.words import weight_of, with_word, without_word, word_of

_SLOTS = 6  # LoRAs, and embeddings, at a time
_SIZES = ("512x512", "512x768", "768x512", "768x768", "1024x1024")
_ENDINGS = ("-karras", "-exponential", "-beta")
_PICK = """
element.addEventListener('click', event => {
  const picked = event.target.closest('[data-name]');
  if (picked) trigger('select', {name: picked.dataset.name});
});
"""

texts = gr.I18n(
    **{language: table(language) for language in LANGUAGES},
    **{f"zh-{region}": table("zh") for region in ("CN", "TW", "HK", "SG", "Hans", "Hant")},
)


class Layout:
    """The page's components by name, built inside `gr.Blocks`.

    Args:
      page: the blocks that it is built inside.
      actions: what the buttons do.
      login: there is one, and so a way out.
    """

    def __init__(self, page: gr.Blocks, actions: Actions, login: bool):
        self.actions, self.login = actions, login
        self.fields: dict[str, gr.components.Component] = {}
        self.header = gr.HTML(elem_id="header", js_on_load=None)
        with gr.Row(elem_id="desk"):
            with gr.Column(elem_id="left", scale=0, min_width=0):
                with gr.Column(elem_id="everyday", min_width=0):
                    self._everyday()
                with gr.Column(elem_id="folded", min_width=0):
                    self._texts()
                    self._settings()
                    self._picture()
                    self._plugins()
                    self.dropped = gr.File(
                        file_types=[".png"], file_count="single", height=72, label=texts("restore"), elem_id="restore"
                    )
            with gr.Column(elem_id="right", min_width=0):
                with gr.Column(elem_id="shown", min_width=0):
                    self.stage = gr.HTML(elem_id="stage", js_on_load=_PICK)
                with gr.Column(elem_id="pictures", min_width=0):
                    self._gallery()
        self._events(page)

    def _everyday(self) -> None:
        self._field("prompt", gr.Textbox, lines=3, max_lines=8, placeholder=texts("prompt_hint"), autofocus=True)
        with gr.Row(elem_id="buttons"):
            self.draw = gr.Button(texts("draw"), variant="primary", size="lg", elem_id="draw")
            self.stop = gr.Button(texts("stop"), size="lg", visible=False, elem_id="stop", min_width=0)
            self.clear = gr.Button(texts("clear"), size="lg", visible=False, elem_id="clear", min_width=0)
        self.said = gr.HTML(visible=False, elem_id="said", js_on_load=None)

    def _texts(self) -> None:
        with gr.Accordion(texts("prompts"), open=False, elem_id="prompts"):
            self._field("negative", gr.Textbox, lines=1, max_lines=6, placeholder=texts("negative_hint"))
            self._field("english", gr.Textbox, lines=2, max_lines=8, placeholder=texts("english_hint"))
            self._field("english_negative", gr.Textbox, lines=1, max_lines=6)

    def _settings(self) -> None:
        with gr.Accordion(texts("settings"), open=False, elem_id="settings"):
            with gr.Row():
                self._field("count", gr.Number, value=1, precision=0, minimum=1, min_width=90)
                self._field("seed", gr.Textbox, lines=1, max_lines=1, placeholder=texts("any_seed"), min_width=90)
            with gr.Row():
                self._field(
                    "size", gr.Dropdown, choices=[("", ""), *_SIZES], value="", allow_custom_value=True, min_width=120
                )
                self._field("guidance", gr.Textbox, lines=1, max_lines=1, placeholder=texts("own"), min_width=90)
            self._field("steps", gr.Slider, minimum=1, maximum=100, step=1, value=FormFields.steps)
            self._field("sampler", gr.Dropdown, choices=_samplers(""), value="", allow_custom_value=True)
            self._field("branch_strength", gr.Slider, minimum=0, maximum=2, step=0.05, value=1)
            self._field("more", gr.Textbox, lines=1, max_lines=4, placeholder=texts("more_hint"))

    def _picture(self) -> None:
        with gr.Accordion(texts("picture"), open=False, elem_id="picture") as self.picture:
            gr.Markdown(texts("picture_info"), elem_classes="hint")
            self.editor = painted_image(
                label=texts("editor"),
                show_label=False,
                sources=("upload", "clipboard"),
                transforms=(),
                layers=False,
                buttons=[],
                format="png",
                brush=gr.Brush(colors=["#d9452b"], default_color="#d9452b", color_mode="fixed"),
                elem_id="editor",
            )
            self._field("strength", gr.Slider, minimum=0, maximum=1, step=0.05, value=FormFields.strength)

    def _plugins(self) -> None:
        with gr.Accordion(texts("plugins"), open=False, elem_id="plugins"):
            with gr.Row():
                self._field("model", gr.Dropdown, choices=[("", AS_STARTED)], value=AS_STARTED, min_width=140)
                self._field("branch", gr.Dropdown, choices=[("", AS_STARTED)], value=AS_STARTED, min_width=140)
            self.nothing = gr.Markdown(texts("no_plugins"), elem_classes="hint", visible=False)
            self._field("lora", gr.Dropdown, choices=[], multiselect=True, max_choices=_SLOTS)
            self.lora_strengths = [self._strength(0.0, 2.0) for _ in range(_SLOTS)]
            self._field(
                "embedding", gr.Dropdown, choices=[], multiselect=True, max_choices=_SLOTS, info=texts("embedding_info")
            )
            self.embedding_strengths = [self._strength(0.0, 2.0) for _ in range(_SLOTS)]
            self._field("control", gr.Dropdown, choices=[("", "")], value="")
            with gr.Group(visible=False) as self.control_more:
                self._field(
                    "control_map",
                    gr.Image,
                    type="filepath",
                    sources=["upload", "clipboard"],
                    height=200,
                    buttons=[],
                    image_mode=None,
                )
                self._field("maker", gr.Dropdown, choices=[("", ""), *HINTS], value="")
                self._field("control_strength", gr.Slider, minimum=0, maximum=2, step=0.05, value=1)

    def _strength(self, least: float, most: float) -> gr.Slider:
        return gr.Slider(least, most, value=1, step=0.05, visible=False, show_label=True, interactive=True)

    def _gallery(self) -> None:
        gr.Markdown(texts("gallery"), elem_classes="heading")
        with gr.Column(visible=False, elem_id="picked") as self.picked:
            self.details = gr.HTML(js_on_load=None)
            with gr.Row(elem_id="uses"):
                self.again = gr.Button(texts("again"), size="sm", elem_id="again", min_width=0)
                self.start_from = gr.Button(texts("start_from"), size="sm", elem_id="start-from", min_width=0)
                self.close = gr.Button(texts("close"), size="sm", elem_id="close", min_width=0)
        self.gallery = gr.HTML(elem_id="gallery", js_on_load=_PICK)
        self.older = gr.Button(texts("older"), size="sm", elem_id="older", visible=False)

    def _field(self, name: str, kind: type, **options: Any) -> None:
        options = {"label": texts(name), "elem_id": name.replace("_", "-"), "interactive": True, **options}
        self.fields[name] = kind(**options)

    # what calls what

    def _events(self, page: gr.Blocks) -> None:
        drawing = [self.stage, self.gallery, self.stop, self.clear, self.older]
        fields = self.fields
        opened = page.load(self._opened, None, [self.header, *drawing, *self._listed()], **_QUIET)
        opened.then(self._watch, None, drawing, **_QUIET)
        page.unload(self._closed)
        everything = {*fields.values(), self.editor, *self.lora_strengths}
        submitted = gr.on([self.draw.click, fields["prompt"].submit], self._draw, everything, self.said, **_QUIET)
        submitted.then(self._watch, None, drawing, trigger_mode="always_last", **_QUIET)
        self.stop.click(self._stop, None, None, **_QUIET)
        self.clear.click(self._clear, None, None, **_QUIET)
        self.older.click(self._older, None, self.gallery, **_QUIET)
        picked = [self.picked, self.details, self.gallery]
        for one in (self.stage, self.gallery):
            one.select(self._select, None, picked, **_QUIET)
        self.close.click(self._unselect, None, picked, **_QUIET)
        self.picked_loras, self.picked_words = gr.State([]), gr.State([])
        filled = [self.said, *fields.values(), self.picked_loras, *self.lora_strengths]
        filled += [self.picked_words, *self.embedding_strengths, self.control_more]
        self._fillable = len(filled)
        self.again.click(self._again, None, filled, **_QUIET)
        self.dropped.upload(self._dropped, self.dropped, [self.dropped, *filled], **_QUIET)
        self.start_from.click(self._start_from, None, [self.editor, self.picture], **_QUIET)
        loras, words, english = fields["lora"], fields["embedding"], fields["english"]
        strengths = [self.picked_loras, *self.lora_strengths]
        loras.input(_loras_picked, [loras, *strengths], strengths, **_QUIET)
        weights = [self.picked_words, english, *self.embedding_strengths]
        words.input(_words_picked, [words, self.picked_words, english], weights, **_QUIET)
        for index, slider in enumerate(self.embedding_strengths):
            slider.release(_weighed(index), [words, slider, english], english, **_QUIET)
        fields["control"].input(_control_picked, fields["control"], self.control_more, **_QUIET)

    def _listed(self) -> list[gr.components.Component]:
        names = ("size", "sampler", "model", "branch", "lora", "embedding", "control", "maker")
        return [*(self.fields[name] for name in names), self.nothing]

    def _opened(self, request: gr.Request) -> list[Any]:
        visitor = _visitor(request)
        language, models = visitor.language, self.actions.service.models
        started = self.actions.service.parts.names()
        names = {kind: models.names(kind) for kind in ("models", "branches", "loras", "embeddings", "controls")}
        own = say("own", language)
        own_model = self.actions.service.parts.model.resolve()
        others = [name for name in names["models"] if models.path("models", name).resolve() != own_model]
        lists = [
            [(own, ""), *_SIZES],
            _samplers(own),
            [(started["model"], AS_STARTED), *others],
            [(started.get("branch", own), AS_STARTED), (say("bare", language), BARE), *names["branches"]],
            names["loras"],
            names["embeddings"],
            [(say("control_none", language), ""), *names["controls"]],
            [(say("maker_none", language), ""), *HINTS],
        ]
        plugins = dict(zip(("lora", "embedding", "control"), lists[4:7], strict=True))
        shown = {"lora": names["loras"], "embedding": names["embeddings"], "control": names["controls"]}
        updates = [gr.update(choices=choices) for choices in lists]
        for index, name in enumerate(plugins, 4):
            updates[index] = gr.update(choices=lists[index], visible=bool(shown[name]))
        header = show.header(language, self.login)
        nothing = gr.update(visible=not any(shown.values()))
        return [header, *_drawing(self.actions.opened(visitor)), *updates, nothing]

    def _closed(self, request: gr.Request) -> None:
        self.actions.closed(request.session_hash)

    def _draw(self, data: dict[gr.components.Component, Any], request: gr.Request) -> Any:
        try:
            self.actions.draw(self._read(data), _visitor(request))
        except UserError as error:
            return _said([str(error)], failed=True)
        return gr.update(visible=False)

    def _read(self, data: dict[gr.components.Component, Any]) -> FormFields:
        """The fields as they stand. Raises UserError for an image that cannot be read."""
        value = {name: data[one] for name, one in self.fields.items()}
        painted = data[self.editor]
        strengths = [data[one] for one in self.lora_strengths]
        control = None
        if value["control"]:
            control = PickedControl(
                value["control"], value["control_map"], value["maker"] or "", value["control_strength"]
            )
        written = ("prompt", "negative", "english", "english_negative", "sampler", "guidance", "size", "seed")
        written += ("more", "model", "branch")
        numbers = ("steps", "count", "branch_strength", "strength")
        return FormFields(
            **{name: value[name] or "" for name in written},
            **{name: value[name] for name in numbers},
            image=None if painted is None else painted.image(),
            mask=None if painted is None else painted.mask(),
            loras=tuple(zip(value["lora"] or (), strengths, strict=False)),
            embeddings=tuple(value["embedding"] or ()),
            control=control,
        )

    async def _watch(self, request: gr.Request) -> AsyncIterator[list[Any]]:
        async for view in self.actions.watch(_visitor(request)):
            yield _drawing(view)

    def _stop(self, request: gr.Request) -> None:
        self.actions.stop(_visitor(request))

    def _clear(self, request: gr.Request) -> None:
        self.actions.clear(_visitor(request))

    def _older(self, request: gr.Request) -> str:
        return self.actions.older(_visitor(request))

    def _select(self, picked: gr.EventData, request: gr.Request) -> list[Any]:
        return self._picked(picked._data.get("name"), request)

    def _unselect(self, request: gr.Request) -> list[Any]:
        return self._picked(None, request)

    def _picked(self, name: str | None, request: gr.Request) -> list[Any]:
        said, gallery = self.actions.select(name, _visitor(request))
        return [gr.update(visible=said is not None), said or "", gallery]

    def _again(self, request: gr.Request) -> list[Any]:
        visitor = _visitor(request)
        return self._filled(lambda: self.actions.selected(visitor), visitor)

    def _dropped(self, file: str, request: gr.Request) -> list[Any]:
        return [None, *self._filled(lambda: Path(file), _visitor(request))]

    def _filled(self, path: Callable[[], Path | None], visitor: Visitor) -> list[Any]:
        """The fields as a picture has them, or one line of why it has none."""
        try:
            if (found := path()) is None:
                return [gr.skip()] * self._fillable
            restored = self.actions.restore(found, visitor)
        except UserError as error:
            return [_said([str(error)], failed=True), *[gr.skip()] * (self._fillable - 1)]
        return [_said([say("restored", visitor.language), *restored.notes]), *self._written(restored.fields)]

    def _written(self, fields: FormFields) -> list[Any]:
        control = fields.control
        values = {name: getattr(fields, name) for name in self.fields if hasattr(fields, name)}
        values |= {"lora": [name for name, _ in fields.loras], "embedding": [*fields.embeddings]}
        values |= {
            "control": control.name if control else "",
            "control_map": None,
            "maker": control.maker if control else "",
            "control_strength": control.strength if control else 1.0,
        }
        weights = {word: weight_of(fields.english, word_of(word)) for word in fields.embeddings}
        return [
            *(gr.update(value=values[name]) for name in self.fields),
            values["lora"],
            *_sliders(fields.loras),
            values["embedding"],
            *_sliders([(word, 1.0 if weight is None else weight) for word, weight in weights.items()]),
            gr.update(visible=control is not None),
        ]

    def _start_from(self, request: gr.Request) -> list[Any]:
        try:
            path = self.actions.selected(_visitor(request))
        except UserError:
            path = None
        if path is None:
            return [gr.skip(), gr.skip()]
        return [{"background": read_image(path), "layers": [], "composite": None}, gr.update(open=True)]


_QUIET = {"show_progress": "hidden", "api_visibility": "private", "concurrency_limit": None}


def _visitor(request: gr.Request) -> Visitor:
    language = language_of(request.headers.get("accept-language"))
    return Visitor(request.session_hash or "", language, request.username or "")


def _drawing(view: View) -> list[Any]:
    """For stage, gallery, stop, clear, older."""
    return [
        view.stage,
        gr.skip() if view.gallery is None else view.gallery,
        gr.update(visible=view.busy),
        gr.update(visible=view.waiting > 0),
        gr.update(visible=view.more),
    ]


def _said(lines: Sequence[str], failed: bool = False) -> Any:
    return gr.update(value=show.notes(lines, failed), visible=True)


def _samplers(own: str) -> list[Any]:
    """Those with a name of their own; their other noise levels and spacings can be written."""
    return [(own, ""), *(name for name in SAMPLERS if not name.endswith(_ENDINGS))]


def _sliders(strengths: Sequence[tuple[str, float]]) -> list[Any]:
    """One for each plug-in that is picked; the others are hidden."""
    shown = [gr.update(label=word_of(name), value=strength, visible=True) for name, strength in strengths[:_SLOTS]]
    return shown + [gr.update(visible=False)] * (_SLOTS - len(shown))


def _loras_picked(names: list[str], before: list[str], *values: float) -> list[Any]:
    """A slider for each, those that stay with their strengths."""
    known = dict(zip(before, values, strict=False))
    return [names, *_sliders([(name, known.get(name, 1.0)) for name in names])]


def _words_picked(names: list[str], before: list[str], english: str) -> list[Any]:
    """The words of those that are picked go into the prompt, of those that are no more out of it."""
    for name in before:
        if name not in names:
            english = without_word(english, word_of(name))
    for name in names:
        if weight_of(english, word_of(name)) is None:
            english = with_word(english, word_of(name))
    return [names, english, *_sliders([(name, weight_of(english, word_of(name)) or 1.0) for name in names])]


def _weighed(index: int) -> Callable[[list[str], float, str], Any]:
    """Writes the weight of the so-manieth embedding into the prompt."""

    def weigh(names: list[str], weight: float, english: str) -> Any:
        return with_word(english, word_of(names[index]), weight) if index < len(names) else gr.skip()

    return weigh


def _control_picked(name: str) -> Any:
    return gr.update(visible=bool(name))
