// Where the time and the memory went.

const STAGES = [["gen", "sampling"], ["adv", "scores and pairs"], ["ref", "reference"], ["update_actor", "update"], ["sync", "push of weights"], ["eval", "evaluation"], ["save", "checkpoint"]];
const ROLES = [["train", "train"], ["infer", "infer"], ["ref", "reference"], ["reward", "reward"]];
const roles = (before, after) => ROLES.map(([role, title]) => [`${before}${role}${after}`, title]);

const MACHINE = [
  { title: "Idle", unit: "share of the step in which a role had nothing to do", metrics: roles("timing/idle_", ""), min: 0, max: 1, interval: 0.25 },
  { title: "Waits", unit: "seconds of a step", metrics: [["pipeline/wait_rollout_s", "trainer waits for data"], ["pipeline/wait_train_s", "engines wait for weights"]], zero: true },
  { title: "Sampled tokens", unit: "per second", metrics: [["rollout/tokens_per_s", "tokens per second"]], zero: true },
  { title: "Use of the devices", unit: "share of their peak (MFU), and of their time", metrics: [...STAGES.slice(0, 4).map(([name, title]) => [`speed/${name}_mfu`, title]), ["speed/busy", "time at work"]], zero: true },
  { title: "Tail of the sampling", unit: "seconds with less than half of the slots busy", metrics: [["rollout/tail_s", "tail"]], zero: true },
  { title: "Balance of the sampling", unit: "ratio", metrics: [["rollout/longest_over_mean", "longest over mean completion"], ["rollout/imbalance", "busiest over mean engine"]], zero: true },
  { title: "Resident memory", unit: "GiB", metrics: [...roles("memory/", "_rss_gib"), ["memory/driver_rss_gib", "driver"], ["memory/node_rss_gib", "fullest node"]], zero: true },
  { title: "Device memory", unit: "GiB, largest so far", metrics: roles("memory/", "_device_gib"), zero: true },
  { title: "Size of a push", unit: "MiB", metrics: [["sync/bytes", "pushed"]], scale: 2 ** -20, zero: true },
  { title: "Seconds of a push", unit: "s", metrics: [["timing/sync", "push"]], zero: true },
  { title: "Judge", unit: "questions of a step", metrics: [["judge/asked", "asked"], ["judge/cached", "answered from earlier verdicts"], ["judge/missing", "without a verdict"]], zero: true },
];

/** Seconds of each stage, stacked. */
function stages(run) {
  const data = run.stages;
  const every = STAGES.map(([name, title], place) => ({ name: title, x: data.steps, y: data.of[name], place })).filter((one) => one.y);
  const seconds = (one) => one.y.reduce((sum, value) => sum + (value || 0), 0);
  const whole = every.reduce((sum, one) => sum + seconds(one), 0);
  const found = every.filter((one) => seconds(one) > 0.001 * whole);
  if (!found.length) return null;
  const words = found.map((one) => `${one.name} ${Math.round((100 * seconds(one)) / whole)} %`).join(", ");
  const few = data.steps.length <= 60;
  const bucket = data.bucket > 1 ? `, mean of every ${data.bucket} steps` : "";
  return figure({
    title: "Stages of a step", unit: `seconds, stacked${bucket}: ${words}. Stages that overlap count each by itself.`, tall: true, summary: words,
    keys: found.map((one) => patternKey(one)),
    draw: () => ({
      aria: { enabled: true, label: { enabled: false }, decal: { show: true } },
      xAxis: few ? { type: "category", data: data.steps.map(String), min: undefined, max: undefined } : {},
      yAxis: { type: "value", splitNumber: 4 },
      tooltip: { formatter: (points) => {
        const place = [points].flat()[0].dataIndex;
        return tip(`step ${data.steps[place]}`, found.map((one) => [one.name, `${shown(one.y[place])} s`]).reverse());
      } },
      series: found.map((one) => ({
        type: few ? "bar" : "line", stack: "all", name: one.name, symbol: "none", color: color(`--c${one.place % 7}`), barCategoryGap: "15%",
        lineStyle: { width: 0.5 }, areaStyle: few ? undefined : { opacity: 0.8 }, emphasis: { disabled: true },
        data: one.x.map((x, place) => (few ? one.y[place] || 0 : [x, one.y[place] || 0])),
      })),
    }),
  });
}

function patternKey(one) {
  const picture = svgElement("svg", { width: 14, height: 10, "aria-hidden": "true" });
  picture.append(svgElement("rect", { width: 14, height: 10, style: `fill: var(--c${one.place % 7})` }));
  return el("li", {}, picture, one.name);
}

function planned(run) {
  if (!run.plan.length) return null;
  const rows = run.plan.map(([name, plan, measured]) => [el("code", {}, name), right(shown(plan)), right(shown(measured)), right(known(measured) && plan ? `${signed((100 * (measured - plan)) / plan, 0)} %` : "\u2013")]);
  return [el("h3", {}, "Planned and measured"), table({ titled: false, caption: "The plan is an estimate (plan.json); measured: the median of the second half of the steps", heads: ["metric", right("estimate"), right("measured"), right("difference")], rows })];
}

function drawMachine(run) {
  const stacked = stages(run);
  const zeros = [];
  const made = MACHINE.map((spec) => stepChart(spec, several ? runs : [run], zeros)).filter(Boolean);
  const parts = [];
  if (several) parts.push(el("p", { class: "note" }, `Stages: ${run.label}. The other charts show all runs.`), runKeys());
  if (stacked || made.length) parts.push(el("div", { class: "grid" }, stacked, ...made));
  else parts.push(el("p", { class: "note" }, "There are no numbers yet."));
  if (zeros.length) parts.push(el("p", { class: "note small always" }, `0 at every step, and not drawn: ${zeros.join(", ")}.`));
  parts.push(...[planned(run)].flat());
  fill("machine-body", parts);
}
