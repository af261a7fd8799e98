(() => {
  const root = document.getElementById("map-of-images"), stage = root.querySelector(".stage");
  const canvas = stage.querySelector("canvas"), card = root.querySelector(".card"), sheet = root.querySelector("img");
  const data = JSON.parse(document.getElementById("map-data").textContent);
  const { side, columns, names, labels, classes, colors, views } = data;
  const pen = canvas.getContext("2d"), n = names.length;
  let view = 0, pictures = !labels, only = -1, zoom = 1, cx = 0.5, cy = 0.5, size = 0, hovered = -1, grip = null;

  const margin = 24;
  const place = (i) => [
    size / 2 + (views[view][2 * i] / 1e4 - cx) * zoom * (size - 2 * margin),
    size / 2 + (views[view][2 * i + 1] / 1e4 - cy) * zoom * (size - 2 * margin),
  ];
  const shown = (i) => only < 0 || labels[i] === only;
  const stamp = (to, i, x, y, w) =>
    to.drawImage(sheet, (i % columns) * side, Math.floor(i / columns) * side, side, side, x, y, w, w);

  function draw() {
    size = stage.clientWidth;
    const ratio = window.devicePixelRatio || 1;
    canvas.width = canvas.height = Math.round(size * ratio);
    pen.setTransform(ratio, 0, 0, ratio, 0, 0);
    const picture = Math.max(18, Math.min(56, size / Math.sqrt(n) * 0.9 * Math.sqrt(zoom)));
    const radius = Math.max(1.6, Math.min(5, 110 / Math.sqrt(n))) * Math.sqrt(zoom) * (size < 500 ? 0.8 : 1);
    const taken = new Set();
    for (let k = 0; k < n; k++) {
      const i = labels ? (k * 7919) % n : k;  // mixed, or the last class would cover the others
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
        pen.beginPath(); pen.arc(x, y, radius, 0, 7); pen.fill();
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
  }

  function point(event) {
    const box = canvas.getBoundingClientRect(), px = event.clientX - box.left, py = event.clientY - box.top;
    if (grip && event.buttons) {
      cx = grip[2] - (px - grip[0]) / zoom / (size - 2 * margin);
      cy = grip[3] - (py - grip[1]) / zoom / (size - 2 * margin);
      card.hidden = true;
      return draw();
    }
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

  canvas.addEventListener("pointermove", point);
  canvas.addEventListener("pointerdown", (event) => {
    const box = canvas.getBoundingClientRect();
    grip = event.pointerType === "mouse" ? [event.clientX - box.left, event.clientY - box.top, cx, cy] : null;
    if (!grip) point(event);
  });
  canvas.addEventListener("pointerup", () => { grip = null; });
  canvas.addEventListener("pointerleave", () => { hovered = -1; grip = null; card.hidden = true; draw(); });
  root.addEventListener("click", (event) => {
    const b = event.target.closest("button");
    if (!b) return;
    if (b.dataset.view) { view = +b.dataset.view; zoom = 1; cx = cy = 0.5; }
    if (b.dataset.zoom) { zoom = Math.max(1, Math.min(40, zoom * b.dataset.zoom)); if (zoom === 1) cx = cy = 0.5; }
    if (b.dataset.pictures) pictures = !pictures;
    if (b.dataset.class) only = only === +b.dataset.class ? -1 : +b.dataset.class;
    card.hidden = true;
    draw();
  });
  new ResizeObserver(draw).observe(stage);
  sheet.complete ? draw() : sheet.addEventListener("load", draw);
})();
