"use strict";
// Figures as SVG. Each answers with its element and with move(layer), which shows another layer.

function element(name, attributes = {}, ...children) {
  return fill(document.createElement(name), attributes, children);
}

function shape(name, attributes = {}, ...children) {
  return fill(document.createElementNS("http://www.w3.org/2000/svg", name), attributes, children);
}

function fill(made, attributes, children) {
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) made.setAttribute(key, value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

function number(value, digits = 1) {
  if (value === null || value === undefined) return "–";
  const text = value.toFixed(digits);
  return text.replace(/^-(?=0(\.0*)?$)/, "").replace("-", "−");
}

const percent = (value) => (value === null || value === undefined ? "–" : number(value) + " %");
const probability = (value) => number(value, 3);

const WIDTH = 640,
  HEIGHT = 250,
  LEFT = 58,
  RIGHT = 14,
  TOP = 10,
  BOTTOM = 38;
const DASHES = ["none", "8 4", "2 3", "10 3 2 3", "5 2", "1 4", "12 4", "6 2 2 2"];
const MARKERS = [
  "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0z",
  "M-4-4h8v8h-8z",
  "M0-5l5 9h-10z",
  "M0-5l5 5l-5 5l-5-5z",
  "M0 5l5-9h-10z",
  "M-4-4l8 8M4-4l-8 8",
  "M-5 0h10M0-5v10",
  "M-5 0h10",
];

function stroke(style) {
  return { stroke: `var(--c${style.colour % 8})`, "stroke-dasharray": DASHES[style.dash % 8] };
}

function marker(style, x, y) {
  const colour = `var(--c${style.colour % 8})`;
  return shape("path", {
    d: MARKERS[style.colour % 8],
    fill: colour,
    stroke: colour,
    transform: `translate(${x} ${y})`,
  });
}

function swatch(style) {
  return shape(
    "svg",
    { class: "swatch", viewBox: "0 0 48 16", "aria-hidden": "true" },
    shape("path", { class: "curve", d: "M2 8h44", ...stroke(style) }),
    marker(style, 24, 8),
  );
}

function ticks(low, high, count = 5) {
  const raw = (high - low) / count || 1,
    power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((size) => size >= raw);
  const found = [];
  for (let at = Math.ceil(low / step - 1e-9); at * step <= high + step * 1e-9; at++) found.push(at * step);
  return { found, digits: Math.max(0, -Math.floor(Math.log10(step) + 1e-9)) };
}

// curves: [{name, layers, mean, low, high, style}]; choose(layer) is called when the chart is clicked.
function lineChart({ title, unit, curves, range, choose }) {
  const layers = [...new Set(curves.flatMap((curve) => curve.layers))].sort((a, b) => a - b);
  const values = curves
    .flatMap((curve) => [...curve.mean, ...(curve.low || []), ...(curve.high || [])])
    .filter((v) => v !== null);
  let low = Math.min(...(range || values), 0),
    high = Math.max(...(range || values), 0);
  if (!range) [low, high] = [low - (high - low) * 0.05, high + (high - low) * 0.05];
  if (high - low < 1e-9) [low, high] = [low - 1, high + 1];
  const first = layers[0],
    span = Math.max(layers[layers.length - 1] - first, 1);
  const x = (layer) => LEFT + ((layer - first) / span) * (WIDTH - LEFT - RIGHT);
  const y = (value) => TOP + ((high - value) / (high - low)) * (HEIGHT - TOP - BOTTOM);
  const drawn = `${curves.length} curve${curves.length > 1 ? "s" : ""} over layers ${first} to ${first + span}`;
  const svg = shape("svg", {
    viewBox: `0 0 ${WIDTH} ${HEIGHT}`,
    role: "img",
    "aria-label": `${title}: ${drawn}; tables hold the numbers`,
  });
  const marks = ticks(low, high);
  for (const value of marks.found) {
    svg.append(
      shape("path", { class: Math.abs(value) < 1e-12 ? "zero" : "axis", d: `M${LEFT} ${y(value)}H${WIDTH - RIGHT}` }),
      shape("text", { x: LEFT - 6, y: y(value) + 4, "text-anchor": "end" }, number(value, marks.digits)),
    );
  }
  const every = Math.ceil(layers.length / 16);
  layers.forEach((layer, at) => {
    if (at % every === 0)
      svg.append(
        shape("text", { x: x(layer), y: HEIGHT - 22, "text-anchor": "middle" }, layer < 0 ? "in" : String(layer)),
      );
  });
  svg.append(
    shape(
      "text",
      { x: (LEFT + WIDTH - RIGHT) / 2, y: HEIGHT - 5, "text-anchor": "middle" },
      `layer${unit ? " · vertical: " + unit : ""}`,
    ),
  );
  const path = (values, layers) =>
    values
      .map((value, at) =>
        value === null
          ? ""
          : `${at && values[at - 1] !== null ? "L" : "M"}${x(layers[at]).toFixed(1)} ${y(value).toFixed(1)}`,
      )
      .join("");
  for (const curve of curves) {
    if (curve.low && curve.samples > 1) {
      const back = [...curve.layers].reverse();
      svg.append(
        shape("path", {
          class: "band",
          fill: `var(--c${curve.style.colour % 8})`,
          d: path(curve.high, curve.layers) + path([...curve.low].reverse(), back).replace("M", "L") + "z",
        }),
      );
    }
  }
  for (const curve of curves) {
    svg.append(
      shape("path", {
        class: "curve",
        "data-curve": curve.name,
        d: path(curve.mean, curve.layers),
        ...stroke(curve.style),
      }),
    );
    curve.mean.forEach(
      (value, at) =>
        value !== null && at % every === 0 && svg.append(marker(curve.style, x(curve.layers[at]), y(value))),
    );
  }
  const cursor = shape("path", { class: "cursor" });
  svg.append(cursor);
  svg.addEventListener("click", (event) => {
    const box = svg.getBoundingClientRect();
    const at = first + ((((event.clientX - box.left) / box.width) * WIDTH - LEFT) / (WIDTH - LEFT - RIGHT)) * span;
    choose(Math.round(Math.min(Math.max(at, 0), first + span)));
  });
  return {
    element: element("figure", {}, element("figcaption", {}, title), svg),
    move: (layer) => cursor.setAttribute("d", `M${x(Math.min(layer, first + span))} ${TOP}V${HEIGHT - BOTTOM}`),
  };
}

function barChart({ title, values, choose }) {
  const found = values.filter((value) => value !== null),
    high = Math.max(...found, 0) || 1;
  const step = (WIDTH - LEFT - RIGHT) / values.length;
  const y = (value) => TOP + (1 - value / high) * (HEIGHT - TOP - BOTTOM);
  const svg = shape("svg", {
    viewBox: `0 0 ${WIDTH} ${HEIGHT}`,
    role: "img",
    "aria-label": `${title}: one bar per layer`,
  });
  const marks = ticks(0, high);
  for (const value of marks.found) {
    svg.append(
      shape("path", { class: "axis", d: `M${LEFT} ${y(value)}H${WIDTH - RIGHT}` }),
      shape("text", { x: LEFT - 6, y: y(value) + 4, "text-anchor": "end" }, number(value, marks.digits)),
    );
  }
  const bars = values.map((value, layer) => {
    const bar = shape("rect", {
      class: "bar",
      x: LEFT + layer * step + step * 0.15,
      width: step * 0.7,
      y: y(value || 0),
      height: y(0) - y(value || 0),
      onclick: () => choose(layer),
    });
    if (layer % Math.ceil(values.length / 16) === 0)
      svg.append(
        shape("text", { x: LEFT + (layer + 0.5) * step, y: HEIGHT - 22, "text-anchor": "middle" }, String(layer)),
      );
    svg.append(bar);
    return bar;
  });
  svg.append(shape("text", { x: (LEFT + WIDTH - RIGHT) / 2, y: HEIGHT - 5, "text-anchor": "middle" }, "layer"));
  const shown = element("p", { class: "quiet lmar" });
  return {
    element: element("figure", {}, element("figcaption", {}, title), svg, shown),
    move: (layer) => {
      bars.forEach((bar, at) => bar.classList.toggle("now", at === layer));
      shown.textContent = `Layer ${layer}: ${number(values[layer], 3)}`;
    },
  };
}
