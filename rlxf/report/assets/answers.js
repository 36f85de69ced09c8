// One prompt of the evaluation set through time.

const through = { prompt: 0, shaded: false };

function drawAnswers(run) {
  const data = run.answers;
  if (!data.rows.length) {
    const why = run.evaluations.steps.length && run.online ? [el("h3", {}, "One prompt through time"), el("p", { class: "note" }, "The evaluations of this run recorded no answers (log.eval_answers).")] : [];
    fill("answers-body", why);
    return;
  }
  through.prompt = 0;
  const choice = el("select", { id: "prompt", change: (event) => { through.prompt = Number(event.target.value); drawPrompt(run); } },
    ...data.prompts.map((prompt, place) => el("option", { value: place }, `${place + 1}: ${oneLine(prompt).replace(/\s+/g, " ").slice(0, 80)}`)));
  const tokens = data.rows.some((row) => row.answers.some((answer) => answer.t));
  const shaded = el("input", { type: "checkbox", id: "shaded", checked: through.shaded, change: (event) => { through.shaded = event.target.checked; drawPrompt(run); } });
  const thinned = data.rows.length < data.total ? ` ${data.rows.length} of ${data.total} evaluations are shown.` : "";
  fill("answers-body", el("h3", {}, "One prompt through time"),
    el("p", { class: "note" }, `What the policy answered to the same prompt at each evaluation, sampled at temperature 1.${thinned}`),
    el("div", { class: "filters" }, el("label", { for: "prompt" }, "Prompt"), choice, tokens ? el("label", {}, shaded, " shade tokens by their log-ratio") : null),
    el("div", { id: "prompt-body" }));
  drawPrompt(run);
}

function drawPrompt(run) {
  const data = run.answers;
  const rows = data.rows.map((row) => [row.step, row.answers.find((answer) => answer.p === through.prompt)]).filter(([, answer]) => answer);
  const series = (name, place) => ({ x: rows.map(([step]) => step), y: rows.map(([, answer]) => answer[name]), name: "this answer", run: runs.indexOf(run), place, evaluated: true });
  const plots = [["Score", "score", null], ["KL", "kl", "nats"], ["Length", "length", "tokens"]].map(([title, name, unit], place) => {
    const found = series(name, several ? 0 : place);
    return found.y.some(known) ? figure({ title, unit, summary: inWords([found]), draw: () => ({ series: lines([found], { marks: false }), tooltip: stepTip([found]) }) }) : null;
  }).filter(Boolean);
  const readout = newReadout();
  const body = rows.map(([step, answer]) => [String(step), right(shown(answer.score)), right(shown(answer.kl)), right(`${shown(answer.length)}${answer.eos === false ? ", cut" : ""}`),
    { body: through.shaded && answer.t ? tokenNodes(answer.t, readout) : el("div", { class: "text", dir: "auto" }, ...visible(whole(answer.text)[0]), cutNote(whole(answer.text)[1])) }]);
  document.getElementById("prompt-body").replaceChildren(
    el("div", { class: "prompt" }, el("p", { class: "label" }, "Prompt"), ...promptNodes(data.prompts[through.prompt])),
    el("div", { class: "grid", style: "margin: 0.8rem 0" }, ...plots),
    ...(through.shaded ? [el("div", { class: "stays" }, shadeKey(), readout)] : []),
    table({ caption: "Answers by step", heads: ["step", right("score"), right("KL, nats"), right("tokens"), "answer"], rows: body, kind: "answers" }));
  forget();
}
