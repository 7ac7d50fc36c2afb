"use strict";
// Puts the views together. Samples are read from the page when they are chosen.

(() => {
  const read = (name) => JSON.parse(document.getElementById(name).textContent);
  const at = (name) => document.getElementById(name);
  const data = read("data"),
    several = data.runs.length > 1;
  const state = { layer: 0, sample: 0, quantity: null };
  const layers = 1 + Math.max(...data.runs.flatMap((run) => run.curves.flatMap((curve) => curve.layers)));
  let overall = null,
    views = [],
    runs = [];

  const named = (curve, run) => arrow(curve.pair) + (several ? ` (${run.name})` : "");
  const pairs = [...new Set(data.runs.flatMap((run) => run.curves.map((curve) => curve.pair)))];
  const styled = (curve, run) => ({
    colour: pairs.indexOf(curve.pair),
    dash: several ? data.runs.indexOf(run) : pairs.indexOf(curve.pair),
  });
  const choose = (layer) => {
    state.layer = layer;
    move();
  };

  function overview() {
    const curves = pairs.flatMap((pair) =>
      data.runs.flatMap((run) => {
        const curve = run.curves.find((one) => one.pair === pair);
        return curve ? [{ ...curve, run: run.name, name: named(curve, run), style: styled(curve, run) }] : [];
      }),
    );
    const most = Math.max(...data.runs.flatMap((run) => run.curves.map((curve) => curve.samples)));
    const chart = lineChart({
      title: most > 1 ? `Mean of ${most} samples, with intervals of 95 %` : "One sample",
      unit: "change of the answer's probability, %",
      curves,
      choose,
    });
    const names = data.runs.map((run) => run.name);
    const own = (curve) => {
      const run = runs[names.indexOf(curve.run)];
      return run && run.curves.find((one) => one.pair === curve.pair);
    };
    const table = pairTable(curves, data.differences, names, own);
    at("curves").append(
      element("div", { class: several ? "run alone compared" : "run alone" }, chart.element, table.element),
    );
    return [chart, table];
  }

  function runView(run, index, image) {
    const described = data.runs[index];
    const box = element("section", {
      class: several ? "run" : "run alone",
      "aria-label": described.name || "This sample",
    });
    const found = [];
    const add = (view) => {
      if (view) {
        found.push(Object.assign(view, { run }));
        box.append(view.element);
      }
    };
    if (several) box.append(element("h3", {}, described.name));
    const says = element(
      "p",
      { class: "answer" },
      "The model answers ",
      element("strong", {}, element("bdi", {}, run.answer || "?")),
      run.base !== undefined ? ` (the token that is read has p = ${probability(run.base)})` : "",
    );
    if (run.answer !== undefined || run.base !== undefined) box.append(says);
    if (run.pieces) {
      run.quantities = quantities(run);
      add(patchMap(run, image));
      add(promptView(run));
    }
    if (run.curves.length)
      add(
        lineChart({
          title: "This sample",
          unit: "change of the answer's probability, %",
          curves: run.curves.map((curve) => ({
            ...curve,
            name: named(curve, described),
            style: styled(curve, described),
          })),
          choose,
        }),
      );
    if (run.lens) {
      const states = run.lens.probability.map((_, layer) => layer - 1);
      add(
        lineChart({
          title: `Probability of the answer “${run.lens.answer.trim()}” after each layer`,
          unit: "probability",
          curves: [{ name: "answer", layers: states, mean: run.lens.probability, style: { colour: 0, dash: 0 } }],
          range: [0, 1],
          choose,
        }),
      );
      add(wordsTable(run.lens));
    }
    if (run.lmar && run.lmar.length)
      add(
        barChart({
          title: "Attention on an image token, divided by that on a text token (LMAR)",
          values: run.lmar,
          choose,
        }),
      );
    at("runs").append(box);
    return found;
  }

  function showSample() {
    const sample = read("sample-" + state.sample);
    at("sample").value = state.sample;
    at("sample-title").textContent = `Sample ${sample.name}`;
    at("question").textContent = sample.question;
    at("problems").replaceChildren(...sample.problems.map((text) => element("li", {}, text)));
    at("runs").replaceChildren();
    runs = sample.runs;
    for (const run of runs) {
      run.groups = run.groups || {};
      run.patches = expand(run.patches || []);
      run.places = run.places || [];
      run.members = Object.fromEntries(
        Object.entries(run.groups).map(([name, ranges]) => [name, new Set(expand(ranges))]),
      );
      run.positions = run.patches.length
        ? run.patches
        : run.pieces
          ? run.pieces.flatMap(([text, own]) => (text ? own : []))
          : [];
    }
    views = runs.flatMap((run, index) => runView(run, index, sample.image));
    at("previous").disabled = state.sample === 0;
    at("next").disabled = state.sample === data.samples.length - 1;
    const kinds = new Map(runs.flatMap((run) => (run.quantities || []).map((one) => [one.key, one.label])));
    if (!kinds.has(state.quantity)) state.quantity = [...kinds.keys()][Math.min(1, kinds.size - 1)] || null; // an effect, if there is one
    at("quantity").replaceChildren(...[...kinds].map(([key, text]) => element("option", { value: key }, text)));
    at("quantity").value = state.quantity || "";
    at("quantity").disabled = !kinds.size;
    showQuantity();
  }

  function showQuantity() {
    for (const view of views)
      if (view.show) view.show((view.run.quantities || []).find((one) => one.key === state.quantity));
    move();
  }

  function move() {
    at("layer").value = state.layer;
    at("layer-value").textContent = `${state.layer} of 0 to ${layers - 1}`;
    for (const view of [...overall, ...views]) view.move(state.layer);
    remember();
  }

  function remember() {
    const show = state.quantity ? "&show=" + encodeURIComponent(state.quantity) : "";
    const address = `#sample=${state.sample}&layer=${state.layer}${show}`;
    try {
      history.replaceState(null, "", address);
    } catch {
      /* a page inside another has no address of its own */
    }
  }

  const asked = new URLSearchParams(location.hash.slice(1));
  const whole = (text, last) => Math.min(Math.max(Math.trunc(Number(text)) || 0, 0), last);
  at("title").textContent = data.title;
  document.title = data.title;
  const described = data.runs.map((run) =>
    [
      run.name,
      Object.entries(run.settings)
        .map(([key, text]) => `${key.replaceAll("_", " ")} ${text}`)
        .join(", "),
    ]
      .filter(Boolean)
      .join(": "),
  );
  at("settings").textContent = [...described, `${data.samples.length} sample${data.samples.length === 1 ? "" : "s"}`]
    .filter(Boolean)
    .join("; ");
  at("layer").max = layers - 1;
  at("sample").append(...data.samples.map((text, index) => element("option", { value: index }, text)));
  if (data.skipped.length) {
    at("skipped").hidden = false;
    at("skipped").firstElementChild.textContent = `${data.skipped.length} questions left out`;
    at("skipped").lastElementChild.append(
      ...data.skipped.map((row) => element("li", {}, element("bdi", {}, row.sample), ": ", row.reason)),
    );
  }
  const theme = (name) => {
    if (name) document.documentElement.dataset.theme = name;
    else delete document.documentElement.dataset.theme;
    at("theme").value = name;
  };
  theme(["light", "dark"].includes(asked.get("theme")) ? asked.get("theme") : "");
  const deepest = data.runs[0].curves
    .flatMap((curve) => curve.mean.map((mean, index) => [mean, curve.layers[index]]))
    .sort((a, b) => a[0] - b[0])[0][1];
  Object.assign(state, {
    layer: asked.has("layer") ? whole(asked.get("layer"), layers - 1) : deepest,
    sample: whole(asked.get("sample"), data.samples.length - 1),
    quantity: asked.get("show"),
  });
  const go = (step) => {
    const next = state.sample + step;
    if (next >= 0 && next < data.samples.length) {
      state.sample = next;
      showSample();
    }
  };
  at("layer").addEventListener("input", (event) => choose(Number(event.target.value)));
  at("sample").addEventListener("change", (event) => {
    state.sample = Number(event.target.value);
    showSample();
  });
  at("quantity").addEventListener("change", (event) => {
    state.quantity = event.target.value;
    showQuantity();
  });
  at("theme").addEventListener("change", (event) => theme(event.target.value));
  at("previous").addEventListener("click", () => go(-1));
  at("next").addEventListener("click", () => go(1));
  document.addEventListener("keydown", (event) => {
    if (event.target.closest("input, select, .scroll") || event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "ArrowRight") choose(Math.min(state.layer + 1, layers - 1));
    else if (event.key === "ArrowLeft") choose(Math.max(state.layer - 1, 0));
    else if (event.key === "n") go(1);
    else if (event.key === "p") go(-1);
  });
  overall = overview();
  showSample();
})();
