"""What the page says, in both languages."""

from bdm_jax.errors import UserError

LANGUAGES = ("zh", "en")
FALLBACK = "en"

_TEXTS: dict[str, tuple[str, str]] = {
    "title": ("桥接扩散模型", "Bridge Diffusion Model"),
    "prompt": ("提示词", "Prompt"),
    "prompt_hint": ("想画什么？例如：红灯笼", "In Chinese, for example 红灯笼"),
    "draw": ("开始绘制", "Draw"),
    "stop": ("停止", "Stop"),
    "clear": ("清空队列", "Clear the queue"),
    "prompts": ("英文与反向提示词", "English and negative prompts"),
    "english": ("英文提示词", "English prompt"),
    "english_hint": ("由英文主干读取，可以为空", "Read by the English backbone; may be empty"),
    "negative": ("反向提示词", "Negative prompt"),
    "negative_hint": ("不希望出现的内容（中文）", "What shall not be in the picture, in Chinese"),
    "english_negative": ("英文反向提示词", "English negative prompt"),
    "settings": ("参数", "Settings"),
    "count": ("张数", "Pictures"),
    "size": ("尺寸（宽x高）", "Size (width x height)"),
    "seed": ("随机种子", "Seed"),
    "any_seed": ("随机", "any"),
    "steps": ("步数", "Steps"),
    "guidance": ("引导强度", "Guidance"),
    "sampler": ("采样器", "Sampler"),
    "branch_strength": ("中文分支强度", "Branch strength"),
    "own": ("模型默认", "the model's own"),
    "more": ("其他参数", "Other settings"),
    "more_hint": ("与命令行相同，例如 --hires 2 --clip-skip 2", "As on the command line: --hires 2 --clip-skip 2"),
    "picture": ("参考图与蒙版", "Image and mask"),
    "picture_info": (
        "从一张图片开始绘制；用画笔涂抹的部分会重画，不涂则重画整张图。",
        "Start from an image. What you paint over is redrawn; without paint, all of it is.",
    ),
    "editor": ("图片（涂抹处重画）", "Image (painted parts are redrawn)"),
    "strength": ("重绘强度", "Denoising strength"),
    "plugins": ("模型与插件", "Model and plug-ins"),
    "model": ("模型", "Model"),
    "branch": ("中文分支", "Branch"),
    "bare": ("不使用（仅英文主干）", "none (the English backbone alone)"),
    "lora": ("LoRA", "LoRA"),
    "embedding": ("Embedding（文本反演）", "Embedding (textual inversion)"),
    "embedding_info": ("选中后，它的词会写进英文提示词", "Its word is written into the English prompt"),
    "control": ("ControlNet", "ControlNet"),
    "control_none": ("不使用", "none"),
    "control_map": ("控制图", "Map"),
    "maker": ("从照片提取", "Made from a photo by"),
    "maker_none": ("已经是控制图", "it is a map already"),
    "control_strength": ("ControlNet 强度", "ControlNet strength"),
    "no_plugins": (
        "启动时用 --models 指定模型文件夹，其中 loras、embeddings、controlnet 里的文件会出现在这里。",
        "Name a models folder with --models: what lies in its loras, embeddings and controlnet is listed here.",
    ),
    "restore": ("把画过的 PNG 拖到这里，恢复它的设置", "Drop a picture drawn here to use its settings"),
    "gallery": ("已画的图", "Pictures"),
    "gallery_empty": ("画好的图都会留在这里。", "Finished pictures stay here."),
    "again": ("使用这些设置", "Use these settings again"),
    "start_from": ("以此图为起点", "Start from this image"),
    "close": ("收起", "Close"),
    "older": ("更早的图", "Older pictures"),
    "open_file": ("打开原图", "Open the file"),
    "empty": ("写一句中文，点“开始绘制”。", "Write a line in Chinese, then press Draw."),
    "waiting": ("排队中，前面还有 {n} 个任务", "Waiting, {n} before it"),
    "next": ("马上开始", "About to begin"),
    "loading": ("正在载入模型", "Loading the model"),
    "compiling": ("正在准备（每种尺寸首次需要编译）", "Preparing (compiled once for each size)"),
    "drawing": ("正在绘制", "Drawing"),
    "done": ("完成", "Done"),
    "stopped": ("已停止", "Stopped"),
    "stopped_kept": ("已停止，画好的图保留", "Stopped; finished pictures are kept"),
    "failed": ("没有画成", "It could not be drawn"),
    "of": ("第 {n} / {total} 张", "{n} of {total}"),
    "queued": ("队列中还有 {n} 个任务", "{n} more in the queue"),
    "restored": ("已恢复设置", "Settings restored"),
    "from_image": (
        "这张图是从另一张图片画出的（{name}）：请重新放入那张图片",
        "It was drawn from another image ({name}): give that image again",
    ),
    "from_map": ("它用到控制图：请重新放入", "It was drawn with a ControlNet's map: give the map again"),
    "lost_part": (
        "它用到的{kind} {name} 不在模型文件夹里",
        "It was drawn with the {kind} {name}, which is not in the models folder",
    ),
    "text_strength": (
        "它的 LoRA {name} 在文本编码器中的强度是 {strength}，这里两处用同一强度",
        "Its LoRA {name} had the strength {strength} in the text encoder; here both are the same",
    ),
    "login": ("请输入访问密钥", "Enter your key"),
    "enter": ("进入", "Enter"),
    "wrong_key": ("密钥不对", "This key is not known"),
    "logout": ("退出", "Log out"),
}


def language_of(accepted: str | None) -> str:
    """The language for a browser's `Accept-Language`: Chinese where that is asked for before English.

    As in the browser itself, the first one decides: `zh-TW,en` -> "zh"; `de,zh` -> "en".
    """
    first = (accepted or "").split(",")[0].split(";")[0].strip().lower()
    return "zh" if first == "zh" or first.startswith("zh-") else FALLBACK


def say(key: str, language: str, **values: object) -> str:
    """A text, its placeholders filled. Raises UserError for a language that there is not."""
    if language not in LANGUAGES:
        raise UserError(f"language {language!r}: known are {', '.join(LANGUAGES)}")
    return _TEXTS[key][LANGUAGES.index(language)].format(**values)


def table(language: str) -> dict[str, str]:
    """All texts of a language, for the browser."""
    return {key: texts[LANGUAGES.index(language)] for key, texts in _TEXTS.items()}
