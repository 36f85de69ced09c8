// The curves of the learning, in groups, with the frontier of reward against KL.

const custom = (run) => Object.keys(run.evaluations.of).filter((name) => !name.endsWith("_se") && !USUAL.has(name)
  && !/^eval\/(greedy_|judge\/|raw_|rewards\/|logps\/|objective\/)/.test(name));
const USUAL = new Set(["eval/reward", "eval/win_rate", "eval/win_rate_previous", "eval/win_rate_reference", "eval/kl", "eval/length",
  "eval/eos_rate", "eval/distinct", "eval/loss", "eval/accuracy", "eval/margin", "eval/min_reward", "eval/mean_reward", "eval/max_reward"]);
const sources = (run, end) => Object.keys(run.curves.of).filter((name) => /^rewards\/[^/]+\/[^/]+$/.test(name) && name.endsWith(end))
  .map((name) => [name, name.slice("rewards/".length, -end.length)]);

const GROUPS = [
  ["Does it get better?", [
    { title: "Reward", unit: "score", metrics: [["objective/scores", "training"], ["eval/reward", "evaluation"], ["eval/greedy_reward", "greedy"], ["eval/raw_reward", "before penalties"]], help: "Mean score of the completions, after penalties. The band is one standard error." },
    { title: "Win rate", unit: "share", metrics: [["eval/win_rate", "against the initial policy"], ["eval/greedy_win_rate", "the same, greedy"], ["eval/win_rate_previous", "against the previous evaluation"], ["eval/win_rate_reference", "against the reference answers"]], help: "Ties count half. 0.5: no better." },
    { title: "Held-out loss", metrics: [["eval/loss", "evaluation"]] },
    { title: "Held-out accuracy", unit: "share", metrics: [["eval/accuracy", "reward model"], ["eval/rewards/accuracies", "implicit reward"]] },
    { title: "Scores of the reward model", metrics: [["eval/mean_reward", "mean"], ["eval/min_reward", "smallest"], ["eval/max_reward", "largest"], ["eval/margin", "margin"]] },
    { title: "Metrics of eval.metrics", metrics: (run) => custom(run).map((name) => [name, name.slice("eval/".length)]), help: "What the file in eval.metrics returns." },
  ]],
  ["How far has it gone?", [
    { title: "KL to the reference", unit: "nats per completion", metrics: (run) => (run.online ? [["objective/kl", "training pairs"], ["eval/kl", "evaluation"]] : []) },
    { title: "Log-ratio on the pairs", unit: "nats per completion", metrics: (run) => (run.online ? [] : [["objective/kl", "pairs of the file"]]), help: "Mean of policy to reference on texts that the policy did not sample: no KL." },
    { title: "Length", unit: "tokens", metrics: [["response_length/mean", "training"], ["eval/length", "evaluation"], ["eval/greedy_length", "greedy"]], help: "Mean tokens of a completion." },
    { title: "Ended with EOS", unit: "share", metrics: [["val/contain_eos_token", "training"], ["eval/eos_rate", "evaluation"]], help: "Completions that ended by themselves; the others were cut at the longest length." },
    { title: "Distinct answers", unit: "share", metrics: [["rollout/distinct", "training"], ["eval/distinct", "evaluation"]], help: "Different completions of a step, over all of its completions." },
    { title: "Entropy", unit: "nats per completion", metrics: [["objective/entropy", "training pairs"]] },
    { title: "Score and length", unit: "correlation", metrics: [["score/length_correlation", "between completions of a prompt"]], help: "Near 1: longer answers score better." },
  ]],
  ["What are the pairs like?", [
    { title: "Score margin", unit: "chosen minus rejected", metrics: [["pair/margin", "pairs"], ["objective/scores_margin", "best minus worst of a prompt"]], zero: true },
    { title: "Ties", unit: "share", metrics: [["pair/tie_rate", "tie rate"], ["judge/position_flip", "verdict changes with the order"]], zero: true },
    { title: "Dropped and missing", unit: "number in a step", metrics: [["pair/dropped", "prompts without a pair"], ["pair/missing", "no two scores or no verdict"], ["score/missing", "completions without a score"], ["pair/too_different", "lengths too different"], ["data/dropped", "rows left out so far"]], zero: true },
    { title: "Spread of the scores", metrics: [["score/std", "standard deviation"], ["score/at_max", "share at the highest score"]], zero: true },
    { title: "Length difference", unit: "tokens, chosen minus rejected", metrics: [["pair/length_difference", "pairs"]] },
    { title: "Judge and scores agree", unit: "share", metrics: [["judge/agrees_with_scores", "comparisons"]] },
  ]],
  ["Sources of rewards", [
    { title: "Mean of each source", unit: "as it scored", metrics: (run) => sources(run, "/mean") },
    { title: "Spread of each source", unit: "standard deviation", metrics: (run) => sources(run, "/std"), zero: true },
    { title: "Missing scores of each source", unit: "number in a step", metrics: (run) => sources(run, "/missing"), zero: true },
  ]],
  ["The optimiser", [
    { title: "Loss", metrics: [["loss", "training"]] },
    { title: "Implicit rewards", unit: "beta x log-ratio", metrics: [["rewards/chosen", "chosen"], ["rewards/rejected", "rejected"], ["rewards/margins", "margin"], ["eval/rewards/margins", "margin, held out"]] },
    { title: "Implicit accuracy", unit: "share", metrics: [["rewards/accuracies", "pairs with a margin above 0"], ["accuracy", "reward model"]] },
    { title: "Log-probs of both sides", unit: "nats per completion", metrics: [["logps/chosen", "chosen"], ["logps/rejected", "rejected"]], help: "If both fall while accuracy rises, the texts may become worse." },
    { title: "Gradient norm", metrics: [["grad_norm", "before clipping"]], zero: true },
    { title: "Learning rate", metrics: [["learning_rate", "learning rate"]], zero: true },
    { title: "Scores of the reward model in training", metrics: [["mean_reward", "mean"], ["min_reward", "smallest"], ["max_reward", "largest"], ["margin", "margin"]] },
  ]],
  ["Policy and engine", [
    { title: "Effective sample size", unit: "share", metrics: [["offpolicy/ess", "completions"]], help: "Near 0: the sampled completions say little about the policy that trains on them." },
    { title: "Log-probs, engine against trainer", unit: "nats", metrics: [["rollout/logp_diff_mean", "mean difference"], ["rollout/logp_diff_max", "largest difference"], ["sync/probe_difference", "probe"]], zero: true },
    { title: "Version lag", unit: "updates", metrics: [["sync/version_lag", "weights that sampled"]], zero: true },
  ]],
];

/** The key of the runs' colours, where there are several. */
function runKeys() {
  if (!several) return null;
  return el("ul", { class: "keys", "aria-label": "Runs" }, ...runs.map((run, index) => key({ run: index, place: 0, name: run.label, evaluated: true })));
}

/** A strip of what happened when. */
function rail() {
  const kinds = ["verdict", "fault", "recovery", "resume", "checkpoint"];
  const present = kinds.filter((kind) => runs.some((run) => run.marks.some((mark) => mark.kind === kind && known(mark.step))));
  const rows = [...present, ...(runs.some((run) => run.evaluations.steps.length) ? ["evaluation"] : [])].reverse();
  const titles = rows.map((kind) => (kind === "evaluation" ? "Evaluations" : MARKS[kind].title));
  const points = [];
  runs.forEach((run, index) => {
    run.evaluations.steps.forEach((step) => points.push({ kind: "evaluation", step, text: "evaluation", run: index }));
    run.marks.forEach((mark) => { if (present.includes(mark.kind) && known(mark.step)) points.push({ ...mark, run: index }); });
  });
  if (!points.length) return null;
  const counts = rows.map((kind, index) => `${titles[index]}: ${points.filter((point) => point.kind === kind).length}`);
  const made = figure({
    title: "What happened when", unit: "over steps", summary: `${counts.reverse().join(", ")}.`, kind: "rail", keys: several ? [] : markKeys(present),
    draw: () => ({
      yAxis: { type: "category", data: titles, axisLabel: { interval: 0, margin: 14 } },
      tooltip: { trigger: "item", formatter: (found) => tip(`step ${found.data.mark.step}`, [[found.data.mark.text.slice(0, 300), several ? runs[found.data.mark.run].label : ""]]) },
      series: [{ type: "scatter", symbolSize: 9, data: points.map((mark) => ({
        value: [mark.step, rows.indexOf(mark.kind)], mark, symbol: mark.kind === "evaluation" ? "circle" : MARKS[mark.kind].symbol,
        itemStyle: { color: color(several ? `--c${mark.run % 7}` : mark.kind === "evaluation" ? "--c0" : MARKS[mark.kind].color) },
      })) }],
    }),
  });
  made.querySelector(".plot").style.height = `${44 + 22 * rows.length}px`;
  return made;
}

function markKeys(present) {
  return present.filter((kind) => MARKS[kind].dash).map((kind) => {
    const picture = svgElement("svg", { width: 14, height: 12, "aria-hidden": "true" });
    const pattern = MARKS[kind].dash === "solid" ? "" : MARKS[kind].dash.join(" ");
    picture.append(svgElement("line", { x1: 7, x2: 7, y1: 0, y2: 12, "stroke-width": 2, "stroke-dasharray": pattern, style: `stroke: var(${MARKS[kind].color})` }));
    return el("li", {}, picture, `${MARKS[kind].title.toLowerCase()}: a line in every chart`);
  });
}

/** All events with their messages. */
function happened() {
  const rows = runs.flatMap((run) => run.marks.map((mark) => [clock(mark.time) || "\u2013", ...(several ? [run.label] : []), known(mark.step) ? right(String(mark.step)) : right("\u2013"), mark.kind, { body: visible(mark.text) }]));
  if (!rows.length) return null;
  return el("details", {}, el("summary", {}, `Events (${rows.length})`),
    table({ caption: "Starts, checkpoints, faults, recoveries and verdicts, times in UTC", heads: ["time", ...(several ? ["run"] : []), right("step"), "what", "message"], rows }));
}

/** Mix of the colours of the first and the last step. */
function stepColor(share) {
  const mix = ["--step-first", "--step-last"].map((name) => color(name).match(/[0-9a-f]{2}/gi).map((part) => parseInt(part, 16)));
  return `rgb(${mix[0].map((part, index) => Math.round(part + (mix[1][index] - part) * share)).join(", ")})`;
}

/** Reward against KL: the picture of a policy that pleases the reward and goes too far. */
function frontier() {
  const found = runs.map((run, index) => {
    const [reward, kl] = [evaluations(run, "eval/reward") || evaluations(run, "eval/win_rate"), evaluations(run, "eval/kl")];
    const points = reward && kl ? kl.x.map((step, place) => ({ step, kl: kl.y[place], reward: reward.y[place], klError: kl.se && kl.se[place], rewardError: reward.se && reward.se[place], run: index }))
      .filter((point) => known(point.kl) && known(point.reward)) : [];
    const [scores, distance] = [curve(run, "objective/scores"), curve(run, "objective/kl")];
    const steps = scores && distance && run.online && !run.scaled ? new Map(scores.x.map((step, place) => [step, scores.y[place]])) : new Map();
    const training = steps.size ? distance.x.map((step, place) => ({ step, kl: distance.y[place], reward: steps.get(step), run: index })).filter((point) => known(point.kl) && known(point.reward)) : [];
    return { index, points, training };
  }).filter(({ points, training }) => points.length || training.length);
  if (!found.length) return null;
  const last = Math.max(...found.flatMap(({ points, training }) => [...points, ...training].map((point) => point.step)), 1);
  const words = found.map(({ index, points }) => (points.length ? `${several ? `${runs[index].label}: ` : ""}from reward ${shown(points[0].reward)} at KL ${shown(points[0].kl)} to reward ${shown(points[points.length - 1].reward)} at KL ${shown(points[points.length - 1].kl)}.` : "")).join(" ");
  const rest = el("li", {}, "step 0 ", el("span", { class: "ramp", "aria-hidden": "true" }), ` step ${last}`);
  return figure({
    title: "Reward against KL", unit: "evaluations with one standard error, joined in order; small dots: training steps", tall: true, summary: words, keys: [rest],
    help: "A policy that learns well moves up and a little to the right. To the right without going up: it changes and gains nothing. Up and far to the right: look at the texts.",
    draw: () => ({
      xAxis: { name: "KL to the reference, nats", nameLocation: "middle", nameGap: 22, min: 0, max: undefined, splitLine: { show: true, lineStyle: { color: color("--faint") } } },
      yAxis: { type: "value", scale: true, name: "reward", nameTextStyle: { align: "left", color: color("--soft") } },
      grid: { left: 6, right: 20, top: 26, bottom: 18 },
      tooltip: { trigger: "item", formatter: (one) => frontierTip(one.data.point) },
      series: found.flatMap(({ index, points, training }) => frontierSeries(index, points, training, last)),
    }),
  });
}

function frontierTip(point) {
  if (!point) return "";
  const value = (number, error) => shown(number) + (known(error) ? ` \u00b1 ${shown(error)}` : "");
  return tip(`${several ? `${runs[point.run].label}, ` : ""}step ${point.step}`, [["reward", value(point.reward, point.rewardError)], ["KL", value(point.kl, point.klError)]]);
}

function frontierSeries(index, points, training, last) {
  const line = several ? color(`--c${index % 7}`) : color("--soft");
  const bars = points.flatMap((point) => [
    known(point.rewardError) ? [{ coord: [point.kl, point.reward - point.rewardError] }, { coord: [point.kl, point.reward + point.rewardError] }] : null,
    known(point.klError) ? [{ coord: [point.kl - point.klError, point.reward] }, { coord: [point.kl + point.klError, point.reward] }] : null,
  ]).filter(Boolean);
  const dot = (point, extra) => ({ value: [point.kl, point.reward], point, itemStyle: { color: stepColor(point.step / last), ...extra } });
  return [
    { type: "scatter", data: training.map((point) => dot(point, { opacity: 0.75 })), symbolSize: 4, z: 2 },
    { type: "line", data: points.map((point) => [point.kl, point.reward]), symbol: "none", silent: true, lineStyle: { color: line, width: 1.2, type: DASHES[several ? index % DASHES.length : 0] }, z: 3,
      markLine: { silent: true, symbol: "none", label: { show: false }, lineStyle: { color: line, width: 1, type: "solid" }, data: bars } },
    { type: "scatter", data: points.map((point) => dot(point, { borderColor: several ? line : color("--ink"), borderWidth: several ? 2 : 1 })), symbol: SYMBOLS[several ? index % SYMBOLS.length : 0], symbolSize: 12, z: 4 },
  ];
}

/** Every evaluation as numbers. */
function evaluationTable() {
  const shownRuns = runs.filter((run) => run.evaluations.steps.length);
  return shownRuns.map((run) => {
    const names = Object.keys(run.evaluations.of).filter((name) => !name.endsWith("_se") && !name.startsWith("eval/judge/"));
    const rows = run.evaluations.steps.map((step, place) => [String(step), ...names.map((name) => right(withError(run.evaluations.of[name][place], (run.evaluations.of[`${name}_se`] || [])[place])))]);
    return el("details", {}, el("summary", {}, `Evaluations in numbers${several ? `: ${run.label}` : ""} (${rows.length})`),
      table({ caption: `Every evaluation${several ? ` of ${run.label}` : ""}, with standard errors`, heads: ["step", ...names.map((name) => right(name.slice("eval/".length)))], rows }));
  });
}

/** One chart of any metric. */
function anyMetric() {
  const names = [...new Set(runs.flatMap((run) => [...Object.keys(run.curves.of), ...Object.keys(run.evaluations.of)]))].filter((name) => !name.endsWith("_se")).sort();
  if (!names.length) return [];
  const place = el("div", { class: "grid" });
  const draw = (name) => {
    place.replaceChildren(stepChart({ title: name, metrics: [[name, "value"]], tall: true }) || "");
    forget();
  };
  const choice = el("select", { id: "any-metric", change: (event) => draw(event.target.value) }, ...names.map((name) => el("option", {}, name)));
  const box = el("details", { id: "any", class: "no-print", toggle: (event) => { if (event.target.open) draw(choice.value); } },
    el("summary", {}, `Any metric (${names.length})`), el("p", {}, el("label", { for: "any-metric" }, "Metric "), choice), place);
  return [box];
}

function drawLearning() {
  const parts = [];
  const bucket = Math.max(...runs.map((run) => run.curves.bucket));
  const thinned = bucket > 1 ? ` Of every ${bucket.toLocaleString("en")} steps the smallest and the largest value are drawn.` : "";
  parts.push(el("p", { class: "note" }, `Lines without symbols: training steps. Lines with symbols: evaluations, with a band of one standard error.${thinned}`));
  const strip = rail();
  if (several) parts.push(runKeys());
  if (strip) parts.push(el("div", { class: "grid" }, strip));
  parts.push(happened());
  GROUPS.forEach(([title, specs], place) => {
    const zeros = [];
    const made = specs.map((spec) => stepChart(spec, runs, zeros)).filter(Boolean);
    const big = place === 0 ? frontier() : null;
    const scaled = place === 0 && runs.some((run) => run.scaled) ? el("p", { class: "note small" }, "Scores of training steps are in units of each source's running standard deviation; those of evaluations are not.") : null;
    if (made.length || big || zeros.length) parts.push(el("h3", {}, title), scaled, el("div", { class: "grid" }, ...made, big));
    if (zeros.length) parts.push(el("p", { class: "note small always" }, `0 at every step, and not drawn: ${zeros.join(", ")}.`));
  });
  if (!charts.length) parts.push(el("p", { class: "note" }, "There are no numbers yet."));
  parts.push(...evaluationTable(), ...anyMetric());
  fill("learning-body", parts);
}
