"""The bench at toy sizes: both sides run and are reported; what is counted as work."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from PIL import Image

from bdm_jax.bench import __main__ as bench
from bdm_jax.bench import openvino, pytorch
from bdm_jax.bench.cases import CASES, GuidedStep, Sizes
from bdm_jax.models.config import BranchConfig, CLIPTextConfig, RobertaConfig, UNetConfig, VAEConfig
from bdm_jax.runtime import costs

SHARED = dict(
    block_out_channels=(32, 64), transformer_layers=(1, 0), num_heads=4, layers_per_block=1, norm_num_groups=8
)
ADDED = dict(addition_time_embed_dim=8, projection_class_embeddings_input_dim=6 * 8 + 16, use_linear_projection=True)
TOWER = dict(vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
TOY = Sizes(
    GuidedStep(UNetConfig(**SHARED, cross_attention_dim=32), BranchConfig(**SHARED, cross_attention_dim=32)),
    CLIPTextConfig(**TOWER, bos_token_id=48, eos_token_id=49, pad_token_id=49),
    RobertaConfig(**TOWER),
    VAEConfig(block_out_channels=(32, 32, 64, 64), layers_per_block=1),
    UNetConfig(**SHARED, **ADDED, cross_attention_dim=32),
    UNetConfig(**SHARED, **ADDED, cross_attention_dim=32, encoder_hid_dim=24),
)


ALONE = ("train", "sdxl", "kolors")  # which OpenVINO does not do


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_cases_are_timed_against_others(capsys, dtype):
    cases = tuple(case for case in CASES if case != "two-prompts")  # the same but for one row of text
    settings = bench.BenchArgs(cases, (64,), against=("diffusers", "openvino"), repeats=1, dtype=dtype)
    report = bench.bench(settings, TOY)
    assert report["settings"]["dtype"] == dtype
    assert [row["case"] for row in report["rows"]] == list(cases)
    for row in report["rows"]:
        assert row["tflop"] > 0 and row["seconds"] > 0 and row["memory"] > 0
        assert list(row["others"]) == ["diffusers", "openvino"][: 1 if row["case"] in ALONE else 2]
        for other in row["others"].values():
            assert other["ratio"] == pytest.approx(row["seconds"] / other["seconds"])
    json.dumps(report)
    assert capsys.readouterr().out.count("ratio") == 2 * len(cases) - len(ALONE)


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-4), ("bfloat16", 3e-2)])
def test_the_others_compute_the_same(dtype, tolerance):
    """Relative to the largest value. Random weights differ from ours, so the two others are held against each other."""
    x = TOY.normal(2, 8, 8, 4)
    english, chinese = TOY.normal(2, 7, 32), TOY.normal(2, 5, 32)
    torch.manual_seed(0)
    unet, branch = pytorch.step_modules((TOY.networks.unet, TOY.networks.branch), x.shape)
    inputs = openvino._nchw(x), np.int64(500), english, chinese
    run = openvino._compiled(lambda *given: pytorch.predict(unet, branch, *given), (unet, branch), inputs, dtype)
    expected = pytorch.predict(unet, branch, *map(torch.as_tensor, inputs)).numpy()
    np.testing.assert_allclose(run(), expected, atol=tolerance * np.abs(expected).max(), rtol=0)


def test_flops_of_products_convolutions_and_loops():
    x, kernel = jnp.ones((2, 8, 8, 3)), jnp.ones((3, 3, 3, 5))
    convolution = partial(
        jax.lax.conv_general_dilated, window_strides=(2, 2), padding="SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    assert costs.flops(convolution, x, kernel) == 2 * 2 * 4 * 4 * 5 * 9 * 3
    assert costs.flops(jax.jit(jnp.matmul), np.ones((4, 6)), np.ones((6, 7))) == 2 * 4 * 6 * 7
    assert costs.flops(lambda x: jax.lax.map(lambda row: row @ row.T, x), np.ones((5, 2, 3))) == 5 * 2 * 2 * 2 * 3


def test_counting_leaves_no_trace_behind():
    """A function that is counted and then jitted is compiled for this machine, not for the one that counting tells."""

    def platform(x):
        return x + (jax.default_backend() == "cpu")

    assert costs.flops(platform, np.zeros(2)) == 0
    assert jax.jit(platform)(np.zeros(2)).tolist() == [1, 1]


def test_memory_and_work_grow_with_the_batch():
    rows = bench.bench(bench.BenchArgs(("vae-decode",), (64,), batch=(1, 4), repeats=1), TOY)["rows"]
    assert [row["batch"] for row in rows] == [1, 4]
    assert rows[1]["tflop"] == pytest.approx(4 * rows[0]["tflop"])
    assert rows[0]["memory"] < rows[1]["memory"] < 4.5 * rows[0]["memory"]


def test_the_command_writes_figures_and_a_chart(tmp_path, monkeypatch):
    monkeypatch.setattr(bench.compile_cache, "enable", lambda: tmp_path)
    monkeypatch.setattr(bench, "bench", lambda settings, run=bench.bench: run(settings, TOY))
    out, chart = tmp_path / "bench.json", tmp_path / "bench.png"
    asked = ["--cases", "clip", "chinese-clip", "--repeats", "1", "--json", f"{out}", "--chart", f"{chart}"]
    assert bench.main(asked) == 0
    assert [row["case"] for row in json.loads(out.read_text())["rows"]] == ["clip", "chinese-clip"]
    colours = {tuple(pixel) for pixel in np.asarray(Image.open(chart)).reshape(-1, 3)}
    assert (0xC0, 0x39, 0x2B) in colours  # a bar


@pytest.mark.parametrize("arguments", [["--size", "100"], ["--repeats", "0"]])
def test_bad_settings_are_one_line(arguments, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(bench.compile_cache, "enable", lambda: tmp_path)
    assert bench.main(arguments) == 2
    assert capsys.readouterr().err.startswith("error: ")
