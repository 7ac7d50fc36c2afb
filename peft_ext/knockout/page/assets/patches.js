"use strict";
// The picture with a mark on each patch, whose size says how much: filled for attention or a loss, hollow for a gain.

function expand(ranges) {
  return ranges.flatMap(([first, last]) => Array.from({ length: last - first + 1 }, (_, at) => first + at));
}

function halves(text) {
  const bytes = Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
  const view = new DataView(bytes.buffer),
    found = new Float32Array(bytes.length / 2);
  for (let at = 0; at < found.length; at++) {
    const bits = view.getUint16(2 * at, true),
      exponent = (bits >> 10) & 31,
      fraction = bits & 1023;
    const size = exponent ? 2 ** (exponent - 15) * (1 + fraction / 1024) : fraction * 2 ** -24;
    found[at] = bits >> 15 ? -size : size;
  }
  return found;
}

// What marks may show: {key, label, value(position, layer), largest, signed, text(value)}.
function quantities(run) {
  const found = [];
  if (run.attention) {
    const values = halves(run.attention.values),
      tokens = run.attention.tokens;
    const last = values.length / tokens - 1;
    const at = (position, layer) => values[Math.min(layer, last) * tokens + position];
    let largest = 0;
    for (let layer = 0; layer <= last; layer++)
      for (const position of run.positions) largest = Math.max(largest, at(position, layer));
    found.push({
      key: "attention",
      label: "attention of the token that decides the answer",
      value: at,
      largest: largest || 1,
      signed: false,
      text: (value) => number(100 * value, 3) + " % of the attention",
    });
  }
  for (const target of [...new Set((run.effects || []).map((effects) => effects.target))]) {
    const places = new Map();
    let largest = 1;
    for (const effects of run.effects.filter((one) => one.target === target)) {
      const change = halves(effects.change),
        count = effects.units.length;
      for (const value of change) largest = Math.max(largest, Math.abs(value));
      effects.units.forEach((ranges, unit) => {
        for (const position of expand(ranges))
          places.set(position, (layer) => {
            const column = effects.layers.length ? effects.layers.indexOf(layer) : 0;
            return column < 0 ? null : change[column * count + unit];
          });
      });
    }
    const whole = run.effects.some((effects) => effects.target === target && !effects.layers.length);
    found.push({
      key: "hidden:" + target,
      label: `change of the answer when hidden from ${target}${whole ? ", in all layers" : ""}`,
      value: (position, layer) => (places.has(position) ? places.get(position)(layer) : null),
      largest,
      signed: true,
      text: (value) => "answer " + percent(value) + " when hidden from " + target,
    });
  }
  return found;
}

function patchMap(run, image) {
  if (!run.patches.length) return null;
  const known = run.places.length === run.patches.length && image;
  const side = Math.ceil(Math.sqrt(run.patches.length));
  const width = known ? image.width : 10 * side,
    height = known ? image.height : 10 * Math.ceil(run.patches.length / side);
  const svg = shape("svg", {
    viewBox: `0 0 ${width} ${height}`,
    tabindex: "0",
    role: "application",
    "aria-roledescription": "picture of patches",
    "aria-label": "Patches of the image; arrow keys go from patch to patch",
  });
  if (known) svg.append(shape("image", { href: image.src, width, height, preserveAspectRatio: "none" }));
  const related = new Set(run.groups.related_patches ? expand(run.groups.related_patches) : []);
  const patches = run.patches
    .map((position, at) => {
      const place = known
        ? run.places[at]
        : [
            (at % side) / side,
            (Math.floor(at / side) * 10) / height,
            ((at % side) + 1) / side,
            ((Math.floor(at / side) + 1) * 10) / height,
          ].map((part) => part * 1e4);
      return (
        place && {
          at,
          position,
          left: (place[0] * width) / 1e4,
          top: (place[1] * height) / 1e4,
          right: (place[2] * width) / 1e4,
          bottom: (place[3] * height) / 1e4,
        }
      );
    })
    .filter(Boolean);
  // Large patches first: those of tiles lie over those of the whole image.
  patches.sort(
    (a, b) => (b.right - b.left) * (b.bottom - b.top) - (a.right - a.left) * (a.bottom - a.top) || a.at - b.at,
  );
  const readout = element("output", { class: "readout", "aria-live": "polite" });
  let chosen = null,
    shown = null,
    layer = 0;
  const say = () => {
    const parts =
      chosen &&
      run.quantities
        .map((one) => [one, one.value(chosen.position, layer)])
        .filter(([, value]) => value !== null && value !== undefined);
    const groups =
      chosen && Object.keys(run.groups).filter((name) => name !== "image" && run.members[name].has(chosen.position));
    const named = chosen && groups.length ? ` (${groups.join(", ")})` : "";
    readout.textContent = chosen
      ? `Patch ${chosen.at}${named}: ${parts.map(([one, value]) => one.text(value)).join("; ")}`
      : "Point at a patch, or go to one with the arrow keys.";
  };
  const choose = (patch) => {
    if (chosen) chosen.hit.classList.remove("chosen");
    chosen = patch;
    chosen.hit.classList.add("chosen");
    say();
  };
  for (const patch of patches) {
    patch.mark = shape("rect", { class: "mark" });
    patch.hit = shape("rect", {
      class: related.has(patch.position) ? "hit related" : "hit",
      x: patch.left,
      y: patch.top,
      width: patch.right - patch.left,
      height: patch.bottom - patch.top,
      "data-patch": patch.at,
      onpointerenter: () => choose(patch),
      onclick: () => choose(patch),
    });
    svg.append(patch.mark, patch.hit);
  }
  const directions = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
  svg.addEventListener("keydown", (event) => {
    if (!directions[event.key] || !patches.length) return;
    event.preventDefault();
    event.stopPropagation();
    if (!chosen) return choose(patches.reduce((a, b) => (b.at < a.at ? b : a)));
    const [right, down] = directions[event.key],
      middle = (p) => [(p.left + p.right) / 2, (p.top + p.bottom) / 2];
    const [x, y] = middle(chosen),
      size = chosen.right - chosen.left;
    let best = null,
      nearest = Infinity;
    for (const patch of patches) {
      const [px, py] = middle(patch),
        along = (px - x) * right + (py - y) * down,
        across = Math.abs((px - x) * down) + Math.abs((py - y) * right);
      if (along > size * 0.3 && Math.abs(patch.right - patch.left - size) < size / 2 && along + 3 * across < nearest)
        [best, nearest] = [patch, along + 3 * across];
    }
    if (best) choose(best);
  });
  const key = element("p", { class: "quiet" });
  const most = element("p", { class: "quiet most" });
  // What would read 0.0 % is the noise of single precision.
  const hidden = (value) => shown.signed && Math.abs(value) < 0.05;
  const move = (now) => {
    layer = now;
    const found = [];
    for (const patch of patches) {
      const value = shown ? shown.value(patch.position, layer) : null;
      const share = value && !hidden(value) ? Math.sqrt(Math.min(Math.abs(value) / shown.largest, 1)) : 0;
      const wide = (patch.right - patch.left) * share * 0.9,
        tall = (patch.bottom - patch.top) * share * 0.9;
      patch.mark.setAttribute(
        "class",
        "mark " + (!shown || !shown.signed ? "attention" : value < 0 ? "loss" : "gain"),
      );
      for (const [name, size] of Object.entries({
        x: (patch.left + patch.right - wide) / 2,
        y: (patch.top + patch.bottom - tall) / 2,
        width: wide,
        height: tall,
      }))
        patch.mark.setAttribute(name, size.toFixed(2));
      if (value && !hidden(value)) found.push([value, patch.at]);
    }
    found.sort((a, b) => Math.abs(b[0]) - Math.abs(a[0]));
    most.textContent = found.length
      ? `${shown.signed ? "Largest changes" : "Most attention"}: ` +
        found
          .slice(0, 5)
          .map(([value, at]) => `patch ${at} (${shown.signed ? percent(value) : number(100 * value, 2) + " %"})`)
          .join(", ")
      : "";
    say();
  };
  return {
    element: element(
      "figure",
      { class: image && image.width < 200 ? "picture small" : "picture" },
      element(
        "figcaption",
        {},
        `${run.patches.length} patches${known ? "" : " in order; their places in the image are not known"}`,
      ),
      svg,
      readout,
      most,
      key,
    ),
    move,
    show: (quantity) => {
      shown = quantity || null;
      const scale = shown && (shown.signed ? `± ${number(shown.largest)} %` : `${number(100 * shown.largest, 2)} %`);
      const signs = shown && shown.signed ? "; filled for a loss, hollow for a gain" : "";
      const dashed = related.size ? " Dashed: related patches." : "";
      key.textContent = shown
        ? `A mark that fills its patch: ${scale}${signs}; its area is in proportion.${dashed}`
        : "";
      move(layer);
    },
  };
}
