"""The map keeps neighbors, says how well it does, and finds copies and outliers."""

import csv
import itertools
import re
import shutil
import subprocess
import types

import images
import jax
import numpy as np
import pytest
import tiny
from PIL import Image

from simclr_jax import data, model, report
from simclr_jax.evaluation import embed as embed_lib
from simclr_jax.evaluation import maps
from simclr_jax.methods import tsimcne
from simclr_jax.programs import config as config_lib
from simclr_jax.programs import embed, pretrain, trained
from simclr_jax.programs import map as map_lib
from simclr_jax.report import colors
from simclr_jax.report import map as map_report
from simclr_jax.runtime import checkpoint, loop
from simclr_jax.runtime import mesh as mesh_lib

pytestmark = pytest.mark.usefixtures("one_device")

rng = np.random.default_rng(0)


def blobs(per_blob=60, dimensions=20):
  """(h, labels) of three clusters, far apart."""
  labels = np.repeat(np.arange(3), per_blob)
  centers = 6 * rng.normal(size=(3, dimensions))
  return (centers[labels] + rng.normal(size=(len(labels), dimensions))).astype(np.float32), labels


def infonc_tsne(h, **options):
  return maps.infonc_tsne(h, maps.neighbors(h), **options)


def test_pca_is_the_projection_on_the_two_first_axes():
  h, _ = blobs()
  xy = maps.pca(h)
  x = h - h.mean(0)
  _, s, _ = np.linalg.svd(x, full_matrices=False)
  np.testing.assert_allclose(np.linalg.norm(xy, axis=0), s[:2], rtol=1e-4)
  np.testing.assert_allclose(xy[:, 0] @ xy[:, 1], 0, atol=1e-2)
  assert maps.pca(h[:, :1]).shape == (len(h), 2)  # one dimension
  assert np.isfinite(maps.pca(np.ones((5, 4), np.float32))).all()


def test_the_map_keeps_neighbors_and_is_a_function_of_the_seed():
  h, labels = blobs()
  xy = infonc_tsne(h, seed=3)
  assert maps.accuracy(xy, labels) > 0.98
  assert maps.trustworthiness(h, xy) > 0.85 > maps.trustworthiness(h, rng.normal(size=xy.shape))
  np.testing.assert_array_equal(xy, infonc_tsne(h, seed=3))
  assert infonc_tsne(h[:3]).shape == (3, 2) and np.isfinite(infonc_tsne(h[:4])).all()


def test_more_points_than_repel_at_a_step(monkeypatch):
  monkeypatch.setattr(maps, "SAMPLE", 64)
  h, labels = blobs()
  assert maps.accuracy(infonc_tsne(h), labels) > 0.95


def test_trustworthiness_is_that_of_scikit_learn():
  manifold = pytest.importorskip("sklearn.manifold")
  h, _ = blobs(per_blob=40)
  xy = rng.normal(size=(len(h), 2)) + h[:, :2]
  unit = h / np.linalg.norm(h, axis=1, keepdims=True)
  assert maps.trustworthiness(h, xy) == pytest.approx(manifold.trustworthiness(unit, xy, n_neighbors=15), abs=1e-6)


def test_accuracy_leaves_a_point_out_of_its_own_vote():
  xy = np.array([[0, 0], [0, 1], [1, 0], [9, 9], [9, 8], [8, 9]], float)
  assert maps.accuracy(xy, np.array([0, 0, 0, 1, 1, 1]), k=2) == 1.0
  assert maps.accuracy(xy, np.array([0, 1, 1, 0, 1, 1]), k=2) < 0.7
  h = np.repeat(np.eye(2), 20, 0) + 0.01 * rng.normal(size=(40, 2))
  assert maps.accuracy_of_h(maps.neighbors(h), np.repeat([0, 1], 20)) == 1


def test_a_vote_stands_beside_what_needs_no_network():
  """Images of one color a class: a histogram knows the class, whatever h is; noise in h does not."""
  labels = np.arange(40) % 2
  pictures = np.zeros((40, 16, 16, 3), np.uint8)
  pictures[..., 0], pictures[..., 2] = 200 * labels[:, None, None], 200 * (1 - labels[:, None, None])
  assert maps.baselines(pictures, labels) == {"raw pixels": 1.0, "color histograms": 1.0}
  note = map_lib.chart(rng.normal(size=(40, 8)), pictures, ["x"] * 40, labels, ["a", "b"])["note"]
  assert "% in h, 100.0 % in raw pixels of the thumbnails, 100.0 % in their color histograms;" in note


def test_the_map_of_one_class_says_what_is_said_without_labels():
  draws = np.random.default_rng(1)  # its own, so that those of the other tests are what they were
  h, pictures = draws.normal(size=(40, 8)), draws.integers(0, 256, (40, 8, 8, 3), np.uint8)
  one, none = (map_lib.chart(h, pictures, ["x"] * 40, labels, ["a", "b"]) for labels in (np.ones(40, int), None))
  assert one["note"] == none["note"] and "nan" not in one["note"] and one["labels"] is not None


def test_a_point_is_no_neighbor_of_itself_even_among_copies():
  h = rng.normal(size=(30, 8)).astype(np.float32)
  h[1:20] = h[0]  # more copies than neighbors
  near = maps.neighbors(h, k=5)
  assert near.shape == (30, 5) and not (near == np.arange(30)[:, None]).any() and (near[:20] < 20).all()
  assert maps.neighbors(h[:3], k=5).shape == (3, 2)


def test_copies_are_found_and_no_others():
  rng = np.random.default_rng(0)
  pictures = rng.integers(0, 256, (40, 24, 24, 3), np.uint8)
  pictures = np.stack([np.asarray(Image.fromarray(p).resize((4, 4)).resize((24, 24))) for p in pictures])
  h = rng.normal(size=(40, 16)).astype(np.float32)
  pictures[7], h[7] = pictures[3], h[3]  # the same
  pictures[20] = np.clip(pictures[5] * 0.8 + 20, 0, 255)  # paler
  h[20] = h[5] + h[20]  # to a network that has learned little
  pictures[30] = pictures[9]  # the same pixels, which the network finds different
  h[31] = h[10]  # and the reverse
  found = maps.near_duplicates(h, pictures)
  assert [(i, j) for i, j, _, _ in found] == [(3, 7), (5, 20)] and 0.5 < found[1][2] < 0.8
  assert found[0][2] == pytest.approx(1, abs=1e-5) and found[0][3] == pytest.approx(1, abs=1e-5)


def test_what_is_odd_in_a_channel_that_others_hardly_use_comes_first():
  h = (rng.gamma(2.0, size=(200, 10)) * np.array([10.0] * 5 + [0.1] * 5)).astype(np.float32)
  h[11, 7] += 30
  found = maps.outliers(h)
  assert found[0][0] == 11 and found[0][1] > 1.3 and len(found) == 200
  assert np.median([far for _, far in found]) == pytest.approx(1)
  assert len(maps.outliers(h[:2])) == 2
  assert maps.outliers(-h) == found  # h of a Vision Transformer has both signs


def test_colors_and_sheets(tmp_path):
  assert len(set(colors.colors(10))) == 10 and len(set(colors.colors(37))) == 37
  assert report.thumbnail_side(300) == 64 and report.thumbnail_side(10_000) == 24
  square = map_report.unit_square(np.array([[0.0, 0.0], [4.0, 2.0]]))
  np.testing.assert_allclose(square, [[0, 0.75], [1, 0.25]])  # up is up
  pictures = rng.integers(0, 256, (5, 20, 20, 3), np.uint8)
  shown = dict(note="", views={"a": rng.normal(size=(5, 2))}, pictures=pictures, names=["</script>x"] * 5)
  report.write_map(tmp_path / "map.html", title="t", summary="", map_of_images=shown)
  assert (tmp_path / "map.html").read_text().count("</script>") == 2  # of the page itself


def test_the_legend_of_the_picture_names_every_class_legibly(tmp_path, monkeypatch):
  names = [
    "cat",
    "Möbel",
    "قطة برية",
    "野良猫",
    "carnivore/cat/a1_b",
    "mammal/carnivore/cat/a",
    "mammal/carnivore/cat/b",
    "½\n",
    "Große Straße",
  ]
  drawn, text = [], map_report.ImageDraw.ImageDraw.text
  monkeypatch.setattr(map_report.ImageDraw.ImageDraw, "text", lambda *a, **k: drawn.append(a[2]) or text(*a, **k))
  report.map_png(tmp_path / "map.png", np.eye(9)[:, :2], labels=np.arange(9), class_names=names)
  short = ["mammal/ca…re/cat/a", "mammal/ca…re/cat/b"]
  assert drawn == ["cat", "Mobel", "class 2", "class 3", "carnivore/cat/a1_b", *short, "1⁄2?", "Gro?e Stra?e"]
  font = map_report.ImageFont.load_default(15)
  assert not any(bytes(font.getmask(c)) == bytes(font.getmask("\uffff")) for c in "".join(drawn))


DICHROMATS = {  # of linear RGB: Machado, Oliveira and Fernandes 2009, table 1, severity 1
  "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
  "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
  "tritan": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


def linear(color):
  c = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)]) / 255
  return np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)


def lab(rgb):
  """CIE L*a*b* of linear sRGB."""
  to_xyz = [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
  t = np.array(to_xyz) @ rgb / [0.95047, 1, 1.08883]
  x, y, z = np.where(t > 0.008856, np.cbrt(t), 7.787 * t + 16 / 116)
  return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("seen", ["normal", *DICHROMATS])
def test_classes_are_told_apart_in_both_themes_and_by_color_blind_eyes(seen):
  """Forty classes: by color within a shape, by shape otherwise."""
  kinds = colors.marks(map_report.LEGEND_OF_PAGE)
  assert len(set(kinds)) == map_report.LEGEND_OF_PAGE
  matrix = np.array(DICHROMATS.get(seen, np.eye(3)))
  found = [lab(np.clip(matrix @ linear(color), 0, 1)) for color in colors.EIGHT]
  assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(found, 2)) > 28
  luminance = [linear(color) @ [0.2126, 0.7152, 0.0722] + 0.05 for color in colors.EIGHT]
  for page in ("#ffffff", "#1b1f23"):
    other = linear(page) @ [0.2126, 0.7152, 0.0722] + 0.05
    assert min(max(one, other) / min(one, other) for one in luminance) > 1.9


def test_a_tiny_image_does_not_shrink_the_others():
  small, large = np.zeros((1, 1, 3), np.uint8), np.full((64, 64, 3), 200, np.uint8)
  pixels = [small, *[large] * 5]
  source = types.SimpleNamespace(read=lambda i: pixels[i])
  assert map_lib.thumbnails(source, np.arange(6)).shape == (6, 64, 64, 3)
  source = types.SimpleNamespace(read=lambda i: large[:28, :28])
  assert map_lib.thumbnails(source, np.arange(6)).shape == (6, 28, 28, 3)


def test_near_duplicates_are_shown_as_groups():
  pairs = [(0, 1, 0.99, 0.98), (4, 5, 0.9, 0.97), (2, 3, 0.95, 0.96), (1, 2, 0.93, 0.96)]
  assert [sorted(members) for members in map_lib.group(pairs)] == [[0, 1, 2, 3], [4, 5]]
  names = [f"/data/{'ab'[i % 2]}/{i}.png" for i in range(6)]
  chart = dict(pictures=np.zeros((6, 16, 16, 3), np.uint8), names=names)
  shown = map_lib.findings(chart, dict(duplicates=pairs, outliers=[(5, 2.0)]))
  text, groups = shown["duplicates"]
  assert text.startswith("4 pairs in 2 groups") and [len(pictures) for _, pictures in groups] == [4, 2]
  assert groups[1][0] == "a/4.png\nb/5.png\npixels 0.970, h 0.900"
  assert groups[0][0].endswith("pixels at least 0.960, h at least 0.930") and "a/0.png" in groups[0][0]
  assert shown["outliers"][1][0][0] == "b/5.png\n2.00 times"


GESTURES = """
const canvas = document.querySelector(".stage canvas"), card = document.querySelector(".card"), log = [];
const root = document.getElementById("map-of-images"), box = canvas.getBoundingClientRect();
const send = (kind, pointerType, pointerId, x, y) => canvas.dispatchEvent(new PointerEvent(kind, {
  pointerType, pointerId, clientX: box.left + x, clientY: box.top + y, bubbles: true, cancelable: true }));
const wheel = (deltaY) => !canvas.dispatchEvent(new WheelEvent("wheel", {
  deltaY, clientX: box.left + 100, clientY: box.top + 100, bubbles: true, cancelable: true }));
const at = () => root.dataset.at.split(" ").map(Number);
const data = JSON.parse(document.getElementById("map-data").textContent), inner = box.width - 48;
const [x, y] = [0, 1].map((k) => box.width / 2 + (data.views[0][k] / 1e4 - 0.5) * inner);
const check = (what, right) => log.push(right ? "" : what);
const tap = (px, py) => { for (const kind of ["pointerdown", "pointerup", "pointerleave"]) send(kind, "touch", 1, px, py); };
tap(x, y);
check("tap", !card.hidden && card.querySelector("span").textContent === "a/0.png");
check("wheel down scrolls the page", !wheel(100) && at()[0] === 1 && canvas.style.touchAction === "pan-y");
send("pointerdown", "touch", 1, 100, 100); send("pointermove", "touch", 1, 100, 140); send("pointerup", "touch", 1, 100, 140);
check("no pan before zoom", at().join() === "1,0.5,0.5");
check("wheel up zooms", wheel(-400) && at()[0] > 2 && canvas.style.touchAction === "none");
const [zoom, cx] = at();
send("pointerdown", "touch", 1, 100, 100); send("pointermove", "touch", 1, 150, 100);
check("one finger pans", Math.abs(at()[1] - (cx - 50 / zoom / inner)) < 2e-3);
send("pointerdown", "touch", 2, 200, 100); send("pointermove", "touch", 2, 250, 100);
check("two fingers zoom", Math.abs(at()[0] - 2 * zoom) < 0.01);
send("pointerup", "touch", 2, 250, 100); send("pointerup", "touch", 1, 150, 100);
check("and leave no card", card.hidden);
send("pointermove", "mouse", 9, x, y);
wheel(4000);
check("zoomed out", at().join() === "1,0.5,0.5");
send("pointermove", "mouse", 9, x, y); check("hover", !card.hidden);
send("pointerleave", "mouse", 9, x, y); check("and leave", card.hidden);
document.title = "wrong: " + log.filter((what) => what).join("; ");
"""


@pytest.mark.skipif(not shutil.which("chromium"), reason="no chromium")
def test_gestures_in_a_browser(tmp_path):
  xy = np.array([[0.0, 0.0], [1.0, 1.0], [0.0, 1.0], [1.0, 0.2]])
  shown = dict(
    note="", views={"a": xy}, pictures=rng.integers(0, 256, (4, 16, 16, 3), np.uint8),
    names=[f"/data/a/{i}.png" for i in range(4)], labels=np.arange(4) % 2, class_names=["a", "b"],
  )  # fmt: skip
  page = tmp_path / "map.html"
  report.write_map(page, title="t", summary="", map_of_images=shown)
  page.write_text(page.read_text().replace("</body>", f"<script>onload = () => {{ {GESTURES} }};</script></body>"))
  command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
  command += ["--window-size=390,844", "--virtual-time-budget=3000", "--enable-logging=stderr", "--dump-dom", str(page)]
  done = subprocess.run(command, capture_output=True, text=True)
  assert re.search("<title>(.*?)</title>", done.stdout)[1].strip() == "wrong:", done.stderr
  assert "CONSOLE" not in done.stderr


@pytest.mark.skipif(not shutil.which("chromium"), reason="no chromium")
@pytest.mark.parametrize("n", [2, 100, 7919])
def test_every_point_is_drawn_once_and_classes_are_mixed(tmp_path, n):
  """Points without a class are circles; those of the first half are to the left."""
  shown = dict(
    note="", views={"a": np.stack([np.arange(n), np.zeros(n)], 1)}, pictures=np.zeros((n, 16, 16, 3), np.uint8),
    names=["x"] * n, labels=np.full(n, -1), class_names=["a"],
  )  # fmt: skip
  page = tmp_path / "map.html"
  report.write_map(page, title="t", summary="", map_of_images=shown)
  watch = """
    const drawn = [], pen = CanvasRenderingContext2D.prototype, arc = pen.arc;
    pen.arc = function (x, ...rest) { drawn.push(x); arc.call(this, x, ...rest); };
    addEventListener("load", () => { document.title = drawn.join(" "); });"""
  page.write_text(page.read_text().replace("<body>", f"<body><script>{watch}</script>", 1))
  command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
  command += ["--window-size=1200,900", "--virtual-time-budget=3000", "--dump-dom", str(page)]
  done = subprocess.run(command, capture_output=True, text=True)
  x = np.array(re.search("<title>(.*?)</title>", done.stdout)[1].split(), float)[:n]
  assert len(set(x)) == len(x) == n
  if n > 2:
    assert 0.4 < (x[: n // 2] < np.median(x)).mean() < 0.6


@pytest.fixture(scope="module")
def table(tmp_path_factory):
  """What `simclr embed` wrote about 48 images."""
  folder = tmp_path_factory.mktemp("map")
  return embed.run(tiny.export(folder / "encoder"), tiny.npz(folder / "tiny.npz", 48), folder / "h.npz")


def test_the_program_writes_page_picture_and_tables(table, capsys):
  found = map_lib.run(table=table, images=32)
  assert "on PCA" in capsys.readouterr().out and len(found["names"]) == 32
  folder = table.parent / "map"
  page = (folder / "map.html").read_text()
  assert not re.search(r"https?:|url\(|@import|<iframe", page) and 'id="map-data"' in page
  assert Image.open(folder / "map.png").width == 900
  rows = list(csv.DictReader((folder / "map.csv").open()))
  with (folder / "map.npz").open("rb") as file, np.load(file) as arrays:
    assert arrays["xy"].shape == arrays["pca"].shape == (32, 2) and arrays["label"].max() < 10
    np.testing.assert_allclose([float(row["x"]) for row in rows], arrays["xy"][:, 0], atol=1e-4)
    assert [row["name"] for row in rows] == arrays["name"].tolist()
  assert all(re.fullmatch(r"-?\d+\.\d{1,4}", row[key]) for row in rows for key in ("x", "y"))
  assert len(list(csv.reader((folder / "outliers.csv").open()))) == 33


def test_other_images_than_those_that_were_embedded_are_refused(tmp_path):
  """A file more in the folder, and every picture and name would be of another image."""
  for i in range(6):
    images.save(tmp_path / f"set/{i}.png", tiny.source().read(i))
  table = embed.run(tiny.export(tmp_path / "encoder"), f"files:{tmp_path}/set", tmp_path / "h.npz")
  map_lib.run(table=table)
  images.save(tmp_path / "set/00.png", tiny.source().read(7))
  with pytest.raises(ValueError, match=r"image 1 of .* was .*1\.png and is .*00\.png: run simclr embed again") as error:
    map_lib.run(table=table)
  assert "\n" not in str(error.value)


def test_mistakes(table, tmp_path):
  with pytest.raises(ValueError, match="no such file; `simclr embed` writes one"):
    map_lib.run(table=tmp_path / "none.npz")
  with pytest.raises(ValueError, match="one of --workdir=RUN and --features=FILE"):
    map_lib.run()
  with pytest.raises(ValueError, match="1 image: a map needs at least two"):
    map_lib.run(table=table, images=1)
  for options, words in (
    ({"step": 3}, "--step=3: --features=.* are computed already"),
    ({"overrides": ["--config.augment.size=8"]}, "--config.augment.size=8: --features=.* are computed already"),
  ):
    with pytest.raises(ValueError, match=words):
      map_lib.run(table=table, **options)
  with pytest.raises(ValueError, match="--data_dir=x is for --features; with --workdir give --config.data.data_dir=x"):
    map_lib.run(workdir=tmp_path, data_dir="x")


def test_silhouette_by_a_loop_and_by_scikit_learn():
  xy, labels = rng.normal(size=(40, 2)), rng.integers(0, 3, 40)
  labels[7] = 5  # alone in its class
  scores = []
  for i in range(40):
    distance = np.linalg.norm(xy - xy[i], axis=1)
    own = [distance[j] for j in range(40) if labels[j] == labels[i] and j != i]
    others = [distance[labels == c].mean() for c in set(labels) - {labels[i]}]
    scores.append((min(others) - np.mean(own)) / max(min(others), np.mean(own)) if own else 0.0)
  assert maps.silhouette(xy, labels) == pytest.approx(np.mean(scores), abs=1e-9)
  metrics = pytest.importorskip("sklearn.metrics")
  assert maps.silhouette(xy, labels) == pytest.approx(metrics.silhouette_score(xy, labels), abs=1e-9)
  assert np.isnan(maps.silhouette(xy, np.zeros(40, int)))


def test_the_map_of_features_has_no_network(table):
  with pytest.raises(ValueError, match="the network of the map is in the run, not in --features"):
    map_lib.run(table=table, method="tsimcne")


@pytest.mark.slow
def test_tsimcne_trains_a_map_that_places_new_images_too(tmp_path, capsys):
  spec = tiny.npz(tmp_path / "set.npz")
  changes = {"tsimcne.stages": (1.0, 1.0, 2.0), "optimizer.name": "sgd", "data.train": spec, "data.held_out": 0.0}
  config = tiny.config(method="tsimcne", **changes, **{"data.test": ""})
  mesh, text = mesh_lib.make_mesh(jax.devices()[:1]), config_lib.to_json(config)
  task = pretrain.make_task(config, data.open_source(spec), mesh=mesh)
  options = dict(mesh=mesh, workdir=tmp_path / "run", config_json=text, seed=0)
  state, _ = loop.run(task, loop.LoopConfig(log_every=4), **options)
  checkpoint.write_config(tmp_path / "run", text)
  found = map_lib.run(tmp_path / "run", method="tsimcne", images=40)
  out = capsys.readouterr().out
  assert list(found["views"]) == ["t-SimCNE", "PCA"] and "Silhouette of the classes" in out
  net = model.create(config, 10, tsimcne.Plane())

  def placed(spec, index):
    source = data.open_source(spec)
    crop = embed_lib.crop_of(config)
    images = crop([source.read(int(i)) for i in index])
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    return np.asarray(net.apply(variables, images[:, None], train=False).prediction[:, 0, 0])

  index = np.sort(data.permutation(0, 0, 96)[:40])
  np.testing.assert_allclose(found["views"]["t-SimCNE"], placed(spec, index), atol=1e-4)
  new = [f"--config.data.test={spec}:test"]
  found = map_lib.run(tmp_path / "run", method="tsimcne", output=tmp_path / "new", overrides=new)
  np.testing.assert_allclose(found["views"]["t-SimCNE"], placed(f"{spec}:test", np.arange(32)), atol=1e-4)
  with pytest.raises(ValueError, match="is a run of config.method=simclr: expected one with config.method=tsimcne"):
    run = types.SimpleNamespace(config=tiny.config(), workdir="x")
    trained.TrainedRun.on_the_map(run, None)
