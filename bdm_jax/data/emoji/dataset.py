"""The bundled bilingual set as a TFDS builder: emoji artwork with Chinese and English names (array_record files)."""

import numpy as np
import tensorflow_datasets as tfds
from etils import epath

from bdm_jax.data.emoji import artwork


class Emoji(tfds.core.GeneratorBasedBuilder):
    """One record per concept and art style, sorted by (style, id); the single split is "train".

    The image feature receives encoded PNG bytes, so that neither writing nor reading needs TensorFlow.
    `zh_only` marks concepts of Chinese culture, which English-side training must not see.
    """

    VERSION = tfds.core.Version("2.0.0")
    code_path = epath.Path(__file__)  # otherwise TFDS needs importlib_resources, which it does not declare
    RELEASE_NOTES = {
        "1.0.0": "Fluent flat and Noto artwork at 128 x 128 with the names of CLDR 48.2.",
        "2.0.0": "Artwork with its transparency.",
    }
    MANUAL_DOWNLOAD_INSTRUCTIONS = "npm packages, unpacked; `python -m bdm_jax.data.emoji.render_emoji` fetches them."

    def _info(self) -> tfds.core.DatasetInfo:
        size = artwork.SIZE
        features = tfds.features.FeaturesDict(
            {
                "image": tfds.features.Image(shape=(size, size, 4), encoding_format="png"),
                "id": tfds.features.Text(doc="hex code points joined by -"),
                "character": tfds.features.Text(),
                "style": tfds.features.Text(doc=f"one of {', '.join(sorted(artwork.STYLES))}"),
                "zh": tfds.features.Text(doc="Chinese name"),
                "en": tfds.features.Text(doc="English name"),
                "zh_keywords": tfds.features.Sequence(tfds.features.Text()),
                "en_keywords": tfds.features.Sequence(tfds.features.Text()),
                "zh_only": tfds.features.Scalar(np.bool_, doc="concept of Chinese culture, not for English training"),
            }
        )
        return tfds.core.DatasetInfo(
            builder=self,
            description="Emoji artwork in two styles, with transparency, and Unicode CLDR names in Chinese and "
            "English.",
            features=features,
            homepage="https://cldr.unicode.org/",
            license="Artwork: MIT (fluent), Apache-2.0 (noto); captions: Unicode-3.0. See NOTICE.",
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict:
        return {"train": self._generate_examples(dl_manager.manual_dir)}

    def _generate_examples(self, packages):
        yield from enumerate(artwork.records(packages))
