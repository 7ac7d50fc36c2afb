"use strict";
// The curves' numbers at one layer: a row per blocked pair and run, and what changed between two runs.

function valueAt(curve, key, layer) {
  const value = curve && curve[key][curve.layers.indexOf(layer)];
  return value === undefined ? null : value;
}

function intervalAt(curve, layer) {
  if (curve.samples < 2) return "–";
  return `${number(valueAt(curve, "low", layer))} to ${number(valueAt(curve, "high", layer))}`;
}

function table(name, caption, titles, rows) {
  const head = titles.map((text) => element("th", { scope: "col" }, text));
  return element(
    "table",
    { class: name },
    element("caption", { class: "quiet" }, caption),
    element("thead", {}, element("tr", {}, ...head)),
    element("tbody", {}, ...rows),
  );
}

const arrow = (pair) => pair.replace(":", " → ");
const cell = (name) => element("td", { class: "number " + name });

// curves: [{pair, run, layers, mean, low, high, samples, style}]; own(curve) finds the chosen sample's curve.
function pairTable(curves, differences, runs, own) {
  const several = runs.length > 1;
  const rows = curves.map((curve) => {
    const bar = shape("rect", { x: 0, y: 3, height: 10, class: "bar now" });
    const frame = { class: "swatch", viewBox: "0 0 100 16", preserveAspectRatio: "none", "aria-hidden": "true" };
    return { curve, bar, chart: shape("svg", frame, bar), cells: ["mean", "interval", "own"].map(cell) };
  });
  const lines = rows.map(({ curve, chart, cells }) =>
    element(
      "tr",
      { "data-pair": curve.pair, "data-run": curve.run },
      element("td", {}, swatch(curve.style)),
      element("th", { scope: "row" }, arrow(curve.pair)),
      several ? element("td", {}, curve.run) : null,
      element("td", {}, chart),
      ...cells,
    ),
  );
  const titles = ["", "blocked", ...(several ? ["run"] : []), "", "mean", "95 % interval", "this sample"];
  const pairs = table("pairs", "", titles, lines);
  const box = element("div", { class: "tables" }, pairs);
  const changes = differences.map((curve) => ({ curve, cells: ["difference", "interval"].map(cell) }));
  if (changes.length) {
    const titles = ["blocked", `${runs[1]} − ${runs[0]}, percentage points`, "95 % interval"];
    const lines = changes.map(({ curve, cells }) =>
      element("tr", { "data-pair": curve.pair }, element("th", { scope: "row" }, arrow(curve.pair)), ...cells),
    );
    box.append(table("differences", "What changed, sample by sample", titles, lines));
  }
  const move = (layer) => {
    pairs.caption.textContent = `Change of the answer's probability at layer ${layer}`;
    for (const { curve, bar, cells } of rows) {
      const mean = valueAt(curve, "mean", layer);
      cells[0].textContent = percent(mean);
      cells[1].textContent = intervalAt(curve, layer);
      cells[2].textContent = percent(valueAt(own(curve), "mean", layer));
      bar.setAttribute("width", Math.min(Math.abs(mean || 0), 100));
      bar.style.fill = mean < 0 ? "var(--loss)" : "var(--gain)";
    }
    for (const { curve, cells } of changes) {
      cells[0].textContent = number(valueAt(curve, "mean", layer));
      cells[1].textContent = intervalAt(curve, layer);
    }
  };
  return { element: box, move };
}
