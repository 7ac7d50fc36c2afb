"use strict";
// The prompt's tokens, underlined by group, and the words that each layer would say.

// The narrowest group names a token; these are the widest.
const WIDE = ["text", "image"];

function promptView(run) {
  const names = Object.keys(run.groups).filter(
    (name) => !WIDE.includes(name) && !name.endsWith("patches") && name !== "newline" && run.members[name].size,
  );
  names.sort((a, b) => run.members[a].size - run.members[b].size);
  const style = new Map(names.map((name, at) => [name, at]));
  const used = new Set();
  const spans = [];
  let position = 0,
    shown = null,
    layer = 0;
  const readout = element("output", { class: "readout", "aria-live": "polite" });
  let chosen = null;
  const say = () => {
    if (!chosen) return void (readout.textContent = "Point at a token.");
    const groups = names.filter((name) => run.members[name].has(chosen.positions[0]));
    const parts = run.quantities
      .map((one) => [one, sum(one, chosen.positions)])
      .filter(([, value]) => value !== null)
      .map(([one, value]) => one.text(value));
    readout.textContent = `“${chosen.text}” (${groups.join(", ") || "no group"}): ${parts.join("; ") || "not measured"}`;
  };
  const sum = (quantity, positions) => {
    const values = positions
      .map((at) => quantity.value(at, layer))
      .filter((value) => value !== null && value !== undefined);
    return !values.length ? null : quantity.signed ? values[0] : values.reduce((a, b) => a + b, 0);
  };
  const body = element("p", { class: "prompt", dir: "auto" });
  for (const [text, at] of run.pieces) {
    if (!text) {
      body.append(element("span", { class: "chip" }, `image: ${at} tokens`));
      continue;
    }
    const group = names.find((name) => run.members[name].has(at[0]));
    if (group) used.add(group);
    const piece = { text, positions: at };
    piece.span = element(
      "span",
      {
        class: "piece" + (group ? " u" + (style.get(group) % 8) : ""),
        "data-positions": at.join(" "),
        onpointerenter: () => {
          chosen = piece;
          say();
        },
      },
      text,
    );
    spans.push(piece);
    body.append(piece.span);
  }
  const legend = element(
    "ul",
    { class: "legend", "aria-label": "Groups of tokens" },
    ...names
      .filter((name) => used.has(name))
      .map((name) =>
        element(
          "li",
          {},
          element("span", { class: "piece u" + (style.get(name) % 8) }, name.replaceAll("_", " ")),
          ` ${run.members[name].size}`,
        ),
      ),
  );
  const move = (now) => {
    layer = now;
    let largest = 0;
    const values = spans.map((piece) => (shown ? sum(shown, piece.positions) : null));
    for (const value of values) largest = Math.max(largest, Math.abs(value || 0));
    if (shown && shown.signed) largest = shown.largest;
    spans.forEach((piece, at) => {
      const value = values[at],
        share = value && largest ? Math.round(55 * Math.sqrt(Math.min(Math.abs(value) / largest, 1))) : 0;
      const colour = !shown || !shown.signed ? "#ffb000" : value < 0 ? "var(--loss)" : "var(--gain)";
      piece.span.style.backgroundColor = share ? `color-mix(in srgb, ${colour} ${share}%, transparent)` : "";
      piece.span.title = value === null ? "" : shown.text(value);
    });
    say();
  };
  return {
    element: element("figure", {}, element("figcaption", {}, "Prompt, underlined by group"), body, legend, readout),
    move,
    show: (quantity) => {
      shown = quantity || null;
      move(layer);
    },
  };
}

function wordsTable(lens) {
  const rows = lens.words.map((words, at) =>
    element(
      "tr",
      {},
      element("th", { scope: "row", class: "number" }, at ? String(at - 1) : "in"),
      element("td", { class: "number answer" }, probability(lens.probability[at])),
      ...words.map(([word, value]) =>
        element(
          "td",
          {},
          element("bdi", {}, word.trim() ? word : JSON.stringify(word)),
          " ",
          element("span", { class: "quiet" }, probability(value)),
        ),
      ),
    ),
  );
  const head = element(
    "tr",
    {},
    element("th", { scope: "col" }, "layer"),
    element("th", { scope: "col" }, "answer ", element("bdi", {}, "“" + lens.answer.trim() + "”")),
    ...(lens.words[0] || []).map((_, at) => element("th", { scope: "col" }, `${at + 1}.`)),
  );
  const box = element(
    "div",
    { class: "scroll", tabindex: "0", role: "region", "aria-label": "Most probable words after each layer" },
    element(
      "table",
      { class: "words", "aria-label": "Most probable words" },
      element("thead", {}, head),
      element("tbody", {}, ...rows),
    ),
  );
  return {
    element: element("figure", {}, element("figcaption", {}, "Most probable words after each layer"), box),
    move: (layer) => {
      rows.forEach((row, at) => row.classList.toggle("now", at === layer + 1));
      const row = rows[Math.min(layer + 1, rows.length - 1)];
      box.scrollTop = row.offsetTop - box.clientHeight / 2;
    },
  };
}
