"use strict";
// The tables are already here; this sorts and filters them, and draws what needs a choice.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const $ = (query, at = document) => at.querySelector(query);
  const $$ = (query, at = document) => [...at.querySelectorAll(query)];
  const maker = (create) => (tag, attributes = {}, ...inside) => {
    const made = create(tag);
    for (const [key, value] of Object.entries(attributes)) if (value != null) made.setAttribute(key, value);
    made.append(...inside.filter((part) => part != null));
    return made;
  };
  const html = maker((tag) => document.createElement(tag));
  const svg = maker((tag) => document.createElementNS("http://www.w3.org/2000/svg", tag));
  const mean = (values) => values.reduce((sum, v) => sum + v, 0) / values.length;
  const figures = (value, digits = 0) => value.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits });
  const brief = (value) => new Intl.NumberFormat("en", { notation: "compact", maximumSignificantDigits: 3 }).format(value);
  const clip = (text) => (text.length > 24 ? [...text].slice(0, 23).join("") + "…" : text);
  document.documentElement.classList.add("js");

  // ---- a word about what is under the pointer, or has the focus
  const tip = $("#tip");
  const hide = () => { tip.hidden = true; };
  function say(text, x, y) {
    tip.textContent = text;
    tip.hidden = false;
    const { width, height } = tip.getBoundingClientRect();
    const left = Math.max(8, Math.min(x + 14, document.documentElement.clientWidth - width - 8));
    const top = y - height - 12 < 8 ? y + 16 : y - height - 12;
    tip.style.transform = `translate(${left + scrollX}px, ${top + scrollY}px)`; // on the page: it moves with what it names
  }
  document.addEventListener("keydown", (event) => event.key === "Escape" && hide());

  // ---- tables: sort by any column; a cell without a value stays last both ways
  function sort(head) {
    const down = head.getAttribute("aria-sort") === "none" ? head.classList.contains("n") : head.getAttribute("aria-sort") === "ascending";
    const body = head.closest("table").tBodies[0];
    for (const other of head.parentElement.cells) if (other.ariaSort) other.setAttribute("aria-sort", "none");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const value = (row) => row.cells[head.cellIndex].dataset.v;
    const order = head.classList.contains("n") ? (a, b) => a - b : (a, b) => a.localeCompare(b, "en", { numeric: true });
    const rows = [...body.rows].map((row) => [value(row), row]);
    rows.sort(([a], [b]) => (a == null || b == null ? (a == null) - (b == null) : (down ? -1 : 1) * order(a, b)));
    body.append(...rows.map(([, row]) => row));
  }
  for (const button of $$("table.sortable th button")) button.addEventListener("click", () => sort(button.parentElement));

  // ---- filters of the main table, which hold in the chart of costs too
  const main = $("#results table");
  const spans = $$("tr.groups > *", main).map((cell) => [cell, cell.colSpan]);
  const shown = () => $$("tbody tr", main).filter((row) => !row.hidden).map((row) => data.rows[row.dataset.row]);
  function filter() {
    const word = $("#filter").value.trim().toLowerCase(), model = $("#model")?.value;
    for (const row of $$("tbody tr", main)) {
      const one = data.rows[row.dataset.row];
      row.hidden = !one.method.toLowerCase().includes(word) || Boolean(model && one.model !== model);
    }
    const off = new Set($$("#sets input:not(:checked)").map((box) => box.value));
    for (const cell of $$("[data-set]", main)) cell.hidden = off.has(cell.dataset.set);
    const heads = $$("thead tr:last-child > *", main);
    let from = 0;
    for (const [cell, width] of spans) {
      const left = heads.slice(from, (from += width)).filter((head) => !head.hidden).length;
      cell.hidden = !left;
      cell.colSpan = left || 1;
    }
    $("#shown").textContent = shown().length === data.rows.length ? "" : `${shown().length} of ${data.rows.length} rows`;
    drawCost();
  }
  $("#filter").addEventListener("input", filter);
  $("#model")?.addEventListener("change", filter);
  $("#sets").addEventListener("change", filter);
  for (const button of $$("#sets button")) button.addEventListener("click", () => {
    for (const box of $$("#sets input")) box.checked = Boolean(button.value);
    filter();
  });
  for (const input of $$("input.find")) input.addEventListener("input", () => {
    const words = input.value.toLowerCase().split(/\s+/), rows = $$("tbody tr", input.closest(".controls").nextElementSibling);
    for (const row of rows) row.hidden = !words.every((word) => row.textContent.toLowerCase().includes(word));
  });
  document.addEventListener("click", (event) => { if (!$("#sets").contains(event.target)) $("#sets").open = false; });

  // ---- axes and marks
  const SHAPES = [
    (r) => `M${-r},0a${r},${r} 0 1,0 ${2 * r},0a${r},${r} 0 1,0 ${-2 * r},0z`,
    (r) => `M${-r * 0.9},${-r * 0.9}h${r * 1.8}v${r * 1.8}h${-r * 1.8}z`,
    (r) => `M0,${-r * 1.2}L${r * 1.15},${r * 0.8}H${-r * 1.15}z`,
    (r) => `M0,${-r * 1.3}L${r * 1.3},0L0,${r * 1.3}L${-r * 1.3},0z`,
    (r) => `M0,${r * 1.2}L${r * 1.15},${-r * 0.8}H${-r * 1.15}z`,
    (r) => `M${-r},${-r * 0.4}h${r * 0.6}v${-r * 0.6}h${r * 0.8}v${r * 0.6}h${r * 0.6}v${r * 0.8}h${-r * 0.6}v${r * 0.6}h${-r * 0.8}v${-r * 0.6}h${-r * 0.6}z`,
  ];
  const shape = (i, r) => SHAPES[i % SHAPES.length](r);

  /** Where values lie between two pixels; logarithmic where they span more than 50 times, with 0 on its own at the start. */
  function axis(values, from, to, whole = false) {
    const positive = values.filter((v) => v > 0), high = Math.max(...values), least = Math.min(...positive);
    const log = high / least > 50;
    let low = log ? least : Math.min(...values), top = high;
    if (log) {
      const start = values.some((v) => v <= 0) ? from + 0.09 * (to - from) : from;
      const room = (Math.log10(top) - Math.log10(low)) * 0.04, a = Math.log10(low) - room, b = Math.log10(top) + room;
      const at = (v) => (v <= 0 ? from + 0.02 * (to - from) : start + ((Math.log10(v) - a) / (b - a)) * (to - start));
      const steps = b - a > 3 ? [1] : [1, 2, 5], ticks = start === from ? [] : [0];
      for (let e = Math.floor(a); e <= b; e++) for (const s of steps) ticks.push(s * 10 ** e);
      return { at, log, ticks: ticks.filter((t) => t === 0 || (Math.log10(t) >= a && Math.log10(t) <= b)) };
    }
    if (top === low) [low, top] = [low - 0.5, top + 0.5];
    if (!whole) [low, top] = [low >= 0 && low < 0.4 * top ? 0 : low - 0.05 * (top - low), top + 0.05 * (top - low)];
    const rough = (top - low) / (Math.abs(to - from) > 420 ? 6 : 4), unit = 10 ** Math.floor(Math.log10(rough));
    const step = Math.max(whole ? 1 : 0, [1, 2, 5, 10].find((s) => s * unit >= rough) * unit);
    const ticks = [];
    for (let i = Math.ceil(low / step); i * step <= top + 1e-9; i++) ticks.push(+(i * step).toPrecision(12));
    return { at: (v) => from + ((v - low) / (top - low)) * (to - from), log, ticks };
  }

  /** An empty plot with its axes: {plot, x, y}. */
  function frame(width, height, title, about, x, y, xs, ys) {
    const id = title.replace(/\W+/g, "-");
    const plot = svg("svg", { class: "plot", width, height, role: "group", "aria-labelledby": `${id}-t ${id}-d` },
      svg("title", { id: `${id}-t` }, title), svg("desc", { id: `${id}-d` }, about));
    const right = width - 10, bottom = height - 44, left = 44;
    const across = axis(xs, left, right, x.whole), up = axis(ys, bottom, 12);
    for (const t of up.ticks) {
      plot.append(svg("line", { class: "grid", x1: left, x2: right, y1: up.at(t), y2: up.at(t) }),
        svg("text", { x: left - 8, y: up.at(t) + 4, "text-anchor": "end" }, y.tick(t)));
    }
    for (const t of across.ticks) plot.append(svg("text", { x: across.at(t), y: bottom + 18, "text-anchor": "middle" }, x.tick(t)));
    plot.append(svg("text", { class: "x-title", x: (left + right) / 2, y: height - 4, "text-anchor": "middle" }, x.title + (across.log ? " (log scale)" : "")));
    return { plot, x: across.at, y: up.at, log: across.log, bottom, left, right };
  }

  // ---- accuracy against cost
  const COSTS = {
    body: { of: (row) => row.body, title: "trained parameters of the body", tick: brief, say: (v) => `${figures(v)} parameters` },
    seconds: { of: (row) => row.seconds, title: "seconds of training", tick: brief, say: (v) => `${figures(v, v < 10 ? 1 : 0)} seconds` },
    peak_bytes: { of: (row) => row.peak_bytes == null ? null : row.peak_bytes / 2 ** 20, title: "peak memory, MiB", tick: brief, say: (v) => `${figures(v)} MiB` },
  };
  function drawCost() {
    const box = $("#cost-chart");
    if (!box) return;
    const cost = COSTS[$("#x").value], pick = $("#y"), [part, ...rest] = pick.value.split("/"), what = pick.selectedOptions[0].label;
    const gain = (row) => (part === "scores" ? row.scores[rest.join("/")] : row[part]);
    const points = shown().map((row) => ({ row, x: cost.of(row), score: gain(row) })).filter((p) => p.x != null && p.score);
    if (!points.length) return box.replaceChildren(html("p", { class: "note" }, "No method shown has both numbers."));
    for (const p of points) [p.y, p.sd] = [100 * p.score.mean, 100 * (p.score.sd ?? 0)];
    const width = box.clientWidth, height = Math.max(320, Math.min(520, width * 0.55));
    const f = frame(width, height, `${what}, percent, against ${cost.title}`, `${points.length} methods; the table above holds the same numbers.`,
      cost, { tick: (t) => `${t}` }, points.map((p) => p.x), points.flatMap((p) => [p.y - p.sd, p.y + p.sd]));
    let top = -Infinity, path = "";
    for (const p of [...points].sort((a, b) => a.x - b.x || b.y - a.y)) {
      if (p.y <= top) continue;
      [p.pareto, top] = [true, p.y];
      path += path ? `H${f.x(p.x)}V${f.y(p.y)}` : `M${f.x(p.x)},${f.y(p.y)}`;
    }
    f.plot.append(svg("path", { class: "front", d: path + `H${f.right}` }));
    points.sort((a, b) => Boolean(a.pareto) - Boolean(b.pareto));
    const taken = points.map((p) => [f.x(p.x) - 6, f.y(p.y) - 6, f.x(p.x) + 6, f.y(p.y) + 6]), names = [];
    for (const p of points) {
      const several = data.models.length > 1 ? ` · ${p.row.model}` : "";
      const text = `${p.row.method}${several}\n${what}: ${figures(p.y, 1)} ± ${figures(p.sd, 1)} %\n${cost.say(p.x)}${p.pareto ? "\non the Pareto front" : ""}`;
      const mark = svg("g", { class: p.pareto ? "mark pareto" : "mark", tabindex: 0, role: "img", "aria-label": text.replaceAll("\n", ", "), transform: `translate(${f.x(p.x)},${f.y(p.y)})` },
        p.sd ? svg("line", { class: "spread", y1: f.y(p.y + p.sd) - f.y(p.y), y2: f.y(p.y - p.sd) - f.y(p.y) }) : null,
        svg("path", { d: shape(data.models.indexOf(p.row.model), 5.5) }), svg("circle", { class: "hit", r: 11 }));
      const tell = () => { const at = mark.lastChild.getBoundingClientRect(); say(text, at.x + 11, at.y + 5); };
      for (const event of ["pointerenter", "focus"]) mark.addEventListener(event, tell);
      for (const event of ["pointerleave", "blur"]) mark.addEventListener(event, hide);
      f.plot.append(mark);
    }
    for (const p of [...points].reverse()) { // the front first; a name that finds no room is left to the pointer
      const label = clip(p.row.method), w = (p.pareto ? 7 : 6.3) * label.length, [x, y] = [f.x(p.x), f.y(p.y)];
      const places = [[x + 9, y + 4], [x - 9 - w, y + 4], [x - w / 2, y - 10], [x - w / 2, y + 19]];
      const free = places.map(([a, b]) => [a, b - 10, a + w, b + 2]).find((r) => r[0] > f.left && r[2] < f.right + 8 && r[1] > 0 && r[3] < f.bottom &&
        !taken.some((t) => t[0] < r[2] && r[0] < t[2] && t[1] < r[3] && r[1] < t[3]));
      if (!free) continue;
      taken.push(free);
      names.push(svg("text", { class: p.pareto ? "name pareto" : "name", x: free[0], y: free[3] - 2, "aria-hidden": true }, label));
    }
    f.plot.append(...names);
    const legend = data.models.length > 1 ? html("p", { class: "legend" }, ...data.models.map((model, i) =>
      html("span", {}, svg("svg", { width: 12, height: 12, viewBox: "-6 -6 12 12", "aria-hidden": true }, svg("path", { d: shape(i, 4.5) })), model))) : null;
    box.replaceChildren(...[f.plot, legend].filter(Boolean));
  }
  for (const id of ["#x", "#y"]) $(id)?.addEventListener("change", drawCost);

  // ---- runs of one method on one set
  const setOf = (key) => data.sets.find((one) => one.key === key);
  const runsOf = (method, model, key) => data.runs.filter((run) =>
    run.method === method && run.model === model && run.set === setOf(key).name && (run.shots ?? null) === (setOf(key).shots ?? null));
  const byMean = [...data.rows].sort((a, b) => (b.mean_sets?.mean ?? -1) - (a.mean_sets?.mean ?? -1));

  // ---- learning curves
  const DASHES = ["", "7 3", "2 3", "9 3 2 3", "5 2", "1 2"];
  const slots = new Map(byMean.filter((row) => row.model === data.models[0]).slice(0, 3).map((row, i) => [row.method, i])); // method -> its colour
  function drawChips() {
    $("#curve-methods").replaceChildren(...data.methods.map((method) => {
      const slot = slots.get(method), on = slot !== undefined;
      const button = html("button", { type: "button", "aria-pressed": on, class: on ? `s${slot}` : null },
        on ? svg("svg", { width: 26, height: 10, viewBox: "0 -5 26 10", "aria-hidden": true }, svg("path", { d: "M0,0H22", "stroke-dasharray": DASHES[slot], "stroke-width": 2 }), svg("path", { d: shape(slot, 3.5), transform: "translate(22,0)" })) : null, method);
      button.addEventListener("click", () => {
        if (!slots.delete(method)) {
          if (slots.size === 6) slots.delete(slots.keys().next().value);
          slots.set(method, [0, 1, 2, 3, 4, 5].find((s) => ![...slots.values()].includes(s)));
        }
        const at = data.methods.indexOf(method);
        drawChips();
        drawCurves();
        $("#curve-methods").children[at].focus();
      });
      return button;
    }));
  }
  function drawCurves() {
    const box = $("#curves-chart");
    if (!box) return;
    const key = $("#curve-set").value, model = $("#curve-model")?.value ?? data.models[0];
    const lines = [...slots].map(([method, slot]) => ({ method, slot, curves: runsOf(method, model, key).map((run) => run.curve).filter((c) => c?.length) }));
    const panels = html("div", { class: "panels" }, html("div"), html("div"));
    box.replaceChildren(panels); // in the page first: their widths are measured
    for (const [i, [title, at, times, none]] of [
      ["Accuracy on val, percent", 2, 100, "These runs kept no pictures apart for val: the final fit takes them all."],
      ["Mean training loss", 1, 1, "No curve is recorded for these methods."],
    ].entries()) {
      const panel = panels.children[i];
      panel.append(html("h3", {}, title));
      const series = lines.map(({ method, slot, curves }) => {
        const seeds = curves.map((curve) => curve.filter((point) => point[at] != null).map((point) => [point[0], times * point[at]])).filter((c) => c.length);
        const epochs = [...new Set(seeds.flat().map(([epoch]) => epoch))].sort((a, b) => a - b);
        return { method, slot, seeds, mean: epochs.map((epoch) => [epoch, mean(seeds.flat().filter(([e]) => e === epoch).map(([, v]) => v))]) };
      }).filter((s) => s.mean.length);
      if (!series.length) { panel.append(html("p", { class: "note" }, none)); continue; }
      const all = series.flatMap((s) => s.seeds.flat()), epochs = [...new Set(all.map(([e]) => e))].sort((a, b) => a - b);
      const f = frame(panel.clientWidth, 280, `${title}, ${key}`, `Curves of ${series.map((s) => s.method).join(", ")}; left and right arrows read them epoch by epoch.`,
        { title: "epoch", tick: (t) => `${t}`, whole: true }, { tick: (t) => `${t}` }, epochs, all.map(([, v]) => v));
      const line = (points) => "M" + points.map(([e, v]) => `${f.x(e).toFixed(1)},${f.y(v).toFixed(1)}`).join("L");
      for (const s of series) {
        const group = svg("g", { class: `s${s.slot}` }, ...(s.seeds.length > 1 ? s.seeds.map((points) => svg("path", { class: "curve seed", d: line(points) })) : []),
          svg("path", { class: "curve", d: line(s.mean), "stroke-dasharray": DASHES[s.slot] }));
        const [e, v] = s.mean.at(-1);
        group.append(svg("path", { class: "end", d: shape(s.slot, 4.5), transform: `translate(${f.x(e)},${f.y(v)})` }));
        f.plot.append(group);
      }
      const rule = svg("line", { class: "rule", y1: 12, y2: f.bottom, visibility: "hidden" });
      f.plot.append(rule);
      let here = epochs.length - 1;
      const read = (i) => {
        here = Math.max(0, Math.min(epochs.length - 1, i));
        const x = f.x(epochs[here]), at = f.plot.getBoundingClientRect();
        for (const [k, v] of [["x1", x], ["x2", x], ["visibility", "visible"]]) rule.setAttribute(k, v);
        const values = series.map((s) => [s.method, s.mean.find(([e]) => e === epochs[here])?.[1]]).filter(([, v]) => v != null).sort((a, b) => b[1] - a[1]);
        say(`epoch ${epochs[here]}\n` + values.map(([m, v]) => `${clip(m)}: ${times === 100 ? figures(v, 1) + " %" : v.toPrecision(4)}`).join("\n"), at.x + x, at.y + 60);
      };
      const leave = () => { hide(); rule.setAttribute("visibility", "hidden"); };
      f.plot.setAttribute("tabindex", 0);
      f.plot.addEventListener("pointermove", (event) => {
        const x = event.clientX - f.plot.getBoundingClientRect().x;
        read(epochs.reduce((best, e, i) => (Math.abs(f.x(e) - x) < Math.abs(f.x(epochs[best]) - x) ? i : best), 0));
      });
      f.plot.addEventListener("focus", () => read(here));
      f.plot.addEventListener("keydown", (event) => {
        const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
        if (step) { event.preventDefault(); read(here + step); }
      });
      for (const event of ["pointerleave", "blur"]) f.plot.addEventListener(event, leave);
      panel.append(f.plot);
    }
  }
  if ($("#curves-chart")) {
    drawChips();
    $("#curve-set").value = (data.sets.find((one) => data.runs.some((run) => run.set === one.name && run.curve?.length)) ?? data.sets[0]).key;
    for (const id of ["#curve-set", "#curve-model"]) $(id)?.addEventListener("change", drawCurves);
  }

  // ---- accuracy by class: two methods, a mark each
  function drawClasses() {
    const box = $("#classes-chart"), key = $("#class-set").value, [a, b] = ["#class-a", "#class-b"].map((id) => data.rows[$(id).value]);
    const accuracy = (row) => {
      const found = runsOf(row.method, row.model, key).map((run) => run.classes).filter(Boolean), names = new Set(found.flatMap(Object.keys));
      return new Map([...names].map((n) => [n, mean(found.filter((c) => Object.hasOwn(c, n)).map((c) => 100 * c[n]))]));
    };
    const [ofA, ofB] = [a, b].map(accuracy);
    const rows = [...ofA].filter(([n]) => ofB.has(n)).map(([n, v]) => [n, v, ofB.get(n), v - ofB.get(n)]);
    rows.sort((p, q) => Math.abs(q[3]) - Math.abs(p[3]) || p[0].localeCompare(q[0], "en", { numeric: true }));
    if (!rows.length) return box.replaceChildren(html("p", { class: "note" }, "These two methods share no class on this set."));
    const track = (u, v) => svg("svg", { class: "track", width: "100%", height: 16, "aria-hidden": true }, svg("line", { x1: 0, x2: "100%", y1: 8, y2: 8 }),
      svg("line", { class: "gap", x1: `${u}%`, x2: `${v}%`, y1: 8, y2: 8 }), svg("rect", { x: `${v}%`, y: 4, width: 8, height: 8, transform: "translate(-4,0)" }), svg("circle", { cx: `${u}%`, cy: 8, r: 5 }));
    const signed = (v) => (v > 0 ? "+" : v < 0 ? "−" : "") + figures(Math.abs(v), 1);
    const heads = ["Class", `● ${clip(a.method)}`, `□ ${clip(b.method)}`, "Difference"].map((label, i) => html("th", { scope: "col", class: i ? "n" : null }, label));
    const ends = html("th", { scope: "col", class: "wide" }, html("span", { class: "ends" }, html("span", {}, "0 %"), html("span", {}, "100 %")));
    const body = rows.map(([n, u, v, d]) => html("tr", {}, html("th", { scope: "row" }, n), ...[figures(u, 1), figures(v, 1), signed(d)].map((t) => html("td", { class: "n" }, t)),
      html("td", { class: "wide" }, track(u, v))));
    box.replaceChildren(html("div", { class: "box", tabindex: 0, role: "region", "aria-label": "Accuracy by class" },
      html("table", {}, html("caption", { class: "unseen" }, `Accuracy by class of ${a.method} and ${b.method}`), html("thead", {}, html("tr", {}, ...heads, ends)), html("tbody", {}, ...body))));
  }
  if ($("#classes-chart")) {
    const first = byMean[0], next = byMean.find((row) => row !== first && row.model === first.model) ?? first;
    $("#class-a").value = data.rows.indexOf(first);
    $("#class-b").value = data.rows.indexOf(next);
    for (const id of ["#class-set", "#class-a", "#class-b"]) $(id).addEventListener("change", drawClasses);
    drawClasses();
  }

  // ---- sizes follow the window
  let width = 0;
  new ResizeObserver(() => {
    if ($("main").clientWidth === width) return;
    width = $("main").clientWidth;
    drawCost();
    drawCurves();
  }).observe($("main"));
  addEventListener("beforeprint", () => { for (const part of $$("details.print")) part.open = true; });
})();
