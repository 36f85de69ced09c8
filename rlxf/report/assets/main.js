// Puts the page together.

/** Draw a part of the page; one that cannot be drawn leaves the others as they are. */
function attempt(id, draw) {
  try {
    draw();
  } catch (error) {
    console.error(error);
    fill(id, el("p", { class: "note" }, `This part cannot be drawn: ${error.message}`));
  }
}

function drawRun(index) {
  const run = runs[index];
  attempt("pairs-body", () => drawPairs(run));
  attempt("answers-body", () => drawAnswers(run));
  attempt("machine-body", () => drawMachine(run));
  forget();
}

function setTheme(theme) {
  if (theme) document.documentElement.dataset.theme = theme;
  else delete document.documentElement.dataset.theme;
  renderAgain(false);
}

/** A choice that stays while the page is open; a browser may forbid pages of files to keep anything. */
function remembered(name, value) {
  try {
    if (value !== undefined) localStorage.setItem(`rlxf-${name}`, value);
    return localStorage.getItem(`rlxf-${name}`) || "";
  } catch {
    return "";
  }
}

const RELOAD_S = 30;
const goesOn = () => report.follows && runs.some((run) => run.state.word === "running");

/** A page that is renewed can be loaded again by itself, where its reader wants that. */
function offerReload() {
  if (!goesOn()) return;
  const box = el("input", { type: "checkbox", id: "reload", checked: remembered("reload") === "yes", change: () => { remembered("reload", box.checked ? "yes" : "no"); } });
  document.querySelector(".controls").prepend(el("label", {}, box, ` load again every ${RELOAD_S} s`));
  setInterval(() => { if (box.checked) location.reload(); }, RELOAD_S * 1000);
}

function drawFoot() {
  const made = new Date(report.made);
  const age = el("span", {});
  const tell = () => { age.textContent = ` (${duration(Math.max((Date.now() - made) / 1000, 0))} ago)`; };
  tell();
  setInterval(tell, 30000);
  const more = goesOn() ? " It is renewed while the run goes on: reload it to see more." : "";
  fill("foot", el("p", {}, `Made by rlxf ${report.version} at ${clock(report.made)} UTC`, age, `.${more} This file holds all its data and asks no network for anything. Curves: Apache ECharts, Apache License 2.0.`));
}

const themes = document.getElementById("theme");
themes.value = remembered("theme");
themes.addEventListener("change", () => setTheme(remembered("theme", themes.value) || themes.value));
if (themes.value) document.documentElement.dataset.theme = themes.value;
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => renderAgain(false));

if (several) {
  document.getElementById("run-choice").hidden = false;
  const choice = document.getElementById("run");
  choice.append(...runs.map((run, index) => el("option", { value: index }, run.label)));
  choice.addEventListener("change", () => drawRun(Number(choice.value)));
}

attempt("top-body", drawTop);
attempt("learning-body", drawLearning);
drawRun(0);
drawFoot();
offerReload();

let waiting = 0;
addEventListener("resize", () => { clearTimeout(waiting); waiting = setTimeout(() => renderAgain(false), 150); });

// Paper: every section open, every chart drawn, in the light colours.
let closed = [];
addEventListener("beforeprint", () => {
  closed = [...document.querySelectorAll("details:not([open]):not(.no-print)")];
  for (const one of closed) one.open = true;
  renderAgain(true);
});
addEventListener("afterprint", () => {
  for (const one of closed) one.open = false;
  renderAgain(false);
});
document.documentElement.dataset.ready = "true";
