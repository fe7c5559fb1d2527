"""The bench at toy sizes: both sides run and are reported; what is counted as work."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bdm_jax import bench, costs
from bdm_jax.models.config import BranchConfig, CLIPTextConfig, RobertaConfig, UNetConfig, VAEConfig

SHARED = dict(
    block_out_channels=(32, 64), attention_levels=(True, False), num_heads=4, layers_per_block=1, norm_num_groups=8
)
TOWER = dict(vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
TOY = bench.Sizes(
    bench.Networks(UNetConfig(**SHARED, cross_attention_dim=32), BranchConfig(**SHARED, cross_attention_dim=32)),
    CLIPTextConfig(**TOWER, bos_token_id=48, eos_token_id=49, pad_token_id=49),
    RobertaConfig(**TOWER),
    VAEConfig(block_out_channels=(32, 32, 64, 64), layers_per_block=1),
)


def test_cases_are_timed_against_diffusers(capsys):
    cases = tuple(case for case in bench.CASES if case != "two-prompts")  # the same but for one row of text
    report = bench.bench(bench.Settings(cases, (64,), against="diffusers", repeats=1), TOY)
    assert [row["case"] for row in report["rows"]] == list(cases)
    for row in report["rows"]:
        assert row["tflop"] > 0 and row["seconds"] > 0
        assert row["ratio"] == pytest.approx(row["seconds"] / row["diffusers"])
    json.dumps(report)
    assert capsys.readouterr().out.count("ratio") == len(cases)


def test_flops_of_products_convolutions_and_loops():
    x, kernel = jnp.ones((2, 8, 8, 3)), jnp.ones((3, 3, 3, 5))
    numbers = ("NHWC", "HWIO", "NHWC")
    convolution = lambda x, k: jax.lax.conv_general_dilated(x, k, (2, 2), "SAME", dimension_numbers=numbers)  # noqa: E731
    assert costs.flops(convolution, x, kernel) == 2 * 2 * 4 * 4 * 5 * 9 * 3
    assert costs.flops(jax.jit(jnp.matmul), np.ones((4, 6)), np.ones((6, 7))) == 2 * 4 * 6 * 7
    assert costs.flops(lambda x: jax.lax.map(lambda row: row @ row.T, x), np.ones((5, 2, 3))) == 5 * 2 * 2 * 2 * 3


@pytest.mark.parametrize("arguments", [["--size", "100"], ["--repeats", "0"]])
def test_bad_settings_are_one_line(arguments, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(bench.compile_cache, "enable", lambda: tmp_path)
    assert bench.main(arguments) == 2
    assert capsys.readouterr().err.startswith("error: ")
