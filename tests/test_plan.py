"""simclr plan: what it tries, what it tells; and, where libtpu is installed, a real program for a TPU that nobody has."""

import dataclasses
import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys
import xml.etree.ElementTree

import jax
import numpy as np
import pytest
import tiny

from simclr_jax import __main__ as cli
from simclr_jax.programs import config as config_lib
from simclr_jax.programs import data as data_program
from simclr_jax.programs import finetune, plan, recipes, splits
from simclr_jax.runtime import aot
from simclr_jax.runtime import mesh as mesh_lib
from simclr_jax.runtime.errors import UserError

ROOT = pathlib.Path(__file__).parent.parent
GIB = aot.GIB
HLO = """HloModule step
%fused (p: bf16[8,8]) -> bf16[8,8] {
  %p = bf16[8,8]{1,0} parameter(0)
}
ENTRY %main (a: bf16[8,8]) -> f32[8] {
  %a = bf16[8,8]{1,0:T(8,128)} parameter(0)
  %b = bf16[8,8]{1,0:T(8,128)S(1)} fusion(%a), kind=kLoop, calls=%fused, metadata={op_name="jit(train_step)/jvp(SimCLR)/encoder/conv_general_dilated"}, backend_config={"estimated_cycles":"100"}
  %c = (f32[8]{0}, bf16[8,8]{1,0:T(8,128)}) fusion(%b, %a), kind=kLoop, calls=%fused, metadata={op_name="jit(train_step)/transpose(jvp(SimCLR))/encoder/reduce_sum"}, backend_config={"estimated_cycles":"40"}
  %d = f32[8]{0} get-tuple-element(%c), index=0
  %e = f32[8]{0} all-reduce(%d), to_apply=%sum, backend_config={"estimated_cycles":"3"}
  %f = bf16[4,32,32,3]{3,2,1,0} all-gather(%a), dimensions={0}
  %g = (f32[8]{0}, f32[8]{0:S(1)}, u32[]) copy-start(%e)
}
"""


def test_what_is_read_from_a_program():
  assert aot.parts(HLO) == {
    "convolutions, forward": 100,
    "convolutions, backward": 0,
    "passes over activations, forward": 0,
    "passes over activations, backward": 40,
    "outside the network": 3,
  }
  # The fusions read a (128 bytes) twice and write 128 and 32; b lies in faster memory; the all-reduce reads and writes 32;
  # the copy moves 32.
  assert aot.traffic(HLO) == 128 + (128 + 128 + 32) + 64 + 32
  found = aot.collectives(HLO)
  assert found["all-reduce"]["image_sized"] == 0 and found["all-gather"]["image_sized"] == 1


IN_PARTS = """HloModule step
%product (a: bf16[8,4,16], i: s32[], b: bf16[8,16], w: bf16[16,4]) -> bf16[8,4,4] {
  %a.1 = bf16[8,4,16]{2,1,0} parameter(0)
  %i.1 = s32[] parameter(1)
  %b.1 = bf16[8,4,4]{2,1,0} parameter(2)
  %w.1 = bf16[16,4]{1,0} parameter(3)
  %a.2 = bf16[1,4,16]{2,1,0} dynamic-slice(%a.1, %i.1), dynamic_slice_sizes={1,4,16}
  %a.3 = bf16[4,16]{1,0} bitcast(%a.2)
  %b.2 = bf16[4,4]{1,0} convolution(%a.3, %w.1), dim_labels=bf_io->bf
  %b.3 = bf16[1,4,4]{2,1,0} bitcast(%b.2)
  ROOT %b.4 = bf16[8,4,4]{2,1,0} dynamic-update-slice(%b.1, %b.3, %i.1)
}
%body (c: (s32[], bf16[8,4,16], bf16[8,4,4], bf16[16,4])) -> (s32[], bf16[8,4,16], bf16[8,4,4], bf16[16,4]) {
  %c = (s32[], bf16[8,4,16]{2,1,0}, bf16[8,4,4]{2,1,0}, bf16[16,4]{1,0}) parameter(0)
  %i.2 = s32[] get-tuple-element(%c), index=0
  %a.4 = bf16[8,4,16]{2,1,0} get-tuple-element(%c), index=1
  %b.5 = bf16[8,4,4]{2,1,0} get-tuple-element(%c), index=2
  %w.2 = bf16[16,4]{1,0:S(1)} get-tuple-element(%c), index=3
  %b.6 = bf16[8,4,4]{2,1,0} fusion(%a.4, %i.2, %b.5, %w.2), kind=kOutput, calls=%product, metadata={op_name="jit(train_step)/jvp()/while/body/closed_call/SimCLR/dot_general"}, backend_config={"estimated_cycles":"100"}
  %s = f32[4]{0} all-reduce(%b.6), to_apply=%sum, backend_config={"estimated_cycles":"3"}
  ROOT %t = (s32[], bf16[8,4,16], bf16[8,4,4], bf16[16,4]) tuple(%i.2, %a.4, %b.6, %w.2)
}
%condition (c.1: (s32[], bf16[8,4,16], bf16[8,4,4], bf16[16,4])) -> pred[] {
  %n = s32[]{:T(128)} constant(8)
}
ENTRY %main (a.5: bf16[8,4,16]) -> bf16[8,4,4] {
  %t.1 = (s32[], bf16[8,4,16], bf16[8,4,4], bf16[16,4]) parameter(0)
  %loop = (s32[], bf16[8,4,16], bf16[8,4,4], bf16[16,4]) while(%t.1), condition=%condition, body=%body
}
"""


def test_what_a_loop_does_counts_for_every_trip():
  assert aot.Schedule(IN_PARTS).cycles == 8 * 103
  parts = aot.parts(IN_PARTS)
  assert parts["convolutions, forward"] == 8 * 100 and parts["outside the network"] == 8 * 3
  assert aot.collectives(IN_PARTS)["all-reduce"] == {"count": 8, "bytes": 8 * 16, "image_sized": 0}
  # The product reads a microbatch [4, 16] and writes one [4, 4]; the index is 4 bytes; the all-reduce reads all of b and
  # writes 16 bytes.
  assert aot.traffic(IN_PARTS) == 8 * (128 + 32 + 4 + 256 + 16)
  assert aot.products(IN_PARTS) == 7 * 2 * 4 * 4 * 16  # XLA has counted the first trip


@pytest.mark.parametrize("size, stride, padding, side", [(3, 1, 1, 9), (2, 2, 0, 4)])
def test_products_with_padding_are_no_operations(size, stride, padding, side):
  """As in XLA's own count, for a convolution and its gradients."""
  x, w, y = (2, 9, 9, 3), (size, size, 3, 5), (2, side, side, 5)

  def convolve(x, w):
    padded = [(padding, padding)] * 2
    return jax.lax.conv_general_dilated(x, w, (stride,) * 2, padded, dimension_numbers=("NHWC", "HWIO", "NHWC"))

  def gradient(i):
    return lambda x, w: jax.vjp(convolve, x, w)[1](np.ones(y, np.float32))[i]

  for function, shapes in ((convolve, (x, w)), (gradient(0), (y, w)), (gradient(1), (x, y))):
    lowered = jax.jit(function).lower(*(jax.ShapeDtypeStruct(shape, np.float32) for shape in (x, w)))
    (line,) = (s for s in lowered.as_text("hlo").splitlines() if " convolution(" in s)
    (made,) = aot._operations(["%c = " + line.partition(" = ")[2]])
    cost = lowered.cost_analysis()
    assert cost and 2 * aot._multiplications(made, *shapes) == cost["flops"]


@dataclasses.dataclass
class Compiler:
  """Stands for plan.measure: `sizes` has GiB and seconds of the recipe as it is, batch 4096, and with changes to it; the
  packed arrangement has those of the plain one unless it has its own."""

  sizes: dict
  asked: list

  def __call__(self, config, topology, num_examples, num_classes):
    flat = config_lib.flatten(config)
    key = [flat["batch_size"]] * (flat["batch_size"] != 4096) + ["zero1"] * flat["zero1"]
    key = (*key, *([flat["encoder.remat"]] if flat["encoder.remat"] != "none" else []))
    packed = ("packed",) * (flat.get("encoder.arrangement") == "packed")
    self.asked.append((*key, *packed))
    gib, seconds = self.sizes.get((*key, *packed), self.sizes[key])
    if gib > 32:
      raise aot.DoesNotFit("too much", gib * GIB)
    return {
      "topology": topology,
      "batch_size": config.batch_size,
      "peak_bytes": gib * GIB,
      "hbm_bytes": 32 * GIB,
      "step_seconds": seconds,
    }


HALF, PACKED = "block,block,none,none", {"encoder.arrangement": "packed"}
ALL = {"zero1": True, "encoder.remat": "group", **PACKED}
NOTHING = {(): (99, 1.0), (HALF,): (90, 1.0), ("block",): (80, 1.0), ("zero1", "block"): (75, 1.0)}
NOTHING |= {("zero1", "group"): (70, 1.0)}


def planned(monkeypatch, recipe, sizes, **changes):
  """(the row of the plan of a recipe on 128 chips, the compiler of what it asked for)."""
  compiler = Compiler(sizes, [])
  monkeypatch.setattr(plan, "measure", compiler)
  monkeypatch.setattr(plan, "_optimizer_bytes", lambda *_: 2 * GIB)
  monkeypatch.setattr(aot, "topology", lambda name: (aot.CHIPS["v4"], [None] * 128))
  return plan.plan(
    config_lib.replace(config_lib.load(recipe), changes), "v4:4x4x8", 1_281_167, 1000, note=lambda _: None
  ), compiler


@pytest.mark.parametrize(
  "sizes, asked, changes",
  [
    ({(): (3, 0.03)}, 2, {}),
    ({(): (3, 0.03), ("packed",): (2, 0.02)}, 2, PACKED),
    # The plain arrangement has no room, the packed one has: no cure is needed.
    ({(): (33, 9), ("packed",): (20, 0.02)}, 2, PACKED),
    # Where neither has, the better one is changed.
    ({(): (28, 0.5), ("packed",): (28, 0.6), (HALF,): (9, 0.3)}, 3, {"encoder.remat": HALF}),
    ({(): (28, 0.6), ("packed",): (28, 0.5), (HALF,): (9, 0.3)}, 3, {"encoder.remat": HALF, **PACKED}),
    ({(): (32.1, 9), ("zero1",): (31, 0.2), (HALF,): (9, 0.3)}, 4, {"zero1": True, **PACKED}),
    # Far too much: ZeRO-1 alone cannot help and is not compiled.
    ({(): (45, 9), (HALF,): (35, 9), ("block",): (18, 0.19)}, 4, {"encoder.remat": "block", **PACKED}),
    # It fits, but barely, for the compiler recomputes at any price: the next is tried, and is faster.
    ({(): (28, 0.55), (HALF,): (18, 0.19)}, 3, {"encoder.remat": HALF}),
    ({(): (28, 0.15), (HALF,): (18, 0.19)}, 3, {}),
    # Half of the batch would take at least half of 70: it is not compiled, a quarter is.
    (NOTHING | {(1024, "zero1", "group"): (19, 0.1)}, 7, {**ALL, "batch_size": 1024}),
    (NOTHING | {(n, "zero1", "group"): (33, 1.0) for n in (1024, 512, 256, 128)}, 10, None),
  ],
)
def test_the_fastest_change_that_fits(monkeypatch, sizes, asked, changes):
  row, compiler = planned(monkeypatch, "v1:1x", sizes)
  assert list(row["tried"])[:2] == ["", "--config.encoder.arrangement=packed"]
  assert len(compiler.asked) == asked and row["changes"] == changes
  if changes is None:
    assert "does not fit (needs 99.0 GiB)" in plan.table(row) and "no (needs 99.0 GiB)" in plan.comparison([row])
  elif "batch_size" in changes:
    assert row["batch_size"] == 1024


SMALLER = {"zero1": True, "encoder.remat": "block", "batch_size": 1024}


@pytest.mark.parametrize(
  "sizes, asked, changes",
  [({(): (3, 0.03)}, 1, {}), (NOTHING | {(1024, "zero1", "block"): (19, 0.1)}, 4, SMALLER)],
)
def test_a_vision_transformer_has_one_arrangement_and_recomputes_blocks(monkeypatch, sizes, asked, changes):
  row, compiler = planned(monkeypatch, "vit:s16", sizes)
  assert row["changes"] == changes and len(compiler.asked) == asked
  assert not any("packed" in name or "group" in name or "," in name for name in row["tried"])


def test_the_state_of_adam_is_twice_that_of_momentum():
  lars, adam = (
    plan._optimizer_bytes(config_lib.replace(config_lib.load("smoke"), {"optimizer.name": name}), 10)
    for name in ("lars", "adamw")
  )
  assert 0 <= adam - 2 * lars < 100  # and a count of steps


def test_microbatches_are_split_over_the_devices_too(monkeypatch):
  mesh = mesh_lib.make_mesh(jax.devices()[:4])
  with pytest.raises(UserError, match="microbatches"):
    plan._check_batch(config_lib.load("v1:1x", ["--config.microbatches=3"]), mesh)
  sizes = NOTHING | {(n, "zero1", "group"): (19, 1.0) for n in (2048, 1024, 512)}
  sizes[()] = sizes["zero1", "group"] = (60, 1.0)
  row, compiler = planned(monkeypatch, "v1:1x", sizes, **{"microbatches": 8})
  assert row["batch_size"] == 2048 and all(
    key[0] % (128 * 8) == 0 for key in compiler.asked if key and isinstance(key[0], int)
  )


def test_where_nothing_fits_only_what_was_tried_is_named(monkeypatch):
  row, _ = planned(
    monkeypatch, "vit:s16", NOTHING | {(b, "zero1", "block"): (75, 1.0) for b in (2048, 1024, 512, 256, 128)}
  )
  text = plan.table(row)
  assert (
    row["changes"] is None and "nor with any of --config.encoder.remat=block; " in text and "block,block" not in text
  )


ROW = {
  "topology": "v4:4x4x8",
  "batch_size": 4096,
  "settings": {
    "activations": "bfloat16",
    "arrangement": "plain",
    "remat": "block",
    "zero1": False,
    "microbatches": 1,
    "nt_xent": "dense",
  },  # fmt: skip
  "changes": {"encoder.remat": "block"},
  "refused": "needs 45.0 GiB",
  "tried": {"": None, "--config.encoder.remat=block": [188.0, 17.7]},
  "chips": 128,
  "hosts": 32,
  "parameters": {"encoder": 23_508_032},
  "arguments_bytes": 2**28,
  "temporaries_bytes": 2**31,
  "peak_bytes": 2**31 + 2**28,
  "hbm_bytes": 2**35,
  "flops": 1.5e12,
  "model_flops": 1.4e12,
  "hbm_traffic": 12e9,
  "memory_seconds": 0.01,
  "matmul_seconds": 0.0055,
  "step_seconds": 0.029,
  "parts_seconds": dict.fromkeys(aot.PARTS, 0.0058),
  "collectives": {"all-gather": {"count": 3, "bytes": 2**22, "image_sized": 2}},
  "images_per_second_per_chip": 1100.0,
  "images_per_second_per_host": 4400.0,
  "host_vcpus": 240,
  "vcpus_needed": 9.1,
  "mfu": 0.19,
  "steps": 312_785,
  "hours": 2.5,
  "chip_hours": 325.0,
}


def test_what_a_person_reads(tmp_path):
  text = plan.table(ROW)
  assert "--config.encoder.remat=block (as it is: does not fit; --config.encoder.remat=block: 188 ms, 17.7 GiB)" in text
  assert "arrangement plain, remat block, zero1 False, microbatches 1, nt_xent dense" in text
  assert "2 OF THEM AS LARGE AS IMAGES" in text and "keep 9 of them busy" in text and "325.0 chip-hours" in text
  lines = plan.comparison([ROW, {**ROW, "batch_size": 8192}]).splitlines()
  assert len(lines) == 3 and lines[0].split()[:3] == ["pod", "batch", "fits"] and "8,192" in lines[2]
  plan.draw(tmp_path / "step.svg", [ROW, ROW])
  tree = xml.etree.ElementTree.parse(tmp_path / "step.svg")
  bars = [r for r in tree.iter("{http://www.w3.org/2000/svg}rect") if r.get("height") == "28"]
  assert len(bars) == 2 * len(aot.PARTS)


def test_the_range_around_an_estimate():
  """A chip as fast as its data sheet, and one as slow as the estimate that waits for every collective."""
  chip = aot.CHIPS["v4"]
  collectives = {"all-reduce": {"bytes": 269e6}, "all-gather": {"bytes": 269e6}}
  assert aot.collective_seconds(collectives, 2, chip) == pytest.approx((2 + 1) * 1e-3 / 2)
  assert aot.collective_seconds(collectives, 2, aot.CHIPS["v2"]) is None
  parts = {**dict.fromkeys(aot.PARTS, 0.0), "convolutions, backward": 0.0171, "outside the network": 0.0055}
  row = {"parts_seconds": parts, "step_seconds": 0.0226, "memory_seconds": 0.004, "matmul_seconds": 0.005, "chips": 2}
  low, high = aot.step_range(row | {"collectives": collectives}, chip)
  assert (low, high) == (pytest.approx(0.0171 / 1.71 + 0.0055 / 2.75), pytest.approx(0.0226 + 0.0015))
  # No chip is faster than its data sheet.
  assert aot.step_range(row | {"collectives": {}, "memory_seconds": 0.02}, chip) == (0.02, 0.0226)
  text = plan.table(ROW)
  assert "13.1 ms if the chips are as fast" in text and "estimate 2:30:00 of steps" in text
  assert "est. ms" in plan.comparison([ROW, ROW])


def test_the_factors_are_those_that_were_found():
  """docs/scaling.md has them from benchmarks/calibration.py."""
  page = (ROOT / "docs/scaling.md").read_text()
  found = [line.split("|")[2:-1] for line in page.splitlines() if re.match(r"\| (product of|x \+ 1)", line)]
  products, passes = [float(x) for row in found[:-1] for x in row], [float(x) for x in found[-1]]
  assert len(found) == 3 and (min(products), max(products)) == aot.PRODUCTS and (min(passes), max(passes)) == aot.PASSES


def test_mistakes_are_one_line(capsys):
  if importlib.util.find_spec("libtpu") is None:
    assert cli.main(["plan", "--config=smoke", "--topology=v5e:2x2"]) == 1
    assert capsys.readouterr().err.strip().endswith("pip install libtpu")
  assert cli.main(["plan", "--config=transfer", "--topology=v5e:2x2"]) == 1
  assert "is a recipe for simclr transfer" in capsys.readouterr().err


def test_every_recipe_of_the_papers_is_planned_on_the_pod_that_its_header_names(monkeypatch):
  """docs/plans.json: all of them fit, and nothing as large as images is sent; docs/plans.md shows just that."""
  monkeypatch.syspath_prepend(ROOT)
  from benchmarks import plans

  rows = json.loads((ROOT / "docs/plans.json").read_text())
  wanted = {(f"v1:{width}x", batch) for width in (1, 2, 4) for batch in (4096, 8192)}
  wanted |= {(f"v2:r{d}_{w}x_sk{sk}", 4096) for d in (50, 101, 152) for w in (1, 2, 3) for sk in (0, 1)}
  headers = recipes.all_headers()
  for recipe, batch in wanted:
    row = rows[f"{recipe} {batch} v4:4x4x8"]
    assert "v4:4x4x8" in headers[recipe[:2]]["Hardware"]
    assert row["changes"] is not None and row["peak_bytes"] < row["hbm_bytes"] and row["chips"] == 128, recipe
    assert row["batch_size"] == batch and row["collectives"].keys() == {"all-reduce"}, recipe
    assert not row["collectives"]["all-reduce"]["image_sized"], recipe
  assert plans.markdown(rows) == (ROOT / "docs/plans.md").read_text()
  estimates = data_program.ESTIMATES  # which simclr data benchmark compares the input with
  assert estimates["v4"] == round(rows["v1:1x 4096 v4:4x4x8"]["images_per_second_per_chip"])
  assert f"13.5 ms at batch 4,096: {estimates['v5e']:,} images/s per chip" in (ROOT / "docs/scaling.md").read_text()


def simclr_plan(*arguments):
  environment = {**os.environ, "XLA_FLAGS": ""}
  command = [sys.executable, "-m", "simclr_jax", "plan", *arguments]
  done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr[-2000:]
  return done.stdout


@pytest.mark.tpu_aot
@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_a_real_program_for_a_pod_that_is_not_here():
  small = ("--config=smoke", "--topology=v5e:2x2", "--json")
  (four,) = json.loads(simclr_plan(*small))
  (sixteen,) = json.loads(simclr_plan("--config=smoke", "--topology=v5e:4x4", "--json"))
  assert four["chips"] == 4 and sixteen["chips"] == 16
  assert sixteen["flops"] < four["flops"] * 4 / 16 * 1.2  # every device does its share
  for row in (four, sixteen):
    assert row["collectives"]["all-reduce"]["count"] > 0
    assert not any(kind["image_sized"] for kind in row["collectives"].values())
    assert row["settings"]["nt_xent"] == "dense" and row["settings"]["remat"] == "none"
    assert "--config.encoder.arrangement=packed" in row["tried"]
    assert 0 < row["step_seconds"] < 1 and sum(row["parts_seconds"].values()) == pytest.approx(
      row["step_seconds"], rel=0.05
    )
  for recipe in ("finetune:small", "distill:small"):
    (row,) = json.loads(simclr_plan(f"--config={recipe}", "--topology=v5e:2x2", "--json"))
    assert row["changes"].keys() <= {"encoder.arrangement"} and row["steps"] == 300


TOY = """
import json
from simclr_jax.runtime import aot
aot.prepare()
import jax
import jax.numpy as jnp
from simclr_jax import accumulate
from simclr_jax.runtime import mesh as mesh_lib

def two_products(variables, x, train):
  return jax.nn.relu(x @ variables["params"]["a"]) @ variables["params"]["b"], variables["batch_stats"]

def update(parts):
  network = two_products
  if parts > 1:
    network = accumulate.in_parts(network, parts=parts, devices=4, batch_norm="microbatch")
  def loss(params, x):
    return jnp.mean(jnp.square(network({"params": params, "batch_stats": {}}, x, True)[0]))
  return jax.jit(lambda params, x: jax.tree.map(jnp.subtract, params, jax.grad(loss)(params, x)))

chip, devices = aot.topology("v5e:2x2")
mesh = mesh_lib.make_mesh(devices)
w = jax.ShapeDtypeStruct((2048, 2048), jnp.bfloat16, sharding=mesh_lib.replicated(mesh))
x = jax.ShapeDtypeStruct((8192, 2048), jnp.bfloat16, sharding=mesh_lib.batch_sharding(mesh))
print(json.dumps([aot.measure(update(n), ({"a": w, "b": w}, x), chip=chip, devices=4) for n in (1, 8)]))
"""


@pytest.mark.tpu_aot
@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_a_program_in_microbatches_is_measured_as_a_whole():
  environment = {**os.environ, "XLA_FLAGS": "", "PYTHONPATH": str(ROOT)}
  done = subprocess.run([sys.executable, "-c", TOY], env=environment, capture_output=True, text=True, check=True)
  one, eight = json.loads(done.stdout)
  # Five products of [2048, 2048] matrices each, and in microbatches the first once more.
  product = 2 * 2048**3
  assert 5 * product <= one["flops"] < 5.1 * product and 6 * product <= eight["flops"] < 6.1 * product
  assert eight["hbm_traffic"] > one["hbm_traffic"]
  assert max(eight["memory_seconds"], eight["matmul_seconds"]) < eight["step_seconds"]
  for row in (one, eight):
    assert sum(row["parts_seconds"].values()) == pytest.approx(row["step_seconds"])
    low, high = aot.step_range(row, aot.CHIPS["v5e"])
    assert row["matmul_seconds"] <= low < high


def test_the_images_are_those_that_are_trained_on(tmp_path):
  spec = tiny.npz(tmp_path / "tiny.npz")
  held_out = tiny.config(**{"data.train": spec, "data.test": ""})
  tenth = len(splits.open_data(held_out.data)[1])
  assert tenth > 0 and plan.size_of(held_out) == (96 - tenth, 10)
  assert plan.size_of(tiny.config(**{"data.train": spec, "data.test": "npz:/not/here.npz"})) == (96, 10)
  some = {"data.train": spec, "data.test": f"{spec}:test", "labels.fraction": 0.5}
  few = config_lib.replace(config_lib.load("finetune:small"), some)
  assert plan.size_of(few) == (len(finetune.choose(tiny.source(), few.labels)), 10)
  known = {"data.train": "tfds:imagenet2012:train", "data.test": "tfds:imagenet2012:validation", "labels.fraction": 0.1}
  known["data.data_dir"] = str(tmp_path)
  assert plan.size_of(config_lib.replace(few, known)) == (128_117, 1000)


def test_of_a_given_number_of_images_the_trained_ones_are_counted(tmp_path):
  """As of those at hand: without what is held out, and in fine-tuning the fraction with labels."""
  whole = {"data.train": "folder:/not/here", "data.test": "folder:/nor/here"}
  few = config_lib.replace(config_lib.load("finetune:v1_1pct"), whole | {"labels.fraction": 0.01})
  assert plan.trained_on(few, 1_281_167, 1000) == 12_812
  assert plan.trained_on(config_lib.replace(few, {"data.test": ""}), 1_281_167, 1000) == 11_530
  (tmp_path / "names.txt").write_text("a.png\nb.png\n\na.png\n")
  listed = config_lib.replace(few, {"labels.fraction": 1.0, "labels.list": str(tmp_path / "names.txt")})
  assert plan.trained_on(listed, 1_281_167, 1000) == 2
  pretraining = tiny.config(**{"data.train": "folder:/not/here", "data.test": "", "data.held_out": 0.1})
  assert plan.trained_on(pretraining, 1000, 10) == 900 and plan.trained_on(pretraining, 1000, 0) == 1000
  known = config_lib.replace(pretraining, {"data.train": "tfds:cifar10:train", "data.data_dir": "/not/here"})
  assert plan.size_of(known) == (45_000, 10)


@pytest.mark.parametrize("recipe", ["finetune:small", "distill:small"])
def test_a_plan_of_what_learns_classes_needs_their_number(monkeypatch, recipe):
  monkeypatch.setattr(aot, "topology", lambda name: pytest.fail("it has begun to compile"))
  with pytest.raises(UserError, match="learns classes: give --num_examples and --num_classes"):
    plan.run(config_lib.load(recipe), ["v5e:2x2"], num_examples=1000)


def test_what_is_planned_is_what_is_trained_on(monkeypatch):
  planned = []
  monkeypatch.setattr(aot, "topology", lambda name: (aot.CHIPS["v5e"], jax.devices()[:4]))
  monkeypatch.setattr(plan, "plan", lambda config, name, examples, classes, note: planned.append(examples) or {})
  few = config_lib.replace(
    config_lib.load("finetune:small"), {"labels.fraction": 0.1, "data.train": "folder:/not/here"}
  )
  plan.run(few, ["v5e:2x2"], num_examples=5000, num_classes=10, as_json=True)
  assert planned == [500]


def test_images_that_stay_on_the_devices_are_planned_in_their_size(monkeypatch, tmp_path):
  """As `data.in_memory` stores them there, and in the memory of every device; the hosts deliver none."""
  steps, hbm = [], 2**31

  def measured(jitted, arguments, *, chip, devices):
    steps.append(arguments[1])
    return ROW | {"peak_bytes": 1000, "arguments_bytes": 500, "hbm_bytes": hbm}

  monkeypatch.setattr(aot, "topology", lambda name: (aot.CHIPS["v5e"], jax.devices()[:4]))
  monkeypatch.setattr(aot, "measure", measured)
  monkeypatch.setattr(plan, "model_flops", lambda *_: 1.0)
  spec = tiny.npz(tmp_path / "tiny.npz")
  config = tiny.config(**{"data.train": spec, "data.test": f"{spec}:test", "augment.where": "resident"})
  row = plan.measure(plan.with_canvas(config), "v5e:2x2", *plan.size_of(config))
  assert steps[0].pixels["image"].shape == (tiny.BATCH, 28, 28, 3)
  assert row["peak_bytes"] == 1000 + 96 * 28 * 28 * 3 and row["arguments_bytes"] == 500 + 96 * 28 * 28 * 3
  text = plan.table({**ROW, **row, "changes": {}})
  assert "\nhosts" not in text and "\nhosts" in plan.table(ROW)
  on_host = config_lib.replace(config, {"augment.where": "host"})
  assert plan.with_canvas(on_host) == on_host
  # Of what is not here, the canvas is that of the recipe, and no more is kept on a device than a run would keep.
  away = config_lib.replace(config, {"data.train": "folder:/not/here", "optimizer.warmup_epochs": 0.0})
  row = plan.measure(plan.with_canvas(away), "v5e:2x2", 1_000_000, 10)
  assert steps[1].pixels["image"].shape == (tiny.BATCH, 512, 512, 3) and row["peak_bytes"] == 1000 + 2**30
  hbm = 2**30
  with pytest.raises(aot.DoesNotFit):
    plan.measure(away, "v5e:2x2", 1_000_000, 10)


def test_a_form_of_nt_xent_is_named_where_it_is_the_loss():
  mesh = mesh_lib.make_mesh()
  assert "nt_xent" in plan.settings(tiny.config(), mesh)
  for method in ("byol", "memory"):
    assert "nt_xent" not in plan.settings(tiny.config(method=method), mesh)
