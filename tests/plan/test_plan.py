"""The planner: topologies, the roofline's arithmetic, what is read from programs; at full size by shapes alone.

Compiling for a TPU needs libtpu (the extra `tpu`): these tests are skipped, by name, where it is not installed.
"""

import importlib.util
import json
import os
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh

from bdm_jax import configs
from bdm_jax.errors import UserError
from bdm_jax.formats.files import write_json
from bdm_jax.models.config import (
    BDM_BRANCH,
    CHINESE_CLIP_H_TEXT,
    SD15_UNET,
    SDXL_UNET,
    RobertaConfig,
    UNetConfig,
    VAEConfig,
    to_json,
)
from bdm_jax.models.functional import abstract, bind
from bdm_jax.models.unet.conditioning import Conditioning
from bdm_jax.plan import advice, command, estimate, topology
from bdm_jax.plan.report import shapes_report
from bdm_jax.plan.shapes import (
    activation_bytes,
    analytic_flops,
    memory_by_shapes,
    parse_networks,
    state_bytes,
    step_shapes,
)
from bdm_jax.runtime.costs import CHIPS, Collective, collectives, flops, roofline
from bdm_jax.runtime.sharding import AXES
from bdm_jax.training.config import MeshConfig, TrainConfig
from bdm_jax.training.objectives.branch import BranchTask

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason='compiling for a TPU needs libtpu: pip install -e ".[tpu]"'
)

BF16 = jnp.dtype("bfloat16")
# Of the size of ChatGLM-6B: 6.1 billion parameters.
TOWER_6B = RobertaConfig(
    vocab_size=65024,
    hidden_size=4096,
    num_hidden_layers=29,
    num_attention_heads=32,
    intermediate_size=16384,
    max_position_embeddings=512,
)

PROGRAM = """
HloModule jit_step, num_partitions=16

%add (x: f32[], y: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%x, %y)
}

%all-reduce-scatter.1 (p: f32[64,32]) -> f32[8,32] {
  %all-reduce.9 = f32[64,32]{1,0} all-reduce(%p), channel_id=9, replica_groups=[2,8]<=[16], to_apply=%add
  ROOT %slice = f32[8,32]{1,0} dynamic-slice(%all-reduce.9, %a, %b), dynamic_slice_sizes={8,32}
}

%body (state: (s32[], f32[256])) -> (s32[], f32[256]) {
  %all-reduce.2 = f32[256]{0} all-reduce(%x), channel_id=2, replica_groups={{0,8},{1,9}}, to_apply=%add
}

%condition (state: (s32[], f32[256])) -> pred[] {
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (a: bf16[4,8]) -> bf16[32,8] {
  %all-gather-start.1 = (bf16[4,8]{1,0:T(8,128)(2,1)}, bf16[32,8]{1,0}) all-gather-start(%a), replica_groups=[2,8]<=[16]
  %all-gather-done.1 = bf16[32,8]{1,0} all-gather-done(%all-gather-start.1)
  %all-gather.2 = (f32[16]{0}, f32[32]{0}) all-gather(%b, %c), channel_id=3, replica_groups=[2,8]<=[16], dimensions={0}
  %reduce-scatter.1 = f32[8]{0} reduce-scatter(%d), channel_id=4, replica_groups=[2,8]<=[16], to_apply=%add
  %fused = f32[8,32]{1,0} fusion(%e), kind=kCustom, calls=%all-reduce-scatter.1
  %loop = (s32[], f32[256]) while(%t), condition=%condition, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  %named = f32[64]{0} all-reduce(%g), channel_id=6, replica_groups=mesh['a'=4,'b'=1,'c'=4], device_ids=([4,4]) {'a','b'}
  %again = f32[64]{0} all-reduce(%g), channel_id=6, replica_groups=mesh['a'=4,'b'=1,'c'=4], device_ids=([4,4]) {'a','b'}
  %shift = f32[10]{0} collective-permute(%f), channel_id=5, source_target_pairs={{0,1},{1,0}}
}
"""


def full(name):
    """Of a run at full size."""
    return step_shapes(configs.load(name).task, BF16)


@pytest.fixture
def tiny(tmp_path):
    """A branch's run on networks of a few thousand parameters; their folders hold config.json, no weights."""
    text = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    parts = {
        "unet": UNetConfig(
            block_out_channels=(64, 128),
            transformer_layers=(0, 1),
            layers_per_block=1,
            num_heads=2,
            cross_attention_dim=64,
            norm_num_groups=4,
            sample_size=8,
        ),
        "vae": VAEConfig(block_out_channels=(4, 4, 4, 8), layers_per_block=1, norm_num_groups=2, sample_size=64),
        "tower": RobertaConfig(max_position_embeddings=64, **text),
    }
    for name, config in parts.items():
        (tmp_path / name).mkdir()
        write_json(tmp_path / name / "config.json", to_json(config))
    task = BranchTask(backbone=tmp_path, text_encoder=tmp_path / "tower", tokenizer=tmp_path / "none")
    mesh = MeshConfig(fsdp=4, strategy="zero1")
    return TrainConfig(task=task, run=tmp_path / "run", steps=10, batch_size=16, mesh=mesh)


def test_topologies():
    found = topology.parse_topology("V5P:4x4x8")
    assert (found.name, found.sizes, found.chips, found.chip.name) == ("v5p:4x4x8", (4, 4, 8), 128, "TPU v5p")
    assert topology.parse_topology("v5e:16x16").chips == topology.parse_topology("v6e:16x16").chips == 256


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("v5:4x4", "unknown chip 'v5': did you mean 'v5"),
        ("v5e", "v5e slices have 2 axes, as in v5e:4x4"),
        ("v5e:4x4x4", "2 axes"),
        ("v5p:4x4", "3 axes"),
        ("v6e:0x4", "2 axes"),
        ("v6e:4xfour", "2 axes"),
    ],
)
def test_what_is_no_topology(text, message):
    with pytest.raises(UserError, match=message):
        topology.parse_topology(text)


def test_roofline_by_hand():
    """Of performance.md, 2.2 and 6.2: a picture takes v5e 25 ms at 45%, AdamW's 10.9 GB 13.6 ms (it has 13.3 of them at
    819 GB/s), 2.91 GB between chips 29 ms at 100 GB/s.
    """
    time = roofline(CHIPS["v5e"], 2.222e12, 10.9e9, 2.91e9)
    assert time.compute == pytest.approx(11.28e-3, rel=1e-3)
    assert time.memory == pytest.approx(13.31e-3, rel=1e-3)
    assert time.traffic == pytest.approx(29.1e-3, rel=1e-3)
    assert (time.floor, time.bound) == (time.traffic, "traffic")
    assert time.planned == pytest.approx(25.06e-3 + 29.1e-3, rel=1e-3)
    assert roofline(CHIPS["v5e"], 1e9, 10.9e9, 0).planned == pytest.approx(13.31e-3, rel=1e-3)


def test_collectives_of_a_program():
    found = {(one.kind, one.group): one for one in collectives(PROGRAM)}
    gathered = 32 * 8 * 2 + (16 + 32) * 4
    scattered = 8 * 8 * 4 + 64 * 32 * 4
    assert found == {
        ("all-gather", 8): Collective("all-gather", 8, 2, gathered, 448 + 168),
        ("reduce-scatter", 8): Collective("reduce-scatter", 8, 2, scattered, 224 + 7168),
        ("all-reduce", 2): Collective("all-reduce", 2, 3, 3 * 1024, 3 * 1024),  # three times round the loop
        ("all-reduce", 4): Collective("all-reduce", 4, 1, 256, 384),  # one channel: the same, written twice
        ("collective-permute", 2): Collective("collective-permute", 2, 1, 40, 40),
    }


def test_flops_of_loops_and_kernels():
    kernel, picture = jnp.zeros((3, 3, 4, 8)), jnp.zeros((2, 16, 16, 4))

    def convolve(x):
        return jax.lax.conv_general_dilated(x, kernel, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    assert flops(convolve, picture) == 2 * 2 * 8 * 8 * 8 * 36

    def looped(x):
        return jax.lax.scan(lambda c, _: (c @ jnp.ones((5, 5)), None), x, None, length=7)[0]

    assert flops(looped, jnp.ones((3, 5))) == 7 * 2 * 3 * 5 * 5


def test_at_full_size_the_count_is_the_analytic_one():
    """Once forward everything, the decoder's input gradient, both gradients of the branch (performance.md, 2.2): 1.071
    + 0.616 + 0.535 = 2.222 TFLOP for a picture of 512 x 512, and the Chinese tower once.
    """
    x, t, states = jnp.zeros((1, 64, 64, 4)), jnp.zeros(1, jnp.int32), lambda *sizes: Conditioning(jnp.zeros(sizes))
    unet = flops(lambda p: bind(SD15_UNET, p)(x, t, states(1, 77, 768)), abstract(SD15_UNET))
    branch = flops(lambda p: bind(BDM_BRANCH, p)(x, t, states(1, 52, 1024)), abstract(BDM_BRANCH))
    ids = jnp.zeros((1, 52), jnp.int32)
    tower = flops(lambda p: bind(CHINESE_CLIP_H_TEXT, p)(ids), abstract(CHINESE_CLIP_H_TEXT))
    step = analytic_flops(full("bdm-sd15"))
    print(
        f"TFLOP: UNet {unet / 1e12:.4f}, branch {branch / 1e12:.4f}, tower {tower / 1e12:.4f}, step {step / 1e12:.4f}"
    )
    assert unet == pytest.approx(0.803e12, rel=0.01)
    assert branch == pytest.approx(0.268e12, rel=0.01)
    assert step - tower == pytest.approx(2.222e12, rel=0.05)
    again = analytic_flops(step_shapes(replace(configs.load("bdm-sd15").task, remat="blocks"), BF16))
    assert again == step  # what is computed twice is needed once


def test_state_at_full_size():
    """AdamW's state and the average: 16 bytes for each of the branch's 363,141,760 parameters; split, an eighth."""
    config = configs.load("bdm-sd15")
    whole = state_bytes(config, AbstractMesh((8, 1, 1), AXES), full("bdm-sd15"))
    split = state_bytes(config, AbstractMesh((1, 8, 1), AXES), full("bdm-sd15"))
    assert whole == 16 * 363_141_760 + 12  # three counters
    assert split == pytest.approx(whole / 8, rel=0.01)


def test_bdm_sdxl_is_planned_with_nothing_here():
    """The networks of its family, at their size; at the published 830 tensors of the branch."""
    shapes = full("bdm-sdxl-v5p")
    assert (len(shapes.trained["branch"]), shapes.parameters) == (830, 1_254_908_416)
    assert shapes.frozen.keys() == {"unet", "branch_text_encoder", "branch_text_encoder_2", "empty"}
    assert shapes.frozen["branch_text_encoder_2"]["text_projection.kernel"].shape == (1024, 1024)
    assert (shapes.row["moments"].shape, shapes.row["texts"]["branch"].shape) == ((128, 128, 8), (52,))


@pytest.mark.parametrize("name", ["emoji-vae", "emoji-text", "emoji-dreambooth", "emoji-inversion", "emoji-controlnet"])
def test_every_kind_of_run_has_shapes(name):
    """Its loss can be traced from configs alone: a scalar, with a gradient of the shape of what is trained."""
    config = configs.load(name)
    task = replace(config.task, vae=Path("assets/demo/vae")) if name == "emoji-text" else config.task
    shapes = step_shapes(task, jnp.dtype("float32"), 128)

    def loss(params, frozen, batch):
        return shapes.objective.loss(params, frozen, batch, jax.random.key(0))[0]

    found = jax.eval_shape(jax.grad(loss), shapes.trained, shapes.frozen, shapes.batch(2))
    assert jax.tree.map(lambda leaf: leaf.shape, found) == jax.tree.map(lambda leaf: leaf.shape, shapes.trained)


def test_networks_by_preset_or_file(tmp_path):
    write_json(tmp_path / "config.json", to_json(TOWER_6B))
    found = parse_networks(("unet=sdxl-unet", f"branch_text_encoder={tmp_path}"))
    assert found == {"unet": SDXL_UNET, "branch_text_encoder": TOWER_6B}
    with pytest.raises(UserError, match="did you mean 'sdxl-unet'"):
        parse_networks(("unet=sdxl-unt",))
    with pytest.raises(UserError, match="write NAME=PRESET"):
        parse_networks(("sdxl-unet",))


def test_a_network_that_the_run_has_not_is_named(tiny, capsys):
    with pytest.raises(
        UserError, match=r"--networks unett=...: this run reads branch_text_encoder, text_encoder, unet"
    ):
        step_shapes(tiny.task, BF16, 64, {"unett": SDXL_UNET})
    arguments = ("--topology", "v5e:4x4", "--shapes", "--networks", "text_encoder=clip-l-text")
    assert command.main(["emoji-vae", *arguments]) == 2
    assert "--networks text_encoder=...: this run reads none" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("run", "networks"),
    [("bdm-sd15", ("unet=sdxl-unet", "vae=sdxl-vae")), ("sd15-finetune", ("unet=kolors-unet", "vae=sdxl-vae"))],
)
def test_a_frozen_6b_tower_beside_a_2_6b_unet_fits_v5e(tmp_path, capsys, run, networks):
    """A branch on a frozen SDXL, and a whole UNet of 2.6B trained: with the frozen networks whole on every chip neither
    would fit 16 GB.
    """
    write_json(tmp_path / "config.json", to_json(TOWER_6B))
    tower = "branch_text_encoder" if run == "bdm-sd15" else "text_encoder"
    more = ("--networks", *networks, f"{tower}={tmp_path}", "--size", "1024", "--remat", "blocks")
    asked = [run, "--topology", "v5e:4x4", "--shapes", "--fsdp", "16", "--batch-per-chip", "1", "--accumulate", "1"]
    out = tmp_path / "plan.json"
    assert command.main([*asked, *more, "--json", str(out)]) == 0
    printed, values = capsys.readouterr().out, json.loads(out.read_text())
    print(printed)
    assert "fits" in printed and values["total_bytes"] < 16e9
    frozen = values["memory"]["frozen"]
    count = sum(x.size for x in abstract(TOWER_6B).values())
    assert 6e9 < count < 6.5e9
    given = parse_networks((*networks, f"{tower}={tmp_path}"))
    whole = sum(
        2 * leaf.size for leaf in jax.tree.leaves(step_shapes(configs.load(run).task, BF16, 1024, given).frozen)
    )
    assert frozen == pytest.approx(whole / 16, rel=0.01) and whole >= 2 * count
    assert values["total_bytes"] - frozen + whole > 16e9, "whole on every chip they would not fit"


def test_memory_by_shapes_adds_up(tiny):
    """Frozen trees in bf16; "zero1" keeps the weights whole, "fsdp" a share; rematerialised, fewer activations."""
    mesh, shapes = AbstractMesh((4, 4, 1), AXES), step_shapes(tiny.task, BF16, 64)
    zero1 = memory_by_shapes(replace(tiny, compute="bfloat16"), mesh, shapes)
    assert zero1["weights"] == 2 * shapes.parameters and zero1["state"] == state_bytes(tiny, mesh, shapes)
    assert zero1["frozen"] == 2 * sum(leaf.size for leaf in jax.tree.leaves(shapes.frozen))
    fsdp = replace(tiny, compute="bfloat16", mesh=MeshConfig(fsdp=4, strategy="fsdp"))
    split = memory_by_shapes(fsdp, mesh, shapes)
    assert split["weights"] < 0.5 * zero1["weights"] and split["frozen"] < 0.5 * zero1["frozen"]
    again = step_shapes(replace(tiny.task, remat="blocks"), BF16, 64)
    assert activation_bytes(again, BF16) < 0.6 * activation_bytes(shapes, BF16)
    assert zero1["activations"] == activation_bytes(shapes, BF16)  # one image a chip


@pytest.mark.parametrize("flag", ["--accumulate=0", "--accumulate=-2", "--batch-per-chip=0", "--size=0", "--size=100"])
def test_impossible_sizes_are_one_line(capsys, flag):
    assert command.main(["bdm-sd15", "--topology", "v5e:4x4", "--shapes", flag]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {flag.partition('=')[0]} ") and said.count("\n") == 1


def test_activations_alone_do_not_rule_a_plan_out(tiny):
    """By shapes they are an upper bound: only what else must lie there says for certain that it does not fit."""
    where, shapes = topology.parse_topology("v5e:4x4"), step_shapes(tiny.task, BF16, 64)
    verdicts = {"fits": (1, 15), "may not fit": (1, 16), "DOES NOT FIT": (17, 0)}
    for verdict, (state, activations) in verdicts.items():
        memory = {"state": state * 10**9, "activations": activations * 10**9}
        said = "\n".join(shapes_report(tiny, where, {"data": 16}, shapes, memory))
        assert f"per chip: {verdict}" in said


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "frozen"), [("zero1", "auto"), ("fsdp", "split")])
def test_what_is_gathered(tiny, strategy, frozen):
    """The step on 2 x 4 virtual CPU devices. zero1: the branch, at most once, nothing of the backbone. fsdp: frozen
    arrays where they are used, so that a device's arguments are less.
    """
    code = """
import json, pickle, sys
from bdm_jax.plan.shapes import lower, step_shapes
from bdm_jax.runtime.costs import collectives
from bdm_jax.runtime.sharding import make_mesh
config = pickle.loads(bytes.fromhex(sys.argv[1]))
shapes = step_shapes(config.task, config.compute_dtype(), 64)
compiled = lower(config, make_mesh(-1, 4), shapes).compile()
memory = compiled.memory_analysis()
print(json.dumps([[[one.kind, one.group, one.bytes] for one in collectives(compiled.as_text())],
    memory.argument_size_in_bytes, memory.temp_size_in_bytes]))
"""
    environment = {
        **os.environ,
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
    }
    found = {}
    for kept in ("whole", frozen):
        mesh = replace(tiny.mesh, strategy=strategy, frozen=kept)
        config = replace(tiny, mesh=mesh, compute="bfloat16")
        command = [sys.executable, "-c", code, pickle.dumps(config).hex()]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        found[kept] = json.loads(done.stdout.splitlines()[-1])
    shapes = step_shapes(tiny.task, BF16, 64)
    held = sum(x.size for x in jax.tree.leaves(shapes.frozen))
    print(f"{found}; branch: {shapes.parameters:,} parameters, frozen {held:,}")
    gathered = {kept: sum(size for kind, _, size in made[0] if kind == "all-gather") for kept, made in found.items()}
    assert any(kind in ("all-reduce", "reduce-scatter") for kind, _, _ in found[frozen][0])
    if strategy == "zero1":
        assert found[frozen] == found["whole"] and 0 < gathered["whole"] <= 4 * shapes.parameters
    else:
        assert found[frozen][1] < found["whole"][1] - held  # of 2 bytes each, three quarters less, but for small ones
        assert gathered[frozen] - gathered["whole"] <= 2 * 4 * held  # forwards and backwards, fp32 on a CPU


@pytest.mark.slow
@needs_libtpu
@pytest.mark.parametrize("topology", ["v5e:4x4", "v5p:2x2x4", "v6e:4x4"])
def test_a_small_step_compiles_for_a_tpu(tiny, tmp_path, monkeypatch, topology):
    monkeypatch.setenv("BDM_JAX_CACHE", str(tmp_path / "cache"))
    where = topology.parse_topology(topology)
    tiny = replace(tiny, compute="bfloat16")
    shapes = step_shapes(tiny.task, BF16, 64)
    made = estimate.make_plan(tiny, where, shapes)
    assert made.fits and made.mesh == {"data": 4, "fsdp": 4, "tensor": 1}
    assert made.program.memory["arguments"] > made.state > 0
    assert made.program.flops == pytest.approx(made.counted, rel=0.5)  # one picture; at this size the rest counts too
    gathered = sum(one.bytes for one in made.program.collectives if one.kind == "all-gather")
    assert 0 < gathered <= 2 * shapes.parameters  # once, in bf16; nothing of the backbone
    monkeypatch.setattr(estimate, "_compile", None)  # the second time it is looked up
    assert estimate.make_plan(tiny, where, shapes) == made


def test_estimates_from_a_compiled_plan(tiny):
    """Twice the pictures: twice the activations, work and HBM traffic; four chips more along data: a longer ring."""
    memory = {"arguments": 9_000_000, "temporaries": 50_000_000, "outputs": 0, "instructions": 1}
    where = topology.parse_topology("v5e:4x4")
    shapes = step_shapes(tiny.task, BF16, 64)
    state = state_bytes(tiny, AbstractMesh((4, 4, 1), AXES), shapes)
    program = estimate.CompiledStep(1e9, 2e9, memory, (Collective("all-reduce", 4, 1, 4, 6),))
    made = estimate.Plan(where, {"data": 4, "fsdp": 4, "tensor": 1}, 16, 1, 10**9, state, program)
    assert estimate.from_json(json.loads(json.dumps(made.to_json(1e9)))) == made
    same = estimate.estimate(tiny, made, where, 4, 1, shapes)
    assert same.program.memory == pytest.approx(memory, abs=1) and same.time.compute == made.time.compute
    twice = estimate.estimate(tiny, made, topology.parse_topology("v5e:8x8"), 4, 2, shapes)
    assert (twice.mesh["data"], twice.batch_size) == (16, 128)
    assert twice.time.compute == 2 * made.time.compute and twice.time.memory == 2 * made.time.memory
    assert twice.time.traffic > same.time.traffic > 0
    copies = 2 * shapes.parameters + 4 * shapes.parameters // 4
    assert twice.program.memory["temporaries"] == pytest.approx(2 * 50_000_000 - copies, abs=2)
    assert len(list(estimate.sweep(tiny, made, shapes))) == 5 * 7


@pytest.mark.slow
@needs_libtpu
def test_the_command(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("BDM_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(configs, "load", lambda name: tiny)
    out = tmp_path / "plan.json"
    asked = ["tiny", "--topology", "v5e:4x4", "--size", "64", "--sweep", "--price", "1.5", "--json", str(out)]
    assert command.main(asked) == 0
    printed = capsys.readouterr().out
    for word in ("fits", "train state", "TFLOP per image", "collective", "roofline", "chip-hours", "estimated from"):
        assert word in printed
    values = json.loads(out.read_text())
    assert values["fits"] and values["chips"] == 16 and len(values["sweep"]) == 5 * 7
    assert values["chip_hours"] == pytest.approx(1e9 / values["images_per_second"] / 3600 * 16)


def test_bad_input_is_one_line(monkeypatch, capsys):
    assert command.main(["bdm-sd51"]) == 2
    assert capsys.readouterr().err.startswith("error: unknown config 'bdm-sd51': did you mean 'bdm-sd15")
    assert command.main(["bdm-sd15", "--topology", "v5e:3"]) == 2
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert command.main(["bdm-sd15"]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: compiling for a TPU needs libtpu: pip install")


def hbm(config, gb):
    """The slice of a small chip."""
    where = topology.parse_topology("v5e:2x2")
    return replace(where, chip=replace(where.chip, hbm=gb * 1e9))


@pytest.mark.parametrize(
    ("gb", "lines"),
    [
        (0.1, ["--accumulate ", "--batch-per-chip ", "--remat blocks"]),
        (1e-6, ["nothing on v5e:2x2: take a larger slice"]),
    ],
)
def test_a_plan_that_does_not_fit_says_what_would(tiny, monkeypatch, gb, lines):
    """Each is the smallest change of its kind: half of it does not fit."""
    monkeypatch.setattr(
        advice, "activation_bytes", lambda shapes, dtype: 10**6 if shapes.objective.remat == "none" else 10**5
    )
    config = replace(tiny, batch_size=4 * 256, accumulate=1)
    task = replace(tiny.task, remat="none")
    shapes, less = (step_shapes(one, BF16, 64) for one in (task, replace(task, remat="blocks")))
    where = hbm(config, gb)
    assert sum(memory_by_shapes(config, AbstractMesh((4, 1, 1), AXES), shapes, 10**6).values()) > where.chip.hbm
    found = [*advice.advice(config, where, shapes, less)]
    assert len(found) == len(lines) and all(line in one for line, one in zip(lines, found, strict=True)), found


@pytest.mark.parametrize(
    ("said", "needed"),
    [
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.00G of 15.75G hbm.", 20 * 2**30),
        (
            "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO "
            "temporaries (35.50G) exceeds available HBM (15.75G).",
            35.5 * 2**30,
        ),
    ],
)
def test_what_the_compiler_says_of_memory(said, needed):
    class Lowered:
        def compile(self):
            raise jax.errors.JaxRuntimeError(said)

    assert estimate._compile(Lowered(), 1).needed == needed


def test_a_setting_of_jax_that_is_not_there_is_left_alone(monkeypatch):
    monkeypatch.setattr(estimate, "_SETTING", "jax_no_such_setting")
    before = dict(jax.config.values)
    with estimate._least_effort():
        assert jax.config.values == before


@pytest.mark.parametrize("flags", [["--sweep"], ["--price", "2"], ["--pairs", "1e6"]])
def test_flags_without_effect_beside_shapes(flags, capsys):
    assert command.main(["emoji-vae", "--topology", "v5e:2x2", "--shapes", *flags]) == 2
    assert f"error: {flags[0]} has no effect with --shapes" in capsys.readouterr().err
    assert command.main(["emoji-vae", "--json", "."]) == 2
    assert "--json .: a folder; name a file" in capsys.readouterr().err
