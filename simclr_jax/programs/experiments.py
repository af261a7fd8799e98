"""Claims about SimCLR as differences between small runs: the settings and the claims of `simclr claims`.

Every setting is a row of configs/ablations.py at its small scale.  A claim is a signed sum of scores, computed for each
seed: "simclr.linear - pixels.linear" is the score of SimCLR's h minus the score of raw pixels.  best(a,b).linear is the score
of whichever of the settings a and b is best on held-out training images; each(a,b).linear says that the claim is about a and
about b, and is judged by the one that speaks most against it (claims.judge).
"""

import dataclasses

from simclr_jax.programs.cells import HISTOGRAM, PIXELS, UNTRAINED, Setting

V1 = "v1"
SANITY, OURS = "sanity check", "our own question"
FIGURE_5 = ("crop", "cutout", "color", "sobel", "noise", "rotate")  # blur needs larger views
FIGURE_5_QUICK = ("crop", "color", "sobel", "rotate")


def _changed(row="temperature-0.1", *, epochs=1.0, labels=1.0, measures=(), **changes) -> Setting:
  """A setting with changes whose keys have __ for the dots."""
  flat = tuple((key.replace("__", "."), value) for key, value in changes.items())
  return Setting(row, flat, epochs=epochs, labels=labels, measures=measures)


_SUPERVISED = dict(method="supervised", projector__kind="none")
_AUTOENCODER = dict(method="autoencoder", projector__kind="none")
_RATE_OF_128 = dict(
  optimizer__lr_scaling="none", optimizer__base_lr=8e-3
)  # also where there are fewer images than that
_CONTRASTIVE_ACCURACY = ("contrastive",)

SETTINGS: dict[str, Setting] = {
  "pixels": Setting(kind=PIXELS, measures=("few",)),
  "histogram": Setting(kind=HISTOGRAM, measures=("few",)),
  "untrained": Setting(kind=UNTRAINED, measures=("few",)),
  "simclr": Setting(measures=("z", "few", "few_z", "contrastive", "geometry", "course", "transforms", "matching")),
  "crop_alone": _changed(augment__color_strength=0.0, measures=("contrastive", "matching")),
  "autoencoder": _changed(**_AUTOENCODER, measures=("few",)),
  "supervised": _changed(**_SUPERVISED, measures=("few",)),
  "supervised_10pct": _changed(**_SUPERVISED, **_RATE_OF_128, labels=0.1),
  "supervised_1pct": _changed(**_SUPERVISED, **_RATE_OF_128, labels=0.01),
  "head_linear": Setting("head-linear-128"),
  "head_none": Setting("head-none"),
  "z_32": Setting("head-nonlinear-32"),
  "no_l2": Setting("no_l2-10", measures=_CONTRASTIVE_ACCURACY),
  "temperature_0.05": Setting("temperature-0.05", measures=_CONTRASTIVE_ACCURACY),
  "temperature_1": Setting("temperature-1", measures=_CONTRASTIVE_ACCURACY),
  "short": Setting(epochs=0.25),
  "small_batch": Setting("batch-512-100ep-linear"),
  "small_batch_short": Setting("batch-512-100ep-linear", epochs=0.25),
  "small_batch_short_sqrt": Setting("batch-512-100ep-sqrt", epochs=0.25),
  "norm_per_device": _changed(norm_scope="device", norm_devices=16, measures=_CONTRASTIVE_ACCURACY),
  "oracle": _changed(method="oracle"),
  "temperature_0.5": Setting("temperature-0.5", measures=_CONTRASTIVE_ACCURACY),
  "debiased": _changed("temperature-0.5", loss__name="debiased", loss__reduction=None),
  "alignment": _changed(method="alignment", measures=("geometry", "course")),
  "weak_color": Setting("color-0.125"),
  "supervised_weak_color": _changed("color-0.125", **_SUPERVISED),
  "rotated": _changed(augment__extra=(("rotate", 0.75),), augment__where="host", measures=("transforms",)),
  "noised": _changed(augment__extra=(("noise", 0.5),), augment__where="host", measures=("transforms",)),
  "edged": _changed(augment__extra=(("sobel", 0.5),), augment__where="host", measures=("transforms",)),
  **{
    f"compose_{a}_{b}": Setting(f"compose-{a}-{b}", epochs=0.5)
    for i, a in enumerate(FIGURE_5_QUICK)
    for b in FIGURE_5_QUICK[i:]
  },
  # The settings below belong to the full budget only.
  "no_l2_100": Setting("no_l2-100", measures=_CONTRASTIVE_ACCURACY),
  "z_2048": Setting("head-nonlinear-2048"),
  "oracle_half": _changed(method="oracle", removed_negatives=0.5),
  "long": Setting(epochs=2.0),
  **{f"{name}_128_{lr:g}": _changed(batch_size=128, optimizer__name=name, optimizer__base_lr=lr, optimizer__lr_scaling="none")
     for name, lrs in (("lars", (1.0, 3.0)), ("sgd", (0.1, 0.3))) for lr in lrs},
  # Twice the epochs, or there would be a few dozen updates.
  **{f"{name}_2048_{lr:g}": _changed(epochs=2.0, batch_size=2048, optimizer__name=name, optimizer__base_lr=lr, optimizer__lr_scaling="none")
     for name, lrs in (("lars", (3.0, 9.0)), ("sgd", (0.3, 1.0)), ("adamw", (4e-3, 8e-3))) for lr in lrs},
  **{
    f"compose_{a}_{b}": Setting(f"compose-{a}-{b}", epochs=0.5)
    for i, a in enumerate(FIGURE_5) for b in FIGURE_5[i:]
    if not {a, b} <= set(FIGURE_5_QUICK)
  },
  # The other methods of configs/methods.py, with a small queue and with decays for short training.  Their learning rates,
  # where they are not the row's, and SupCon's temperature were chosen on held-out training images of CIFAR-10
  # (benchmarks/trials.py).
  "moco": _changed(method="moco", moco__size=4096, moco__decay=0.99, optimizer__base_lr=6e-3, measures=("few",)),
  "moco_v3": _changed(method="moco_v3", moco_v3__decay=0.99, loss__temperature=0.2, measures=("few",)),
  "byol": _changed(method="byol", byol__decay=0.99, optimizer__base_lr=6e-3, measures=("few",)),
  "instdisc": _changed(method="instdisc", instdisc__negatives=0, instdisc__decay=0.5, projector__kind="linear",
                       loss__temperature=0.07, measures=("few",)),
  "supcon": _changed(method="supcon", loss__temperature=0.5, measures=("few",)),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Claim:
  """A sentence that a difference supports or contradicts.

  Attributes:
    name: a short one, for tables.
    says: the claim in plain English.
    source: paper, and table or figure or section.
    paper: the difference that the paper measured, in the unit of `unit`; None where it states none.
    formula: the difference, see the module.
    direction: as in intervals.verdict.
    margin: how small a difference must be to count as none, where the direction is 0.
    unit: "points" of accuracy, or "" for scores that are not percentages.
    color: whether the claim is about color, which gray images do not have.
    groups: the budgets that measure it.
  """

  name: str
  says: str
  source: str
  formula: str
  paper: float | None = None
  direction: int = 1
  margin: float = 2.0
  unit: str = "points"
  color: bool = False
  groups: tuple[str, ...] = ("quick",)


def _others(names) -> str:
  """Every pair of two names, except crop with color."""
  return ",".join(
    f"compose_{a}_{b}" for i, a in enumerate(names) for b in names[i + 1 :] if {a, b} != {"crop", "color"}
  )


def _best(kind: str, batch: int) -> str:
  return "best(" + ",".join(name for name in SETTINGS if name.startswith(f"{kind}_{batch}_")) + ").linear"


BASIC = ("quick", "methods")

CLAIMS = (
  Claim("h over pixels", "A linear classifier predicts classes better from h than from raw pixels.",
        SANITY, "simclr.linear - pixels.linear", groups=BASIC),
  Claim("h over histogram", "A linear classifier predicts classes better from h than from a histogram of 64 colors.",
        SANITY, "simclr.linear - histogram.linear", color=True, groups=BASIC),
  Claim("h over untrained", "Training makes h better than the h of an untrained encoder.",
        SANITY, "simclr.linear - untrained.linear", groups=BASIC),
  Claim("h over autoencoder", "Contrastive training beats an autoencoder that sees as many views.",
        SANITY, "simclr.linear - autoencoder.linear", groups=BASIC),
  Claim("supervised over h", "With all labels, supervised training of the same length beats a linear classifier on h.",
        f"{V1}, Tables B.3 and 6, 1,000 epochs: 76.4 and 69.3", "supervised.own - simclr.linear", paper=7.1, groups=BASIC),
  Claim("10 % of labels", "With a tenth of the labels, a linear classifier on h beats supervised training.",
        "after v2, Table 3, where the network is fine-tuned: 65.6 and 56.4", "simclr.linear_10pct - supervised_10pct.own", paper=9.2),
  Claim("1 % of labels", "With a hundredth of the labels, a linear classifier on h beats supervised training.",
        "after v2, Table 3, where the network is fine-tuned: 48.3 and 25.4", "simclr.linear_1pct - supervised_1pct.own", paper=22.9),
  Claim("h over z", "The layer before the head is a better representation than the one after it.",
        f"{V1}, section 4.2: more than 10 points", "simclr.linear - simclr.linear_z", paper=10.0, groups=BASIC),
  Claim("nonlinear head", "A nonlinear projection head is better than a linear one.",
        f"{V1}, Figure 8: 3 points", "simclr.linear - head_linear.linear", paper=3.0),
  Claim("linear head", "A linear projection head is better than none.",
        f"{V1}, Figure 8", "head_linear.linear - head_none.linear"),
  Claim("width of z", "The width of z (128 or 32) does not matter.",
        f"{V1}, Figure 8", "simclr.linear - z_32.linear", paper=0.0, direction=0),
  Claim("z forgets color", "Whether an image is in color can be predicted better from h than from z.",
        f"{V1}, Table 3: 99.3 and 97.4", "simclr.color_h - simclr.color_z", paper=1.9, color=True),
  Claim("z forgets hue", "The hue of an image can be predicted better from h than from z.",
        f"after {V1}, section 4.2", "simclr.hue_h - simclr.hue_z", unit="", color=True),
  Claim("z forgets rotation", "After training with rotations, the rotation of an image can be predicted better from h than from z.",
        f"{V1}, Table 3: 67.6 and 25.6", "rotated.rotation_h - rotated.rotation_z", paper=42.0),
  Claim("z forgets noise", "After training with noise, whether noise was added to an image can be predicted better from h than from z.",
        f"{V1}, Table 3: 99.5 and 59.6", "noised.noise_h - noised.noise_z", paper=39.9, groups=("full",)),
  Claim("z forgets edges", "After training with Sobel filters, whether an image was filtered can be predicted better from h than from z.",
        f"{V1}, Table 3: 96.6 and 56.3", "edged.sobel_h - edged.sobel_z", paper=40.3, groups=("full",)),
  Claim("z forgets position", "The position of a crop can be predicted better from h than from z.",
        f"after {V1}, section 4.2", "simclr.position_h - simclr.position_z", unit=""),
  Claim("crop and color", "Crops with color distortion make h better than crops alone.",
        f"{V1}, Figure 5", "simclr.linear - crop_alone.linear", color=True),
  Claim("shortcut", "Crops alone make the contrastive task easier: its accuracy is higher than with color distortion.",
        f"{V1}, section 3.1", "crop_alone.contrastive - simclr.contrastive", color=True),
  Claim("histograms suffice", "Without color distortion, color histograms (64 bins) match the two crops of an image more often.",
        f"{V1}, Figure 6", "crop_alone.matched - simclr.matched", color=True),
  Claim("decisive pair", "Crop with color is better than each of five other pairs of transformations of one branch.",
        f"{V1}, Figure 5", f"compose_crop_color.linear - each({_others(FIGURE_5_QUICK)}).linear", color=True),
  Claim("color helps SimCLR more", "Stronger color distortion helps contrastive training more than supervised training.",
        f"{V1}, Table 1, strengths 1/8 and 1: +3.6 and -1.3",
        "simclr.linear - weak_color.linear - supervised.own + supervised_weak_color.own", paper=4.9, color=True, groups=("full",)),
  Claim("rotation hurts", "Adding rotation to the augmentation makes h worse.",
        f"after {V1}, Figure 5, where rotation helps least", "simclr.linear - rotated.linear"),
  Claim("l2 normalization", "Cosine similarity at temperature 0.1 is better than dot products at 10.",
        f"{V1}, Table 5: 64.4 and 57.2", "simclr.linear - no_l2.linear", paper=7.2),
  Claim("an easier task", "Dot products at temperature 10 reach a higher contrastive accuracy than cosine similarity at 0.1.",
        f"{V1}, Table 5: 91.7 and 87.8", "no_l2.contrastive - simclr.contrastive", paper=3.9),
  Claim("temperature 0.05", "Temperature 0.1 is better than 0.05.",
        f"{V1}, Table 5: 64.4 and 59.7", "simclr.linear - temperature_0.05.linear", paper=4.7),
  Claim("temperature 0.5", "Temperature 0.1 is better than 0.5.",
        f"{V1}, Table 5: 64.4 and 60.7", "simclr.linear - temperature_0.5.linear", paper=3.7),
  Claim("temperature 1", "Temperature 0.1 is better than 1.",
        f"{V1}, Table 5: 64.4 and 58.0", "simclr.linear - temperature_1.linear", paper=6.4),
  Claim("longer training", "Four times the epochs make h better.",
        f"{V1}, Table B.1, batch 4,096, 400 and 100 epochs: 68.2 and 64.6", "simclr.linear - short.linear", paper=3.6),
  Claim("larger batches", "In short training, a batch size of 128 is better than 16, with a learning rate in proportion.",
        f"{V1}, Table B.1, 100 epochs, 4,096 and 512: 64.6 and 60.7", "short.linear - small_batch_short.linear", paper=3.9),
  Claim("the gap shrinks", "That advantage of the larger batch shrinks with longer training.",
        f"{V1}, Table B.1: 3.9 at 100 epochs, 2.0 at 400",
        "short.linear - small_batch_short.linear - simclr.linear + small_batch.linear", paper=1.9),
  Claim("square root", "At a batch size of 16, a learning rate in proportion to the square root of the batch size is better.",
        f"{V1}, Table B.1, 100 epochs, 512: 63.8 and 60.7", "small_batch_short_sqrt.linear - small_batch_short.linear", paper=3.1, groups=("full",)),
  Claim("global BatchNorm", "BatchNorm over the global batch makes h better than BatchNorm over 8 images per device.",
        f"{V1}, section 2.2", "simclr.linear - norm_per_device.linear"),
  Claim("BatchNorm leaks", "BatchNorm over 8 images per device raises the contrastive accuracy.",
        f"{V1}, section 2.2", "norm_per_device.contrastive - simclr.contrastive"),
  Claim("false negatives", "Leaving out negatives of the same class, as an oracle can, makes h better.",
        "Chuang et al. 2020, Figure 2", "oracle.linear - simclr.linear"),
  Claim("debiased loss", "At temperature 0.5, the debiased loss makes h better than NT-Xent.",
        "Chuang et al. 2020, section 5", "debiased.linear - temperature_0.5.linear"),
  Claim("collapse", "Without negatives, z collapses: it spreads over less of the sphere.",
        "after SimSiam, section 4.1", "simclr.spread_z - alignment.spread_z", unit=""),
  Claim("no negatives, no features", "Without negatives, h is worse.",
        "after SimSiam, section 4.1", "simclr.linear - alignment.linear"),
  Claim("dimensional collapse of z", "z uses a smaller part of its dimensions than h.",
        "after Jing et al. 2022", "simclr.rank_h - simclr.rank_z", unit=""),
  # ---- the full budget ----
  Claim("l2 normalization, 100", "Cosine similarity at temperature 0.1 is better than dot products at 100.",
        f"{V1}, Table 5: 64.4 and 57.0", "simclr.linear - no_l2_100.linear", paper=7.4, groups=("full",)),
  Claim("width of z, 2048", "The width of z (128 or 2048) does not matter.",
        f"{V1}, Figure 8", "simclr.linear - z_2048.linear", paper=0.0, direction=0, groups=("full",)),
  Claim("half an oracle", "Leaving out all negatives of the same class is better than leaving out half of them.",
        "after Chuang et al. 2020", "oracle.linear - oracle_half.linear", groups=("full",)),
  Claim("still longer", "Doubling the epochs once more makes h better.",
        f"{V1}, Table B.1, batch 4,096, 800 and 400 epochs: 68.9 and 68.2", "long.linear - simclr.linear", paper=0.7, groups=("full",)),
  Claim("decisive pair of all", "Crop with color is better than each of the 14 other pairs of six transformations of one branch.",
        f"{V1}, Figure 5", f"compose_crop_color.linear - each({_others(FIGURE_5)}).linear", color=True, groups=("full",)),
  Claim("LARS at 2,048", "At batch size 2,048, LARS is better than SGD.",
        f"after {V1}, section 2.2", f"{_best('lars', 2048)} - {_best('sgd', 2048)}", groups=("full",)),
  Claim("LARS over AdamW at 2,048", "At batch size 2,048, LARS is better than AdamW.",
        OURS, f"{_best('lars', 2048)} - {_best('adamw', 2048)}", groups=("full",)),
  Claim("LARS at 128", "At batch size 128, LARS and SGD are equally good.",
        OURS, f"{_best('lars', 128)} - {_best('sgd', 128)}", direction=0, groups=("full",)),
  # ---- the methods ----
  Claim("SimCLR over InstDisc", "SimCLR beats InstDisc's memory bank.",
        f"{V1}, Table 6, and InstDisc, Table 2: 69.3 and 54.0", "simclr.linear - instdisc.linear", paper=15.3, groups=("methods",)),
  Claim("MoCo v2 over SimCLR", "At a small batch, MoCo's queue beats SimCLR.",
        "MoCo v2, Table 2, batch 256, 200 epochs: 67.5 and 61.9", "moco.linear - simclr.linear", paper=5.6, groups=("methods",)),
  Claim("MoCo v3 over SimCLR", "A momentum encoder and a predictor beat SimCLR.",
        "MoCo v3, Table 4, 800 epochs: 73.8 and 70.4", "moco_v3.linear - simclr.linear", paper=3.4, groups=("methods",)),
  Claim("BYOL over SimCLR", "BYOL, which has no negatives, beats SimCLR.",
        "BYOL, Table 1, 1,000 epochs: 74.3 and 69.3", "byol.linear - simclr.linear", paper=5.0, groups=("methods",)),
  Claim("labels", "SupCon, which knows the labels, beats SimCLR.",
        "SupCon, Table 2: 78.7 and 70.2", "supcon.linear - simclr.linear", paper=8.5, groups=("methods",)),
  Claim("SupCon over supervised", "A linear classifier on SupCon's h beats supervised training.",
        "SupCon, Table 2: 78.7 and 78.2", "supcon.linear - supervised.own", paper=0.5, groups=("methods",)),
)  # fmt: skip
