"""Every page is one well-formed, self-contained, escaped file, and its curves and pictures are right."""

import ast
import base64
import html.parser
import io
import json
import os
import pathlib
import re
import resource
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from simclr_jax import report
from simclr_jax.report import charts, pictures
from simclr_jax.runtime import progress

ROOT = pathlib.Path(__file__).parents[1]
VOID = {"meta", "link", "br", "img", "hr", "input"}
rng = np.random.default_rng(0)


class Page(html.parser.HTMLParser):
  """Checks nesting while it reads; keeps (tag, attributes, text) of every element in the order of their ends."""

  def __init__(self, text):
    super().__init__()
    self.open, self.elements = [], []
    self.feed(text)
    self.close()
    assert not self.open, f"left open: {[tag for tag, *_ in self.open]}"

  def handle_starttag(self, tag, attrs):
    assert len(dict(attrs)) == len(attrs), f"attribute twice in <{tag} {attrs}>"
    element = (tag, dict(attrs), [])
    if tag in VOID:
      self.elements.append(element)
    else:
      self.open.append(element)

  def handle_startendtag(self, tag, attrs):
    self.elements.append((tag, dict(attrs), []))

  def handle_endtag(self, tag):
    assert self.open and self.open[-1][0] == tag, f"</{tag}> closes <{self.open[-1:]}>"
    self.elements.append(self.open.pop())

  def handle_data(self, data):
    if data.strip():  # the rest is the layout of the source
      for _, _, text in self.open:
        text.append(data)

  def all(self, tag, kind=None):
    return [
      (attrs, "".join(text))
      for name, attrs, text in self.elements
      if name == tag and (kind is None or kind in attrs.get("class", "").split())
    ]

  def texts(self, tag, kind=None):
    return [text for _, text in self.all(tag, kind)]


def full_arguments(folder):
  (folder / "encoder").mkdir()
  (folder / "encoder" / "a").write_bytes(bytes(1500))
  (folder / "encoder" / "b").write_bytes(bytes(500))
  return dict(
    title="A run",
    summary="It went well.",
    verdict="Healthy.",
    healthy=True,
    scores=[
      dict(representation="chance", knn=0.99, linear=0.1),
      dict(representation="raw pixels", knn=0.81, linear=0.824, linear_10=0.71),
      dict(representation="h", knn=0.8461, linear=None, linear_10=0.75),
    ],
    history=[
      dict(step=i, epoch=i / 10, loss=6.0 - i / 20, chance_loss=6.24, contrastive_accuracy=i / 100, odd=float(i))
      for i in range(50)
    ]
    + [dict(step=50, knn=0.5, note="text", flag=True)],
    config=dict(seed=0, optimizer=dict(name="lars", schedule=dict(warmup=10))),
    files={folder / "report.html": "the page", folder / "encoder": "the encoder", folder / "none": "nothing"},
    snippet="import simclr_jax\nx = 1 < 2\n",
    views=rng.random((30, 2, 28, 28, 3), np.float32),
    neighbors=(rng.random((3, 28, 28, 3)), rng.random((3, 5, 28, 28, 3)), rng.random((3, 5)) < 0.5),
    confusion=np.array([[8, 2], [1, 9]]),
    class_names=["cat", "dog"],
    seconds={"compile": 20.0, "train": 3600.0},
    changes=[("batch_size", 128, 512)],
    map_of_images=dict(
      note="A note.",
      views={"neighbors": rng.normal(size=(6, 2)), "PCA": rng.normal(size=(6, 2))},
      pictures=rng.integers(0, 256, (6, 16, 16, 3), np.uint8),
      names=[f"folder/{i}.png" for i in range(6)],
      labels=np.array([0, 1, 0, 1, 0, -1]),
      class_names=["cat", "dog"],
    ),
  )


EMPTY = dict(title="t", summary="")
EVIL = "</script></pre></style><script>alert('1')</script><img src=x onerror=\"alert(2)\"> & {{ 7 * 7 }} \udc80"
SHOWN = EVIL.replace("\udc80", "?")


def write(folder, **arguments):
  path = folder / "report.html"
  report.write_report(path, **(EMPTY | arguments))
  return path.read_text()


def test_the_page_is_well_formed_and_self_contained(tmp_path):
  text = write(tmp_path, **full_arguments(tmp_path))
  page = Page(text)
  ids = [attrs["id"] for _, attrs, _ in page.elements if "id" in attrs]
  assert len(ids) == len(set(ids))
  references = [attrs[k] for _, attrs, _ in page.elements for k in ("src", "href") if k in attrs]
  assert len(references) > 60  # 24 pairs, 3 rows of 6, the links to the sections
  for reference in references:
    assert reference.startswith("data:") or reference.removeprefix("#") in ids
  assert not re.search(r"https?:|url\(|@import|srcset|<iframe|<object", text)
  assert "batch_size128512" in page.texts("tr")
  assert 'name="viewport"' in text and "prefers-color-scheme: dark" in text
  assert page.texts("h2") == [
    *("Scores", "Map", "Curves", "View pairs", "Nearest neighbors", "Accuracy per class", "Confusion matrix"),
    *("Time budget", "Load the encoder", "Files", "Config"),
  ]
  assert page.all("table") and text.count("<table") == text.count('<div class="scroll"><table')
  assert not list(tmp_path.glob(".*")), "a partial file stayed behind"


def test_a_missing_section_leaves_no_heading(tmp_path):
  page = Page(write(tmp_path))
  assert not page.texts("section") and not page.texts("h2") and not page.texts("a") and not page.all("script")
  assert not page.all("p")
  everything = full_arguments(tmp_path)
  for gone, heading in [
    *(("scores", "Scores"), ("history", "Curves"), ("views", "View pairs"), ("seconds", "Time budget")),
    *(("neighbors", "Nearest neighbors"), ("snippet", "Load the encoder"), ("files", "Files")),
    ("map_of_images", "Map"),
  ]:
    page = Page(write(tmp_path, **{k: v for k, v in everything.items() if k != gone}))
    assert heading not in page.texts("h2") + page.texts("a") and len(page.texts("h2")) == 10
  page = Page(write(tmp_path, **{k: v for k, v in everything.items() if k not in ("confusion", "config", "changes")}))
  assert not {"Accuracy per class", "Confusion matrix", "Config"} & set(page.texts("h2"))
  assert "Curves" not in Page(write(tmp_path, history=[dict(step=1), dict(step=2, note="x")])).texts("h2")


def assert_harmless(page, scripts):
  """Nothing of EVIL became an element or an attribute, and no script has it as code."""
  assert len(page.all("script")) == scripts
  assert not any("alert" in text for attrs, text in page.all("script") if attrs.get("type") != "application/json")
  assert not any("onerror" in attrs or attrs.get("src") == "x" for _, attrs, _ in page.elements)


def test_everything_a_user_names_is_escaped(tmp_path):
  text = write(
    tmp_path,
    title=EVIL,
    summary=EVIL,
    verdict=EVIL,
    scores=[{"representation": EVIL, EVIL: 0.5}],
    history=[{"step": 1, EVIL: 1.0, "loss": 1.0}],
    config={EVIL: {EVIL: EVIL}, "list": [EVIL]},
    files={tmp_path / "<script>\"&'.png": EVIL},
    snippet=EVIL,
    confusion=np.eye(2, dtype=int),
    class_names=[EVIL, "b"],
    seconds={EVIL: 1.0},
    changes=[(EVIL, EVIL, EVIL)],
    choices=[(EVIL, EVIL, EVIL)],
    unreadable=[(EVIL, EVIL)],
  )
  page = Page(text)
  assert_harmless(page, scripts=1)
  assert page.texts("h1") == [SHOWN] and page.texts("title")[0] == SHOWN and page.texts("pre") == [SHOWN]
  assert not page.all("img") and f"{SHOWN}: 1 right" in [attrs.get("title") for attrs, _ in page.all("td")]
  assert f"{SHOWN}: 1.0 s" in [attrs.get("title") for attrs, _ in page.all("span")]
  assert (
    page.texts("tr")[0] == 3 * SHOWN and repr(EVIL) in page.texts("code") and "<script>\"&'.png" in page.texts("code")
  )
  many = [EVIL, *map(str, range(39))]
  page = Page(write(tmp_path, confusion=np.ones((40, 40), int), class_names=many))
  assert SHOWN in page.texts("td") and not page.all("script")


def test_what_a_user_names_is_escaped_on_a_map(tmp_path):
  picture = rng.integers(0, 256, (20, 20, 3), np.uint8)
  report.write_map(
    tmp_path / "map.html",
    title=EVIL,
    summary=EVIL,
    map_of_images=dict(
      note=EVIL,
      views={EVIL: rng.normal(size=(3, 2))},
      pictures=rng.integers(0, 256, (3, 16, 16, 3), np.uint8),
      names=[EVIL] * 3,
      labels=np.array([0, 1, -1]),
      class_names=[EVIL, "b"],
    ),
    duplicates=(EVIL, [(f"{EVIL}\nsecond line", [picture, picture])]),
    outliers=(EVIL, [(EVIL, [picture])]),
  )
  page = Page((tmp_path / "map.html").read_text())
  assert_harmless(page, scripts=2)
  assert page.texts("h2") == ["Map", "Near-duplicates", "Outliers"] and len(page.all("img")) == 4
  assert page.texts("p", "note") == [SHOWN] * 3 and page.texts("button").count(SHOWN) == 2
  assert page.texts("figcaption") == [f"{SHOWN}\nsecond line", SHOWN]
  (data,) = [text for attrs, text in page.all("script") if attrs.get("type") == "application/json"]
  assert json.loads(data)["names"] == [EVIL] * 3 and json.loads(data)["classes"] == [EVIL, "b"]


def test_what_a_user_names_is_escaped_in_a_comparison_of_runs(tmp_path):
  report.write_runs(
    tmp_path / "runs.html",
    title=EVIL,
    summary=EVIL,
    runs=([EVIL, "n"], [[report.Link(EVIL, EVIL), "1"], [EVIL, "2"]]),
    numeric=(1,),
    histories={EVIL: [dict(step=1, loss=2.0), dict(step=9, loss=1.0)], "b": [dict(step=3, loss=1.5, knn=0.5)]},
    keys=("loss", "knn", "rank"),
    differences=([EVIL], [[EVIL]]),
  )
  page = Page((tmp_path / "runs.html").read_text())
  assert_harmless(page, scripts=0)
  assert page.texts("h2") == ["Runs", "Curves", "Where the configs differ"] and page.texts("h1") == [SHOWN]
  assert f"{SHOWN}: 1" in page.texts("title") and len(page.all("svg")) == 2  # nobody logged a rank
  assert ({"href": SHOWN}, SHOWN) in page.all("a") and page.texts("th").count(SHOWN) == 5
  assert page.texts("td", "number") == ["1", "2"]


def test_html_stands_in_templates_only():
  names = "html|head|body|div|span|table|t[rdh]|p|a|b|i|br|img|script|style|link|section|figure|h[1-6]|ul|li|button|nav"
  tag = re.compile(rf"</?({names}|svg|path|text)(\s[^<>]*)?/?>|<({names}|svg|path|text) \w+=")
  for path in (ROOT / "simclr_jax").rglob("*.py"):
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, ast.Constant) and isinstance(node.value, str):
        assert not tag.search(node.value), f"{path}, line {node.lineno}: {node.value[:80]}"


def test_an_installed_package_has_its_templates(tmp_path):
  """A build, away from the checkout."""
  build = ["setup.py", "--quiet", "build_py", "--build-lib", str(tmp_path / "lib")]
  subprocess.run([sys.executable, *build], cwd=ROOT, check=True, capture_output=True)
  resources = {str(path.relative_to(tmp_path / "lib")) for path in (tmp_path / "lib").rglob("*")}
  for pattern in ("templates/*.html", "*.css", "*.js"):
    sources = list((ROOT / "simclr_jax/report").glob(pattern))
    assert sources and {str(path.relative_to(ROOT)) for path in sources} <= resources
  code = "from simclr_jax import report; report.write_report('page.html', title='t', summary='', snippet='x')"
  environment = {**os.environ, "PYTHONPATH": str(tmp_path / "lib")}
  subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True)
  page = (tmp_path / "page.html").read_text()
  assert "prefers-color-scheme" in page and "navigator.clipboard" in page


def panel(page, heading):
  return next(f for f in re.findall(r"<figure>.*?</figure>", page, re.S) if f"<span>{heading}</span>" in f)


def curve(page, heading):
  """Reads a panel back through its own axes: {class of the line: [(step, value)]}, height → value, tooltips."""
  figure = panel(page, heading)
  svg = Page(figure)
  scale = {"G": 1e9, "M": 1e6, "k": 1e3, "%": 1e-2}

  def number(text):
    return float(text.rstrip("GMk%")) * scale.get(text[-1], 1.0)

  y_axis = [(float(a["y"]) - 3.5, number(text)) for a, text in svg.all("text", "y")]
  x_axis = [(float(a["x"]), number(text)) for a, text in svg.all("text") if "class" not in a]
  to_value, to_step = (np.polyfit(*zip(*axis, strict=True), 1) for axis in (y_axis, x_axis))
  assert to_value[0] < 0 < to_step[0]  # up is more, right is later
  lines = {}
  for attrs, _ in svg.all("polyline"):
    points = np.array([point.split(",") for point in attrs["points"].split()], float)
    lines[attrs["class"]] = np.polyval(to_step, points[:, 0]), np.polyval(to_value, points[:, 1])
  return lines, lambda height: np.polyval(to_value, height), svg.texts("title"), figure


def test_a_curve_stands_where_its_axes_say(tmp_path):
  page = write(tmp_path, **full_arguments(tmp_path))
  lines, to_value, tooltips, figure = curve(page, "Loss")
  steps, values = lines["curve"]
  np.testing.assert_allclose(steps, np.arange(50), atol=0.1)
  np.testing.assert_allclose(values, 6.0 - np.arange(50) / 20, atol=0.02)
  dashed = re.search(r'class="reference" d="M\d+ ([\d.]+)H', figure)
  assert to_value(float(dashed[1])) == pytest.approx(6.24, abs=0.02) and "dashed: chance, 6.24" in figure
  assert tooltips[30] == "step 30 (epoch 3): 4.5" and len(tooltips) == 50
  assert "<b>3.55</b>" in figure  # the last value

  steps, values = curve(page, "Contrastive accuracy")[0]["curve"]
  np.testing.assert_allclose(values, np.arange(50) / 100, atol=0.004)
  folded = page[page.index("Everything else that was logged") :]
  assert "<span>odd</span>" in folded and "<span>Loss</span>" not in folded
  assert "<span>note</span>" not in page and "<span>flag</span>" not in page  # not numbers
  assert "<b>50.0 %</b>" in panel(page, "kNN accuracy of h")  # a single point has a panel too


def test_all_phases_of_a_run_have_colors_of_their_own(tmp_path):
  clock = progress.Clock()
  clock.before = 9.0  # it was resumed
  clock.seconds.update(dict.fromkeys(("start", "compile", "data", "step", "evaluate", "save", "trace"), 1.0))
  text = write(tmp_path, seconds=clock.budget())
  page, style = Page(text), text[: text.index("</style>")]
  kinds = [attrs["class"].split()[-1] for attrs, _ in page.all("span", "key")]
  assert len(set(kinds)) == len(clock.budget()) == 8
  for theme in (style[: style.index("@media")], style[style.index("@media") :]):
    assert len({re.search(rf"--{kind}: (#\w+);", theme)[1] for kind in kinds}) == 8
  assert all(f".{kind} {{ background: var(--{kind}); }}" in style for kind in kinds)


def test_labels_of_an_axis_are_short_and_exact(tmp_path):
  for value in (1.2345e-5, -1.2345e-5, 1.5e-4, 1.2345e-4, 0.0012345, -0.012345, 0.12345, 12345.0, -1.2345e7):
    values = [value * (1 + k / 1000) for k in range(5)]
    page = write(tmp_path, history=[dict(step=k, odd=one) for k, one in enumerate(values)])
    labels = Page(panel(page, "odd")).texts("text", "y")
    assert labels and max(len(label.lstrip("-")) for label in labels) <= 8, labels
    np.testing.assert_allclose(curve(page, "odd")[0]["curve"][1], values, rtol=1e-3)


LAYOUT = """
const wrong = [], box = (element) => element.getBoundingClientRect();
for (const td of document.querySelectorAll("#unreadable td")) if (td.clientWidth < 120) wrong.push("squeezed " + td.textContent);
for (const part of document.querySelectorAll("#unreadable .scroll"))
  if (part.scrollWidth > part.clientWidth) wrong.push("wider than the screen");
for (const text of document.querySelectorAll("figure svg text")) {
  const svg = text.closest("svg"), room = getComputedStyle(svg).overflow === "visible" ? svg.closest("figure") : svg;
  if (box(text).left < box(room).left || box(text).right > box(room).right) wrong.push("clipped " + text.textContent);
}
document.title = "wrong: " + wrong.join("; ");
"""


@pytest.mark.skipif(not shutil.which("chromium"), reason="no chromium")
@pytest.mark.parametrize("width", [500, 1200])
def test_nothing_is_squeezed_or_clipped_on_a_phone_or_a_desktop(tmp_path, width):
  names = ["2021/Summer holiday/IMG-20210812-WA0001 (edited).jpg", "a.tif", f"dir/{'longfilename' * 12}.png"]
  rows = [
    dict(step=k, loss=1.5e-4 + 1e-9 * k, alignment=1.2345e-5 + 1e-9 * k, uniformity=-1.2345e-5) for k in range(50)
  ]
  text = write(tmp_path, history=rows, unreadable=[(name, "is cut off: 2,000 bytes of a JPEG") for name in names])
  page = tmp_path / "report.html"
  page.write_text(text.replace("</body>", f"<script>onload = () => {{ {LAYOUT} }};</script></body>"))
  command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
  command += [f"--window-size={width},900", "--virtual-time-budget=2000", "--dump-dom", str(page)]
  done = subprocess.run(command, capture_output=True, text=True)
  assert re.search("<title>(.*?)</title>", done.stdout)[1].strip() == "wrong:", done.stderr


def test_the_later_of_two_rows_of_a_step_counts_and_what_is_not_finite_is_counted(tmp_path):
  before = [dict(step=i, loss=9.0) for i in (1, 2, 3, 4, 6, 8, 10)]
  after = [dict(step=i, loss=float("nan") if i in (7, 8) else np.float32(2.0 + i)) for i in range(5, 13)]
  page = write(tmp_path, history=before + after)
  steps, values = curve(page, "Loss")[0]["curve"]
  np.testing.assert_allclose(steps, [1, 2, 3, 4, 5, 6, 9, 10, 11, 12], atol=0.05)
  np.testing.assert_allclose(values, [9, 9, 9, 9, 7, 8, 11, 12, 13, 14], atol=0.1)
  assert "2 not finite, left out" in page


def test_downsampling_keeps_the_ends_and_the_extremes():
  n = 100_000
  values = rng.normal(size=n)
  values[31_234], values[77_777] = 50.0, -50.0
  steps = np.arange(n) * 3.0
  x, y = charts.downsample(steps, values)
  assert len(x) == len(y) <= 400 and np.all(np.diff(x) > 0)
  assert np.array_equal(values[(x / 3).astype(int)], y)  # points that were logged, none made up
  assert x[0] == 0 and x[-1] == 3.0 * (n - 1) and y.max() == 50.0 and y.min() == -50.0
  for k in range(10):  # every tenth of the curve keeps its own lowest and highest, to within one stretch at its ends
    inside = slice(k * n // 10 + 600, (k + 1) * n // 10 - 600)
    kept = y[(x >= 3 * k * n // 10) & (x < 3 * (k + 1) * n // 10)]
    assert kept.max() >= values[inside].max() and kept.min() <= values[inside].min()
  short = np.arange(400.0)
  assert charts.downsample(short, short)[1] is short


def test_a_long_history_is_a_small_page_that_shows_its_spike(tmp_path):
  n = 100_000
  loss = 3.0 + 0.1 * rng.normal(size=n)
  loss[60_000] = 20.0
  page = write(tmp_path, history=[dict(step=i, loss=loss[i], learning_rate=i / n) for i in range(n)])
  assert len(page) < 60_000
  lines, _, tooltips, _ = curve(page, "Loss")
  steps, values = lines["pale"]
  assert len(steps) <= 400
  assert values.max() == pytest.approx(20.0, abs=0.2) and steps[values.argmax()] == pytest.approx(60_000, abs=250)
  steps, values = lines["curve"]
  for k, stretch in enumerate(np.array_split(loss, 48)):
    assert values[k] == pytest.approx(stretch.mean(), abs=0.1)
  assert sum(tooltip.endswith(" to 20") for tooltip in tooltips) == 1 and len(tooltips) == 48


@pytest.mark.parametrize("value", [0.0, 6.2383, -3.0, 1e-7, 1e6])
def test_a_constant_curve_has_distinct_ticks(tmp_path, value):
  page = write(tmp_path, history=[dict(step=i, loss=value, learning_rate=value, knn=0.1) for i in range(3)])
  for heading in ("Loss", "Learning rate", "kNN accuracy of h"):
    ticks = Page(panel(page, heading)).texts("text", "y")
    assert 3 <= len(ticks) == len(set(ticks)) <= 8
  _, values = curve(page, "Loss")[0]["curve"]
  np.testing.assert_allclose(values, value, atol=max(abs(value) * 1e-3, 0.01 if value == 0 else 0))


@pytest.mark.parametrize(
  "last, expected",
  [
    (272, [0, 50, 100, 150, 200, 250]),
    (5000, [0, 1000, 2000, 3000, 4000, 5000]),
    (2, [0, 1, 2]),
    (1, [0, 1]),
    (0, [0]),
  ],
)
def test_steps_below_a_curve_are_round(last, expected):
  assert charts._step_ticks(0, last) == expected
  assert charts._step_ticks(7, 7) == [7] and charts._step_ticks(1, 7) == [2, 4, 6]


def test_a_page_says_when_on_what_and_how_it_was_made(tmp_path, monkeypatch):
  monkeypatch.setattr(sys, "argv", ["/venv/bin/simclr", "map", "--workdir=a b"])
  page = write(tmp_path)
  footer = page.partition("<footer>")[2].partition("</footer>")[0]
  assert re.match(r"Written \d{4}-\d\d-\d\d \d\d:\d\d UTC with simclr_jax \d", footer)
  assert "by <code>simclr map &#39;--workdir=a b&#39;</code>" in footer
  monkeypatch.setattr(sys, "argv", ["/venv/bin/ipykernel_launcher.py"])
  assert "<code>" not in write(tmp_path).partition("<footer>")[2]


def test_scores_on_the_page_and_in_the_terminal_agree(tmp_path):
  scores = full_arguments(tmp_path)["scores"]
  page = Page(write(tmp_path, scores=scores))
  assert page.texts("td", "best") == ["84.6", "75.0"]  # linear has one value besides chance: nothing to be best of
  assert page.texts("td", "none") == ["–", "–"]
  assert page.texts("tr", "chance") == ["chance99.010.0–"]
  assert report.score_table(scores) == "\n".join(
    [
      "             kNN   linear   linear 10/class",
      "raw pixels  81.0     82.4              71.0",
      "h           84.6*       –              75.0*",
      "chance      99.0     10.0                 –",
    ]
  )
  tied = report.score_table([dict(representation=r, knn=0.5) for r in "ab"])
  assert tied.count("50.0*") == 2


def test_a_confusion_matrix_shows_fractions_and_hides_counts_in_hints(tmp_path):
  confusion = np.array([[8, 2, 0], [1, 999, 0], [0, 0, 0]])
  page = Page(write(tmp_path, confusion=confusion, class_names=["cat", "dog", "eel"]))
  cells = [(attrs.get("title"), attrs.get("class"), text) for attrs, text in page.all("td") if "title" in attrs]
  assert cells[:3] == [
    ("cat: 8 right", "hit", "80"),
    ("cat taken for dog: 2", "miss", "20"),
    ("cat taken for eel: 0", None, ""),
  ]
  assert cells[4] == ("dog: 999 right", "hit", "100") and cells[8] == ("eel: 0 right", None, "")
  assert "99.7 % of 1,010 images are right" in page.texts("p")[1]
  many = np.eye(50, dtype=int) * 10
  many[3, 7] = 30
  page = Page(write(tmp_path, confusion=many))
  assert page.texts("td")[-4:] == ["3", "7", "30", "75.0 %"]


def test_classes_stand_worst_first(tmp_path):
  page = Page(write(tmp_path, confusion=np.array([[8, 2, 0], [4, 6, 0], [0, 0, 0]]), class_names=["cat", "dog", "eel"]))
  rows = [text for text in page.texts("tr") if text.startswith(("cat", "dog", "eel"))][:2]
  assert rows == ["dog60.010", "cat80.010"]  # no eel was shown
  many = np.eye(50, dtype=int) * 10
  many[3, 7] = 30
  text = write(tmp_path, confusion=many)
  assert "The ten worst and the ten best of 50 classes" in text and Page(text).texts("tr")[1] == "325.040"


def test_time_and_files(tmp_path):
  page = Page(write(tmp_path, **full_arguments(tmp_path)))
  text = " ".join(page.texts("tr"))
  assert "20.0 s0.6 %" in text and "1 h 0 min99.4 %" in text
  grow = [float(re.search("flex-grow:([0-9.]+)", a["style"])[1]) for a, _ in page.all("span") if "style" in a]
  assert grow == pytest.approx([20 / 3620, 3600 / 3620], abs=1e-4)
  assert "report.htmlthis pagethe page" in text and "encoder2 kBthe encoder" in text and "none–nothing" in text


def picture(source):
  head, data = source.split(",")
  return head, np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))


def test_embedded_pictures_are_the_views(tmp_path):
  arguments = full_arguments(tmp_path)
  images = [attrs for attrs, _ in Page(write(tmp_path, views=arguments["views"])).all("img")]
  assert len(images) == 48
  for k, attrs in enumerate(images):
    head, pixels = picture(attrs["src"])
    assert head == "data:image/png;base64" and attrs["alt"] == f"image {k // 2}, view {k % 2 + 1}"
    assert np.abs(pixels - 255.0 * arguments["views"][k // 2, k % 2]).max() <= 0.51
  photo = np.tile(np.linspace(0, 1, 224)[:, None, None], (1, 2, 1, 224, 3)).reshape(1, 2, 224, 224, 3)
  head, pixels = picture(Page(write(tmp_path, views=photo)).all("img")[0][0]["src"])
  assert head == "data:image/jpeg;base64" and pixels.shape == (128, 128, 3)

  queries, neighbors, same = arguments["neighbors"]
  page = Page(write(tmp_path, neighbors=(queries, neighbors, same)))
  assert len(page.all("span", "same")) == same.sum() and len(page.all("span", "other")) == (~same).sum()
  assert f"{100 * same.mean():.1f} % of 15 neighbors agree" in page.texts("p")[0]
  _, pixels = picture(page.all("img")[1 * 6 + 3][0]["src"])  # second row, third neighbor
  assert np.abs(pixels - 255.0 * neighbors[1, 2]).max() <= 0.51


def test_pairs_stand_side_by_side_in_their_frame(tmp_path):
  views = rng.integers(0, 256, (11, 2, 28, 30, 3), np.uint8)
  report.view_pairs_png(tmp_path / "views.png", views, columns=4)
  sheet = np.asarray(Image.open(tmp_path / "views.png"))
  h, w = 84, 90  # enlarged three times
  assert sheet.shape == (14 + 3 * (h + 6 + 14), 14 + 4 * (2 * w + 9 + 14), 3)
  covered = np.zeros(sheet.shape[:2], bool)
  for i in range(11):
    x, y = 17 + i % 4 * (2 * w + 23), 17 + i // 4 * (h + 20)
    for v in range(2):
      left = x + v * (w + 3)
      block = sheet[y : y + h, left : left + w]
      assert np.array_equal(block[::3, ::3], views[i, v]) and np.array_equal(block[2::3, 1::3], views[i, v])
    frame = sheet[y - 3 : y + h + 3, x - 3 : x + 2 * w + 6].copy()
    frame[3:-3, 3 : 3 + w] = frame[3:-3, 6 + w : 6 + 2 * w] = pictures.INK
    assert np.all(frame == pictures.INK)
    covered[y - 3 : y + h + 3, x - 3 : x + 2 * w + 6] = True
  assert np.all(sheet[~covered] == pictures.PAPER)

  report.view_pairs_png(tmp_path / "float.png", views / np.float32(255), columns=4)
  assert np.array_equal(np.asarray(Image.open(tmp_path / "float.png")), sheet)
  report.view_pairs_png(tmp_path / "few.png", views[:2], zoom=1)
  assert Image.open(tmp_path / "few.png").size == (14 + 2 * (2 * 30 + 23), 14 + 28 + 20)


def test_neighbors_are_framed_by_their_label(tmp_path):
  queries = rng.random((2, 40, 40, 3))
  neighbors = rng.integers(0, 256, (2, 3, 40, 40, 3), np.uint8)
  same = np.array([[True, False, True], [False, False, True]])
  report.neighbors_png(tmp_path / "n.png", queries, neighbors, same)
  sheet = np.asarray(Image.open(tmp_path / "n.png")).astype(int)
  size = 120  # three times 40
  assert sheet.shape == (14 + 2 * (size + 20), 14 + 4 * (size + 20) + 14, 3)
  for i in range(2):
    y = 17 + i * (size + 20)
    assert np.abs(sheet[y : y + size : 3, 17 : 17 + size : 3] - 255 * queries[i]).max() <= 0.51
    assert tuple(sheet[y, 14]) == pictures.INK
    for j in range(3):
      x = 31 + (j + 1) * (size + 20)
      assert np.array_equal(sheet[y : y + size : 3, x : x + size : 3], neighbors[i, j])
      red, green, _ = sheet[y + 50, x - 1]
      assert (green > red) == same[i, j] and np.array_equal(sheet[y - 3, x - 3], sheet[y + size + 2, x + size + 2])
  report.neighbors_png(tmp_path / "plain.png", queries, neighbors)
  assert tuple(np.asarray(Image.open(tmp_path / "plain.png"))[17, 14 + 154]) == pictures.INK


@pytest.mark.parametrize(
  "call, words",
  [
    (lambda p: report.view_pairs_png(p, np.zeros((4, 28, 28, 3))), r"\[4, 28, 28, 3\].*\[n, 2, h, w, 3\]"),
    (lambda p: report.view_pairs_png(p, np.zeros((0, 2, 28, 28, 3))), "pass pairs"),
    (lambda p: report.neighbors_png(p, np.zeros((2, 8, 8, 3)), np.zeros((3, 4, 8, 8, 3))), "don't fit"),
    (
      lambda p: report.neighbors_png(p, np.zeros((2, 8, 8, 3)), np.zeros((2, 4, 8, 8, 3)), [True]),
      r"same_label.*\[2, 4\]",
    ),
    (lambda p: report.write_report(p, **EMPTY, confusion=np.zeros((2, 3))), r"\[2, 3\]"),
    (lambda p: report.write_report(p, **EMPTY, confusion=np.eye(2), class_names=["a"]), "1 class names"),
    (lambda p: report.write_report(p, **EMPTY, views=np.zeros((1, 3, 8, 8, 3))), r"\[1, 3, 8, 8, 3\]"),
  ],
)
def test_a_wrong_shape_is_named_in_one_line_and_writes_nothing(tmp_path, call, words):
  with pytest.raises(ValueError, match=words) as error:
    call(tmp_path / "out")
  assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


def test_a_reader_of_the_old_page_never_sees_half_of_the_new(tmp_path):
  old = write(tmp_path, title="old")
  with open(tmp_path / "report.html") as reader:
    start = reader.read(100)
    write(tmp_path, title="new" * 10_000)
    assert start + reader.read() == old


def test_a_failed_write_leaves_the_old_page(tmp_path):
  old = write(tmp_path, title="old")
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))  # as if the disk were full
  try:
    with pytest.raises(OSError):
      report.write_report(tmp_path / "report.html", title="new", summary="")
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
  assert (tmp_path / "report.html").read_text() == old
  assert [file.name for file in tmp_path.iterdir()] == ["report.html"]
