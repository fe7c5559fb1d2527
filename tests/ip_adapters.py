"""IP-Adapter files of random weights, in their authors' names."""

import torch


def published(kind, unet, seed, width=None):
    """A file of IP-Adapter's authors at random: base (of a vector of 12) or Plus (of states 32 wide)."""
    generator = torch.Generator().manual_seed(seed)
    width = width or unet.config.cross_attention_dim

    def draw(*shape):
        return torch.randn(shape, generator=generator) / shape[-1] ** 0.5

    if kind == "base":
        shapes = {"proj.weight": (4 * width, 12), "proj.bias": (4 * width,), "norm.weight": (width,)}
        shapes |= {"norm.bias": (width,)}
    else:
        inner = 24
        shapes = {"latents": (1, 5, inner), "proj_in.weight": (inner, 32), "proj_in.bias": (inner,)}
        shapes |= {"proj_out.weight": (width, inner), "proj_out.bias": (width,)}
        shapes |= {f"norm_out.{x}": (width,) for x in ("weight", "bias")}
        norms = [f"{norm}.{x}" for norm in ("0.norm1", "0.norm2", "1.0") for x in ("weight", "bias")]
        for i in range(4):
            at = f"layers.{i}"
            shapes |= {f"{at}.{norm}": (inner,) for norm in norms}
            shapes |= {f"{at}.0.to_q.weight": (128, inner), f"{at}.0.to_kv.weight": (256, inner)}
            shapes |= {f"{at}.0.to_out.weight": (inner, 128)}
            shapes |= {f"{at}.1.1.weight": (4 * inner, inner), f"{at}.1.3.weight": (inner, 4 * inner)}
    projection = {key: draw(*shape) * 4 for key, shape in shapes.items()}
    layers = {}
    for n, name in enumerate(unet.attn_processors):
        module = unet.get_submodule(name.removesuffix(".processor"))
        if module.is_cross_attention:
            layers |= {f"{n}.to_{x}_ip.weight": draw(module.inner_dim, width) for x in "kv"}
    return {"image_proj": projection, "ip_adapter": layers}
