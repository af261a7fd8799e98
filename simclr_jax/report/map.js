(() => {
  const root = document.getElementById("map-of-images"), stage = root.querySelector(".stage");
  const canvas = stage.querySelector("canvas"), card = root.querySelector(".card"), sheet = root.querySelector("img");
  const data = JSON.parse(document.getElementById("map-data").textContent);
  const { side, columns, names, labels, classes, colors, shapes, views } = data;
  const pen = canvas.getContext("2d"), n = names.length, fingers = new Map();
  let view = 0, pictures = !labels, only = -1, zoom = 1, cx = 0.5, cy = 0.5, size = 0, hovered = -1, moved = 0;

  const divisor = (a, b) => (b ? divisor(b, a % b) : a);
  let stride = Math.ceil(0.618 * n);
  while (divisor(stride, n) > 1) stride++;  // else its multiples would not be all numbers below n

  const margin = 24;
  const scale = () => zoom * (size - 2 * margin);
  const place = (i) => [
    size / 2 + (views[view][2 * i] / 1e4 - cx) * scale(), size / 2 + (views[view][2 * i + 1] / 1e4 - cy) * scale(),
  ];
  const shown = (i) => only < 0 || labels[i] === only;
  const stamp = (to, i, x, y, w) =>
    to.drawImage(sheet, (i % columns) * side, Math.floor(i / columns) * side, side, side, x, y, w, w);

  function mark(x, y, radius, corners) {
    pen.beginPath();
    if (!corners.length) pen.arc(x, y, radius, 0, 7);
    for (const [dx, dy] of corners) pen.lineTo(x + radius * dx, y + radius * dy);
    pen.closePath();
  }

  function draw() {
    size = stage.clientWidth;
    const ratio = window.devicePixelRatio || 1;
    canvas.width = canvas.height = Math.round(size * ratio);
    pen.setTransform(ratio, 0, 0, ratio, 0, 0);
    const picture = Math.max(18, Math.min(56, size / Math.sqrt(n) * 0.9 * Math.sqrt(zoom)));
    const radius = Math.max(1.6, Math.min(5, 110 / Math.sqrt(n))) * Math.sqrt(zoom) * (size < 500 ? 0.8 : 1);
    const taken = new Set();
    for (let k = 0; k < n; k++) {
      const i = labels ? (k * stride) % n : k;  // mixed, or the last class would cover the others
      const [x, y] = place(i);
      if (x < -40 || y < -40 || x > size + 40 || y > size + 40) continue;
      pen.globalAlpha = shown(i) ? 0.85 : 0.08;
      pen.fillStyle = labels ? (labels[i] < 0 ? "#9aa2aa" : colors[labels[i]]) : colors[0];
      if (pictures && shown(i)) {
        const cell = Math.floor(x / picture) + "," + Math.floor(y / picture);
        if (taken.has(cell)) continue;
        taken.add(cell);
        pen.globalAlpha = 1;
        if (labels) pen.fillRect(x - picture / 2, y - picture / 2, picture - 1, picture - 1);
        const edge = labels ? 2 : 0;
        stamp(pen, i, x - picture / 2 + edge, y - picture / 2 + edge, picture - 2 - 2 * edge + (labels ? 1 : 0));
      } else {
        mark(x, y, radius, labels && labels[i] >= 0 ? shapes[labels[i]] : []);
        pen.fill();
      }
    }
    pen.globalAlpha = 1;
    if (hovered >= 0) {
      const [x, y] = place(hovered);
      pen.strokeStyle = getComputedStyle(root).color; pen.lineWidth = 2;
      pen.beginPath(); pen.arc(x, y, radius + 4, 0, 7); pen.stroke();
    }
    for (const b of root.querySelectorAll("[data-view]")) b.classList.toggle("on", +b.dataset.view === view);
    for (const b of root.querySelectorAll("[data-class]")) b.classList.toggle("on", +b.dataset.class === only);
    root.querySelector("[data-pictures]").classList.toggle("on", pictures);
    // Until it is zoomed in, a finger that moves up or down scrolls the page.
    canvas.style.touchAction = zoom > 1 ? "none" : "pan-y";
    root.dataset.at = [zoom, cx, cy].map((x) => x.toFixed(3)).join(" ");
  }

  function zoomBy(factor, px, py) {  // what is at (px, py) stays there
    const ux = cx + (px - size / 2) / scale(), uy = cy + (py - size / 2) / scale();
    zoom = Math.max(1, Math.min(40, zoom * factor));
    [cx, cy] = zoom === 1 ? [0.5, 0.5] : [ux - (px - size / 2) / scale(), uy - (py - size / 2) / scale()];
    hide();
  }

  function hide() { hovered = -1; card.hidden = true; draw(); }

  function point(px, py) {
    let best = -1, least = 22 * 22;
    for (let i = 0; i < n; i++) {
      if (!shown(i)) continue;
      const [x, y] = place(i), d = (x - px) ** 2 + (y - py) ** 2;
      if (d < least) { least = d; best = i; }
    }
    if (best === hovered) return;
    hovered = best;
    draw();
    card.hidden = best < 0;
    if (best < 0) return;
    const inner = card.querySelector("canvas").getContext("2d"), [x, y] = place(best);
    inner.imageSmoothingEnabled = side >= 48;
    stamp(inner, best, 0, 0, 192);
    card.querySelector("b").textContent = labels && labels[best] >= 0 ? classes[labels[best]] : "";
    card.querySelector("span").textContent = names[best].split("/").slice(-2).join("/");
    card.style.left = Math.max(0, Math.min(size - 124, x < size / 2 ? x + 14 : x - 138)) + "px";
    card.style.top = Math.max(0, Math.min(size - 176, y - 80)) + "px";
  }

  const where = (event) => {
    const box = canvas.getBoundingClientRect();
    return [event.clientX - box.left, event.clientY - box.top];
  };

  canvas.addEventListener("pointerdown", (event) => {
    fingers.set(event.pointerId, where(event));
    if (fingers.size === 1) moved = 0;
  });
  canvas.addEventListener("pointermove", (event) => {
    const now = where(event), before = fingers.get(event.pointerId);
    if (!before) return point(...now);
    fingers.set(event.pointerId, now);
    moved += Math.hypot(now[0] - before[0], now[1] - before[1]);
    if (fingers.size === 2) {
      const [other] = [...fingers].filter(([id]) => id !== event.pointerId).map(([, at]) => at);
      const apart = (at) => Math.hypot(at[0] - other[0], at[1] - other[1]);
      zoomBy(apart(now) / Math.max(apart(before), 1), (now[0] + other[0]) / 2, (now[1] + other[1]) / 2);
    } else if (moved > 6 && (zoom > 1 || event.pointerType === "mouse")) {
      cx -= (now[0] - before[0]) / scale();
      cy -= (now[1] - before[1]) / scale();
      hide();
    }
  });
  canvas.addEventListener("pointerup", (event) => {
    if (fingers.delete(event.pointerId) && !fingers.size && moved <= 6) point(...where(event));
  });
  canvas.addEventListener("pointercancel", (event) => fingers.delete(event.pointerId));
  canvas.addEventListener("pointerleave", (event) => {
    fingers.delete(event.pointerId);
    if (event.pointerType === "mouse") hide();  // a finger that was lifted leaves its card
  });
  canvas.addEventListener("wheel", (event) => {
    if (zoom === 1 && event.deltaY > 0) return;  // the page scrolls on
    event.preventDefault();
    zoomBy(Math.exp(-event.deltaY * (event.deltaMode ? 0.05 : 0.002)), ...where(event));
  }, { passive: false });
  root.addEventListener("click", (event) => {
    const b = event.target.closest("button");
    if (!b) return;
    if (b.dataset.view) { view = +b.dataset.view; zoom = 1; cx = cy = 0.5; }
    if (b.dataset.zoom) zoomBy(+b.dataset.zoom, size / 2, size / 2);
    if (b.dataset.pictures) pictures = !pictures;
    if (b.dataset.class) only = only === +b.dataset.class ? -1 : +b.dataset.class;
    hide();
  });
  new ResizeObserver(draw).observe(stage);
  sheet.complete ? draw() : sheet.addEventListener("load", draw);
})();
