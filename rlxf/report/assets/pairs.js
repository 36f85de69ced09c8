// The browser of pairs.

const SORTS = {
  newest: ["newest step first", (a, b) => b.step - a.step || a.place - b.place],
  oldest: ["oldest step first", (a, b) => a.step - b.step || a.place - b.place],
  margin: ["largest margin first", (a, b) => compare(b.margin, a.margin)],
  close: ["smallest margin first", (a, b) => compare(a.margin, b.margin, true)],
  length: ["longest first", (a, b) => compare(lengthOf(b), lengthOf(a))],
  longer: ["chosen longer first", (a, b) => compare(longerBy(b), longerBy(a))],
  kl: ["largest KL first", (a, b) => compare(klOf(b), klOf(a))],
};
const PAGE = 150; // rows that are added to the list at a time
const browser = { rows: [], shown: [], selected: -1, mode: "words", made: 0 };

/** Unknown numbers stand last. */
function compare(one, other, ascending) {
  const worst = ascending ? Infinity : -Infinity;
  const [a, b] = [known(one) ? one : worst, known(other) ? other : worst];
  return a === b ? 0 : a - b;
}

const textOf = (side) => whole(side.text)[0];
const sideLength = (side) => (known(side.length) ? side.length : textOf(side).length);
const lengthOf = (row) => Math.max(sideLength(row.s[0]), sideLength(row.s[1]));
const longerBy = (row) => sideLength(row.s[0]) - sideLength(row.s[1]);
const klOf = (row) => (known(row.s[0].kl) || known(row.s[1].kl) ? Math.max(row.s[0].kl ?? -Infinity, row.s[1].kl ?? -Infinity) : null);

function drawPairs(run) {
  const data = run.pairs;
  if (!data.rows.length) {
    const why = run.online ? "This run has shown no pairs yet: samples.jsonl has no rows (log.samples_interval says how often it gets some)." : "The pairs of this run come from its data file; nothing was sampled.";
    fill("pairs-body", el("p", { class: "note" }, why));
    return;
  }
  browser.rows = data.rows.map((row, place) => ({ ...row, place, prompt: data.prompts[row.p], found: null }));
  const steps = [...new Set(browser.rows.map((row) => row.step))];
  const search = el("input", { type: "search", id: "search", placeholder: "words", "aria-label": "Search words in prompts, chosen and rejected texts", input: () => refresh() });
  const sort = el("select", { id: "sort", change: () => refresh() }, ...Object.entries(SORTS).map(([value, [title]]) => el("option", { value }, title)));
  const step = el("select", { id: "step", change: () => refresh() }, el("option", { value: "" }, "all steps"), ...steps.map((one) => el("option", { value: one }, `step ${one}`)));
  const count = el("span", { class: "count", id: "count", role: "status" });
  const list = el("div", { class: "list", id: "list", role: "listbox", tabindex: "0", "aria-label": "Pairs", scroll: () => extend(), keydown: listKeys, click: (event) => { const item = event.target.closest(".item"); if (item) select(Number(item.dataset.place)); } });
  const detail = el("div", { class: "detail", id: "detail", role: "region", "aria-label": "The pair", tabindex: "-1" });
  const thinned = data.rows.length < data.total ? ` ${data.rows.length.toLocaleString("en")} of the ${data.total.toLocaleString("en")} pairs in samples.jsonl are on this page: all of the newest, and evenly spaced ones of the older.` : "";
  const tokens = data.tokenised ? ` ${data.tokenised.toLocaleString("en")} of them have numbers for each token.` : "";
  fill("pairs-body",
    el("p", { class: "note" }, `Pairs that the run trained on.${thinned}${tokens} Prompts and answers are shown as they are: nothing in them is masked.`),
    el("div", { class: "filters" }, el("span", { "aria-hidden": "true" }, "Search"), search, el("label", { for: "sort" }, "Sort"), sort, el("label", { for: "step" }, "Step"), step, count,
      el("span", { class: "soft small" }, el("kbd", {}, "j"), " ", el("kbd", {}, "k"), " next, previous \u00b7 ", el("kbd", {}, "/"), " search \u00b7 ", el("kbd", {}, "Enter"), " to the pair")),
    el("div", { class: "browser" }, list, detail));
  refresh();
}

function refresh() {
  const words = document.getElementById("search").value.toLowerCase().split(/\s+/).filter(Boolean);
  const step = document.getElementById("step").value;
  const order = SORTS[document.getElementById("sort").value][1];
  browser.shown = browser.rows.filter((row) => (!step || row.step === Number(step)) && matches(row, words)).sort(order);
  document.getElementById("count").textContent = `${browser.shown.length.toLocaleString("en")} of ${browser.rows.length.toLocaleString("en")} pairs`;
  const list = document.getElementById("list");
  list.replaceChildren();
  list.scrollTop = 0;
  browser.made = 0;
  extend();
  select(browser.shown.length ? 0 : -1);
}

function matches(row, words) {
  if (!words.length) return true;
  row.found = row.found || `${oneLine(row.prompt)}\n${textOf(row.s[0])}\n${textOf(row.s[1])}`.toLowerCase();
  return words.every((word) => row.found.includes(word));
}

/** Adds rows to the list while its end is near. */
function extend(upTo = 0) {
  const list = document.getElementById("list");
  while (browser.made < browser.shown.length && (browser.made <= upTo || list.scrollHeight - list.scrollTop - list.clientHeight < 400)) {
    const added = browser.shown.slice(browser.made, browser.made + PAGE).map((row, index) => item(row, browser.made + index));
    list.append(...added);
    browser.made += added.length;
  }
}

function item(row, place) {
  return el("div", { class: "item", role: "option", id: `pair-${place}`, "data-place": place, "aria-selected": "false", "aria-posinset": place + 1, "aria-setsize": browser.shown.length },
    el("div", { class: "line", dir: "auto" }, ...visible(oneLine(row.prompt).slice(0, 120) || "(no prompt)")),
    el("div", { class: "line soft", dir: "auto" }, ...visible(textOf(row.s[0]).slice(0, 120))),
    el("div", { class: "meta" }, el("span", {}, `step ${row.step}`), el("span", {}, `margin ${shown(row.margin)}`),
      known(row.s[0].length) ? el("span", {}, `${row.s[0].length} / ${row.s[1].length} tokens`) : null, known(klOf(row)) ? el("span", {}, `KL ${shown(klOf(row))}`) : null));
}

function select(place) {
  const list = document.getElementById("list");
  const before = document.getElementById(`pair-${browser.selected}`);
  if (before) before.setAttribute("aria-selected", "false");
  browser.selected = place;
  if (place < 0) {
    list.removeAttribute("aria-activedescendant");
    document.getElementById("detail").replaceChildren(el("p", { class: "note" }, "No pair matches."));
    return;
  }
  extend(place);
  const now = document.getElementById(`pair-${place}`);
  now.setAttribute("aria-selected", "true");
  list.setAttribute("aria-activedescendant", now.id);
  if (now.offsetTop < list.scrollTop) list.scrollTop = now.offsetTop;
  else if (now.offsetTop + now.offsetHeight > list.scrollTop + list.clientHeight) list.scrollTop = now.offsetTop + now.offsetHeight - list.clientHeight;
  drawDetail(browser.shown[place]);
}

function step(by) {
  if (browser.shown.length) select(Math.min(Math.max(browser.selected + by, 0), browser.shown.length - 1));
}

function listKeys(event) {
  const moves = { ArrowDown: 1, ArrowUp: -1, PageDown: 8, PageUp: -8, Home: -1e9, End: 1e9 };
  if (!(event.key in moves)) return;
  step(moves[event.key]);
  event.preventDefault();
}

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || !document.getElementById("list")) return;
  const typing = event.target.closest("input, select, textarea");
  if (typing) {
    if (event.key === "Escape" && typing.id === "search") document.getElementById("list").focus();
    return;
  }
  if (event.key === "j") step(1);
  else if (event.key === "k") step(-1);
  else if (event.key === "/") document.getElementById("search").focus();
  else if (event.key === "Enter" && (event.target.id === "list" || event.target === document.body)) document.getElementById("detail").focus();
  else return;
  event.preventDefault();
  if (event.key !== "Enter") document.getElementById("pairs").scrollIntoView({ block: "nearest" });
});

function drawDetail(row) {
  const mode = browser.mode === "tokens" && !row.t ? "words" : browser.mode;
  const choice = (value, title, off) => el("label", {}, el("input", { type: "radio", name: "mode", value, checked: mode === value, disabled: off, change: () => { browser.mode = value; drawDetail(row); document.querySelector(`input[name=mode][value=${value}]`).focus(); } }), ` ${title}`);
  const texts = row.s.map(textOf);
  const words = texts.map(wordsOf);
  const own = mode === "words" ? difference(...words) : null;
  const long = mode === "words" && !own ? el("p", { class: "note" }, "The texts are too long to compare.") : null;
  const body = (side) => {
    if (mode === "tokens") return tokenNodes(row.t[side]);
    return [el("div", { class: "text", dir: "auto" }, ...(own ? markedNodes(words[side], own[side]) : visible(texts[side])), cutNote(whole(row.s[side].text)[1]))];
  };
  const facts = [`step ${row.step}`, known(row.v) ? `sampled by policy version ${row.v}` : null, known(row.margin) ? `margin ${shown(row.margin)}` : null].filter(Boolean).join(" \u00b7 ");
  document.getElementById("detail").replaceChildren(...[
    el("div", { class: "prompt" }, el("p", { class: "label" }, `Prompt \u00b7 ${facts}`), ...promptNodes(row.prompt)),
    el("fieldset", {}, el("legend", {}, "Show"), choice("words", "words that differ"), choice("tokens", "log-ratio of each token", !row.t), choice("plain", "plain text")),
    row.t || !row.more ? null : el("p", { class: "note small no-print" }, "The numbers for each token of this pair are in samples.jsonl; the page has room for those of some pairs."),
    mode === "tokens" ? shadeKey() : null,
    mode === "words" && own ? el("p", { class: "soft small" }, el("span", { class: "chosen" }, el("mark", {}, "only in chosen")), " ", el("span", { class: "rejected" }, el("mark", {}, "only in rejected"))) : null,
    long,
    el("div", { class: "sides" }, side("chosen", row.s[0], body(0)), side("rejected", row.s[1], body(1))),
  ].filter(Boolean));
}

function side(name, found, body) {
  const fact = (label, value) => el("div", {}, el("dt", {}, label), el("dd", {}, value));
  return el("article", { class: `side ${name}`, "aria-label": name },
    el("h3", {}, name === "chosen" ? "Chosen" : "Rejected"),
    el("dl", {}, known(found.score) ? fact("score", shown(found.score)) : null,
      ...Object.entries(found.scores || {}).map(([source, value]) => fact(source, shown(value))),
      known(found.length) ? fact("tokens", String(found.length)) : null, known(found.kl) ? fact("KL", `${shown(found.kl)} nats`) : null,
      known(found.eos) ? fact("end", found.eos ? "by itself" : "cut") : null),
    ...body);
}
