// What ran, how it stands, what the rules say, and what it was at the start and is now.

const STATES = {
  running: ["\u25cf", "Running"], ended: ["\u2713", "Ended well"], stopped: ["\u25a0", "Stopped"],
  failed: ["\u2715", "Failed"], killed: ["\u2715", "Killed"],
};

function runHead(run, level) {
  const state = run.state;
  const [sign, word] = STATES[state.word];
  const steps = state.num_steps ? `step ${state.step.toLocaleString("en")} of ${state.num_steps.toLocaleString("en")}` : `step ${state.step.toLocaleString("en")}`;
  const left = known(state.seconds_left) ? `about ${duration(state.seconds_left)} left` : null;
  const plain = ["The run goes on.", "The run ended well.", "The run was stopped."].includes(state.text);
  return el("div", { class: "run-head" },
    el(level, { id: level === "h1" ? "title" : null }, several ? key({ run: runs.indexOf(run), place: 0, name: "", evaluated: true }).firstChild : null, several ? run.label : run.name),
    el("p", { class: "where" }, several ? `${run.name} \u00b7 ` : "", el("span", { class: "mono" }, run.folder)),
    el("div", { class: "state" },
      el("span", { class: `badge ${state.word}` }, el("span", { "aria-hidden": "true" }, sign), word),
      el("span", { class: "number" }, steps),
      state.num_steps && state.word !== "ended" ? el("progress", { max: state.num_steps, value: Math.min(state.step, state.num_steps), "aria-label": "steps that are complete" }) : null,
      left ? el("span", {}, left) : null,
      known(state.seconds) ? el("span", { class: "soft" }, `${duration(state.seconds)} so far`.replace(state.word === "running" ? "" : " so far", "")) : null,
      plain ? null : el("p", { class: "message" }, ...visible(state.text))));
}

function verdictStrip(run) {
  if (!run.verdicts.length) {
    const far = run.state.word === "running" ? " so far" : "";
    return el("div", { class: "no-verdict" }, el("p", {}, el("b", {}, `No verdict${far}.`), " None of the rules of ", el("code", {}, "docs/health.md"), " holds on the curves of this run."));
  }
  return el("ul", { class: "verdicts" }, ...run.verdicts.map((verdict) => el("li", { class: "verdict" },
    el(several ? "h3" : "h2", { class: "title" }, verdict.title, el("span", { class: "soft small" }, ` \u00b7 since step ${verdict.step}${verdict.last > verdict.step ? `, last at step ${verdict.last}` : ""}`)),
    el("p", { class: "seen" }, verdict.seen),
    el("dl", {}, el("dt", {}, "Why"), el("dd", {}, verdict.why), el("dt", {}, "Do"), el("dd", {}, verdict.advice),
      el("dt", {}, "More"), el("dd", {}, el("code", {}, verdict.anchor))))));
}

/** A small curve beside a number. */
function spark(found) {
  if (!found) return "";
  const points = found.x.map((x, index) => [x, found.y[index]]).filter((point) => known(point[1]));
  if (points.length < 2) return "";
  const [xs, ys] = [points.map((p) => p[0]), points.map((p) => p[1])];
  const [low, high, first, last] = [Math.min(...ys), Math.max(...ys), xs[0], xs[xs.length - 1]];
  const place = ([x, y]) => [2 + (104 * (x - first)) / (last - first || 1), 17 - (14 * (y - low)) / (high - low || 1)];
  const picture = svgElement("svg", { class: "spark", viewBox: "0 0 110 20", "aria-hidden": "true" });
  picture.append(svgElement("path", { d: `M${points.map((p) => place(p).map((v) => v.toFixed(1)).join(" ")).join("L")}` }));
  const [x, y] = place(points[points.length - 1]);
  picture.append(svgElement("circle", { cx: x, cy: y, r: 2 }));
  return picture;
}

function startAndEnd() {
  const titles = new Map();
  for (const run of runs) for (const [title, metric] of run.table) titles.set(metric, title);
  const rows = [...titles].map(([metric, title]) => {
    const cells = runs.flatMap((run) => {
      const found = run.table.find((row) => row[1] === metric);
      const [start, startError, end, endError] = found ? found.slice(2) : [];
      return [right(withError(start, startError)), right(withError(end, endError))];
    });
    const row = [{ body: [title, " ", el("code", { class: "soft small" }, metric)] }, ...cells];
    if (!several) row.push({ body: spark(evaluations(runs[0], metric) || curve(runs[0], metric)) });
    return row;
  });
  const pairs = (run) => (several ? [right([run.label, el("br", {}), "start"]), right([run.label, el("br", {}), "end"])] : [right("start"), right("end")]);
  const caption = "Start and end, with standard errors over the evaluation prompts. Read the rows together: each of them alone can look good in a run that has gone wrong.";
  return table({ caption, heads: ["measure", ...runs.flatMap(pairs), ...(several ? [] : ["course"])], rows });
}

function factList(rows) {
  return el("dl", { class: "facts" }, ...rows.flatMap(([label, value]) => [el("dt", {}, label), el("dd", {}, value)]));
}

function recipe(run) {
  return el("details", {},
    el("summary", {}, several ? `Recipe of ${run.label}` : "Recipe and command"),
    run.command ? el("p", { class: "mono" }, run.command) : null,
    el("p", { class: "note" }, "Values under keys that name a password, key, token or other secret are masked, and so are users, passwords and queries of addresses."),
    run.config ? el("pre", { tabindex: "0", role: "region", "aria-label": `config.yaml${several ? ` of ${run.label}` : ""}` }, run.config) : null);
}

function drawTop() {
  const parts = [];
  if (several) parts.push(el("h1", { id: "title" }, `${runs.length} runs`));
  const heads = runs.map((run) => [runHead(run, several ? "h2" : "h1"), verdictStrip(run),
    run.notes.length ? el("ul", { class: "note" }, ...run.notes.map((note) => el("li", {}, note))) : null]);
  parts.push(several ? el("div", { class: "runs" }, ...heads.map((head) => el("div", {}, ...head.filter(Boolean)))) : heads[0]);
  const rows = (run) => [...run.facts, ...run.machine];
  if (several) {
    const labels = [...new Set(runs.flatMap((run) => rows(run).map(([label]) => label)))];
    parts.push(startAndEnd(),
      el("h2", { class: "minor" }, "What ran"),
      table({ caption: "What ran", titled: true, heads: ["what", ...runs.map((run) => run.label)],
        rows: labels.map((label) => [label, ...runs.map((run) => (rows(run).find((row) => row[0] === label) || ["", "\u2013"])[1])]) }));
    if (report.differences.length) {
      parts.push(el("details", { open: report.differences.length < 15 }, el("summary", {}, `Keys of the recipes that differ (${report.differences.length})`),
        table({ caption: "Keys of the recipes that differ", titled: true, heads: ["key", ...runs.map((run) => run.label)],
          rows: report.differences.map(([name, ...values]) => [el("code", {}, name), ...values.map((value) => el("span", { class: "mono" }, value))]) })));
    }
  } else {
    const missing = runs[0].machine.some(([label]) => label === "Versions") ? null : el("p", { class: "note small" }, "Versions and machine were not recorded by this run.");
    parts.push(el("div", { class: "two" }, startAndEnd(), el("div", {}, el("h2", { class: "minor" }, "What ran"), factList(rows(runs[0])), missing)));
  }
  parts.push(...runs.map(recipe));
  fill("top-body", parts.flat());
}
