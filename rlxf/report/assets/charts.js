// Curves. A chart is drawn when it comes into view, and before printing.

const charts = [];
const DASHES = ["solid", "dashed", "dotted", [8, 3, 2, 3], [2, 4], [12, 4]];
const SYMBOLS = ["circle", "rect", "triangle", "diamond", "roundRect", "pin"];
const MARKS = {
  resume: { title: "Resumes", symbol: "triangle", color: "--c6", dash: [6, 4] },
  checkpoint: { title: "Checkpoints", symbol: "rect", color: "--c2" },
  fault: { title: "Faults", symbol: "diamond", color: "--c1", dash: [2, 3] },
  recovery: { title: "Recoveries", symbol: "roundRect", color: "--c4" },
  verdict: { title: "Verdicts", symbol: "pin", color: "--c3", dash: "solid" },
};
const lastStep = Math.max(1, ...runs.flatMap((run) => [run.state.step, ...run.evaluations.steps.slice(-1)]));

function color(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

/** A curve's colour: of its run where there are several, else of its place in the chart. */
const paint = (series) => color(`--c${(several ? series.run : series.place) % 7}`);
const dash = (series) => DASHES[(several ? series.place : series.dash || 0) % DASHES.length];
const symbol = (series) => SYMBOLS[(several ? series.run : series.place) % SYMBOLS.length];

/** Steps and values of a metric of training; null if the run has none. */
function curve(run, name) {
  const found = run.curves.of[name];
  return found ? { x: found.s || run.curves.steps, y: found.v } : null;
}

/** Steps, values and standard errors of a metric of the evaluations. */
function evaluations(run, name) {
  const values = run.evaluations.of[name];
  if (!values || !values.some(known)) return null;
  return { x: run.evaluations.steps, y: values, se: run.evaluations.of[`${name}_se`] || null };
}

/** One figure with its title, its key and a place for the plot. `draw` gives the options when it is needed. */
function figure({ title, unit, help, keys, draw, summary, tall, kind }) {
  const plot = el("div", { class: `plot${tall ? " tall" : ""}${kind ? ` ${kind}` : ""}`, role: "img", "aria-label": `${title}. ${summary}` });
  const made = el("figure", { class: tall || kind === "rail" ? "wide" : null },
    el("figcaption", { title: help || null },
      el("b", {}, title), unit ? el("span", { class: "unit" }, unit) : null,
      keys && keys.length ? el("ul", { class: "keys" }, ...keys) : null),
    plot);
  const chart = { plot, draw, drawn: null };
  charts.push(chart);
  watcher.observe(plot);
  plot.chart = chart;
  return made;
}

const watcher = new IntersectionObserver((entries) => {
  for (const entry of entries) if (entry.isIntersecting) render(entry.target.chart);
}, { rootMargin: "400px" });

function render(chart) {
  watcher.unobserve(chart.plot);
  if (!chart.plot.isConnected) return;
  const size = { width: chart.plot.clientWidth || 300, height: chart.plot.clientHeight || 190 };
  if (!chart.drawn) chart.drawn = echarts.init(chart.plot, null, { renderer: "svg", ...size });
  chart.drawn.setOption(frame(chart.draw()), true);
  chart.drawn.getZr().flush();
  const svg = chart.plot.querySelector("svg");
  if (svg) {
    svg.setAttribute("viewBox", `0 0 ${size.width} ${size.height}`);
    svg.setAttribute("aria-hidden", "true"); // the label of the plot says it in words
  }
}

/** Draw again what was drawn: other colours, another width. */
function renderAgain(every) {
  for (const chart of charts) {
    if (!chart.plot.isConnected || (!chart.drawn && !every)) continue;
    if (chart.drawn) chart.drawn.resize({ width: chart.plot.clientWidth || 300, height: chart.plot.clientHeight || 190 });
    render(chart);
  }
}

/** Charts that are not on the page any more. */
function forget() {
  for (let index = charts.length - 1; index >= 0; index--) {
    if (charts[index].plot.isConnected) continue;
    if (charts[index].drawn) charts[index].drawn.dispose();
    charts.splice(index, 1);
  }
}

/** What all charts have in common. */
function frame(option) {
  const [ink, soft, line, faint] = ["--ink", "--soft", "--line", "--faint"].map(color);
  const axis = { axisLine: { lineStyle: { color: line } }, axisTick: { show: false }, axisLabel: { color: soft, fontSize: 11, hideOverlap: true },
    splitLine: { lineStyle: { color: faint } }, nameTextStyle: { color: soft, fontSize: 11 } };
  const axes = (given) => [given].flat().map((one) => ({ ...axis, ...one, axisLabel: { ...axis.axisLabel, ...one.axisLabel } }));
  return {
    animation: false,
    backgroundColor: "transparent",
    textStyle: { fontFamily: getComputedStyle(document.body).fontFamily, color: ink },
    grid: { left: 6, right: 14, top: 14, bottom: 4 },
    ...option,
    xAxis: axes({ type: "value", min: 0, max: lastStep, splitLine: { show: false }, ...option.xAxis }),
    yAxis: axes(option.yAxis || { type: "value", scale: true, splitNumber: 4 }),
    tooltip: { trigger: "axis", confine: true, backgroundColor: color("--paper"), borderColor: line, textStyle: { color: ink, fontSize: 12 },
      padding: 8, axisPointer: { lineStyle: { color: soft } }, ...option.tooltip },
  };
}

/** A curve with its band of one standard error, as ECharts wants it. */
function lines(series, { marks = true, area = null } = {}) {
  const made = [];
  series.forEach((one, index) => {
    const points = one.x.map((x, place) => [x, one.y[place]]).filter((point) => known(point[1]));
    if (one.se) {
      const both = one.x.map((x, place) => [x, one.y[place], one.se[place]]).filter((p) => known(p[1]) && known(p[2]));
      const band = { type: "line", stack: `band${index}`, stackStrategy: "all", symbol: "none", silent: true, lineStyle: { opacity: 0 }, tooltip: { show: false } };
      made.push({ ...band, name: "band", data: both.map(([x, y, se]) => [x, y - se]) });
      made.push({ ...band, name: "band", data: both.map(([x, , se]) => [x, 2 * se]), areaStyle: { color: paint(one), opacity: 0.18 } });
    }
    made.push({
      type: "line", name: one.name, data: points, z: one.evaluated ? 4 : 3, color: paint(one),
      symbol: symbol(one), symbolSize: one.evaluated ? 6 : 4, showSymbol: one.evaluated || points.length === 1,
      lineStyle: { width: one.evaluated ? 1.8 : 1.2, type: dash(one), opacity: one.evaluated ? 1 : 0.85 },
      emphasis: { disabled: true },
    });
  });
  if (marks && made.length) made[made.length - 1].markLine = verticals(series);
  return made;
}

/** Lines at resumes, faults and verdicts. */
function verticals(series) {
  const used = several ? [...new Set(series.map((one) => one.run))] : [0];
  const data = used.flatMap((index) => stepMarks(runs[index]).map((mark) => ({
    xAxis: mark.step, lineStyle: { color: color(several ? `--c${index % 7}` : MARKS[mark.kind].color), type: MARKS[mark.kind].dash, width: 1, opacity: several ? 0.5 : 0.8 },
  })));
  return { silent: true, symbol: "none", label: { show: false }, data };
}

const stepMarks = (run) => run.marks.filter((mark) => known(mark.step) && MARKS[mark.kind] && MARKS[mark.kind].dash);

/** What the pointer shows: the step, and the value of each curve there. */
function tip(head, rows) {
  return el("div", { class: "tip" }, el("div", {}, el("b", {}, head)), ...rows.map(([name, value]) => el("div", {}, el("span", {}, name), el("b", {}, value))));
}

/** A tooltip of curves: the nearest point of each to the step under the pointer. */
function stepTip(series, unitless) {
  return {
    formatter: (found) => {
      const at = [found].flat()[0].axisValue ?? [found].flat()[0].value[0];
      const rows = series.map((one) => [one, nearest(one, at)]).filter(([, place]) => place !== null)
        .map(([one, place]) => [one.name, shown(one.y[place]) + (one.se && known(one.se[place]) ? ` \u00b1 ${shown(one.se[place])}` : "") + (one.x[place] === at ? "" : ` (step ${one.x[place]})`)]);
      return tip(`step ${Number(at.toFixed(2))}`, rows);
    },
  };
}

function nearest(one, at) {
  let best = null;
  for (let place = 0; place < one.x.length; place++) {
    if (known(one.y[place]) && (best === null || Math.abs(one.x[place] - at) < Math.abs(one.x[best] - at))) best = place;
  }
  return best;
}

/** The key of a curve: a piece of its line with its symbol. */
function key(one) {
  const picture = svgElement("svg", { width: 26, height: 10, "aria-hidden": "true" });
  const pattern = dash(one);
  const dashes = pattern === "solid" ? "" : pattern === "dashed" ? "5 3" : pattern === "dotted" ? "2 2" : pattern.join(" ");
  const stroke = `var(--c${(several ? one.run : one.place) % 7})`;
  picture.append(svgElement("line", { x1: 0, x2: 26, y1: 5, y2: 5, "stroke-width": 2, "stroke-dasharray": dashes, style: `stroke: ${stroke}` }));
  if (one.evaluated) picture.append(shape(symbol(one), 13, 5, stroke));
  return el("li", {}, picture, one.name);
}

function shape(name, x, y, paint) {
  const style = { style: `fill: ${paint}` };
  if (name === "circle") return svgElement("circle", { cx: x, cy: y, r: 3.2, ...style });
  if (name === "triangle") return svgElement("path", { d: `M${x - 4} ${y + 3.5}L${x} ${y - 4}L${x + 4} ${y + 3.5}Z`, ...style });
  if (name === "diamond") return svgElement("path", { d: `M${x - 4} ${y}L${x} ${y - 4}L${x + 4} ${y}L${x} ${y + 4}Z`, ...style });
  if (name === "pin") return svgElement("path", { d: `M${x} ${y + 5}L${x - 3.5} ${y - 1}A3.6 3.6 0 1 1 ${x + 3.5} ${y - 1}Z`, ...style });
  return svgElement("rect", { x: x - 3, y: y - 3, width: 6, height: 6, rx: name === "roundRect" ? 2 : 0, ...style });
}

/** One sentence of a chart for those who do not see it. */
function inWords(series) {
  return series.map((one) => {
    const points = one.y.filter(known);
    if (!points.length) return "";
    return `${one.name}: from ${shown(points[0])} to ${shown(points[points.length - 1])}, between ${shown(Math.min(...points))} and ${shown(Math.max(...points))}.`;
  }).join(" ");
}

/** The series of a chart: of each run, the metrics that it has. */
function seriesOf(spec, chosen = runs) {
  const made = [];
  const metricsOf = (run) => (typeof spec.metrics === "function" ? spec.metrics(run) : spec.metrics);
  const order = [...new Set(chosen.flatMap((run) => metricsOf(run).map(([name]) => name)))];
  for (const run of chosen) {
    metricsOf(run).forEach(([name, label]) => {
      const place = order.indexOf(name);
      const evaluated = name.startsWith("eval/");
      const found = evaluated ? evaluations(run, name) : curve(run, name);
      if (found && spec.scale) found.y = found.y.map((value) => (known(value) ? value * spec.scale : value));
      if (found) made.push({ ...found, name: several && chosen.length > 1 ? `${run.label}: ${label}` : label, run: runs.indexOf(run), place, evaluated });
    });
  }
  return made;
}

/** A chart of metrics over steps; null if no run has one of them. Counts that are always 0 are told in `zeros`. */
function stepChart(spec, chosen = runs, zeros = null) {
  const series = seriesOf(spec, chosen);
  if (!series.length) return null;
  if (zeros && spec.zero && series.every((one) => one.y.every((value) => !value))) {
    zeros.push(spec.title.toLowerCase());
    return null;
  }
  return figure({
    title: spec.title, unit: spec.unit, help: spec.help, summary: inWords(series), tall: spec.tall,
    keys: keysOf(series, chosen),
    draw: () => ({
      series: lines(series), tooltip: stepTip(series),
      yAxis: { type: "value", scale: !spec.zero, min: spec.min, max: spec.max ?? upToOne, interval: spec.interval, splitNumber: 4 },
    }),
  });
}

/** The end of an axis of shares that come near 1; a band may go a little beyond. */
const upToOne = (found) => (found.min >= 0 && found.max > 0.95 && found.max <= 1.1 ? 1 : null);

/** Of one run: its curves. Of several: the curves of the first; the colours of the runs are named once above. */
function keysOf(series, chosen) {
  if (!several || chosen.length === 1) return series.map(key);
  const first = new Map();
  for (const one of series) if (!first.has(one.place)) first.set(one.place, one);
  return [...first.values()].map((one) => key({ ...one, run: 6, name: one.name.slice(runs[one.run].label.length + 2) }));
}
