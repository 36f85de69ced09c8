// Elements, numbers and texts. Nothing here reads text as HTML: every text becomes a text node.

const report = JSON.parse(document.getElementById("data").textContent);
const runs = report.runs;
const several = runs.length > 1;

/** An element. Attributes that are null or false are left out; a function is a listener for its event. */
function el(tag, attributes, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (typeof value === "function") made.addEventListener(name, value);
    else if (value !== null && value !== undefined && value !== false) made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return made;
}

function svgElement(tag, attributes) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}

function fill(id, ...children) {
  document.getElementById(id).replaceChildren(...children.flat().filter(Boolean));
}

const known = (value) => value !== null && value !== undefined;

/** Four significant digits; a dash where there is no number. */
function shown(value) {
  if (!known(value)) return "\u2013";
  const size = Math.abs(value);
  if (value !== 0 && (size < 1e-3 || size >= 1e6)) return value.toExponential(2).replace("-", "\u2212").replace("+", "");
  return minus(String(Number(value.toPrecision(4))));
}

const minus = (text) => text.replace("-", "\u2212");

/** A number with its sign. */
const signed = (value, digits) => (known(value) ? (value < 0 ? "\u2212" : "+") + Math.abs(value).toFixed(digits) : "\u2013");

/** A value with two digits of its standard error. */
function withError(value, error) {
  if (!known(value)) return ["\u2013"];
  if (!known(error)) return [shown(value)];
  const decimals = error < 0.1 ? 3 : error < 1 ? 2 : error < 10 ? 1 : 0;
  return [minus(value.toFixed(Math.max(decimals, 2))), el("span", { class: "se" }, ` \u00b1 ${error.toFixed(decimals)}`)];
}

function duration(seconds) {
  if (!known(seconds)) return "";
  if (seconds < 90) return `${seconds.toFixed(seconds < 10 ? 1 : 0)} s`;
  const minutes = Math.round(seconds / 60);
  if (minutes < 90) return `${minutes} min`;
  const hours = Math.floor(minutes / 60);
  return hours < 48 ? `${hours} h ${minutes % 60} min` : `${Math.round(hours / 24)} days`;
}

/** Time of day in UTC, as in the files of the run. */
const clock = (iso) => iso.slice(0, 19).replace("T", " ");

// Characters that are not seen, or that turn the text around them. Joiners between letters belong to scripts and emoji.
const UNSEEN = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180e\u200b\u200e\u200f\u2028-\u202f\u2060-\u206f\u3164\ufe00-\ufe0e\ufeff\uffa0\ufff0-\ufffb]|[\u{e0000}-\u{e0fff}]|(?<![^\u0000-\u024f])[\u200c\u200d]|[\u200c\u200d](?![^\u0000-\u024f])|[\ud800-\udbff](?![\udc00-\udfff])|(?<![\ud800-\udbff])[\udc00-\udfff]/gu;

/** The nodes of a text, with what cannot be seen written out. */
function visible(text) {
  const nodes = [];
  let last = 0;
  for (const match of text.matchAll(UNSEEN)) {
    if (match.index > last) nodes.push(document.createTextNode(text.slice(last, match.index)));
    const code = match[0].codePointAt(0);
    const name = code < 0x20 ? String.fromCodePoint(0x2400 + code) : code === 0x7f ? "\u2421" : `U+${code.toString(16).toUpperCase().padStart(4, "0")}`;
    nodes.push(el("span", { class: "hidden-mark", title: `character U+${code.toString(16).toUpperCase().padStart(4, "0")}` }, name));
    last = match.index + match[0].length;
  }
  if (last < text.length) nodes.push(document.createTextNode(text.slice(last)));
  return nodes;
}

/** Text and number of characters that are left out, of a text of the data. */
const whole = (text) => (Array.isArray(text) ? text : [text, 0]);

function cutNote(left) {
  return left ? el("span", { class: "cut" }, ` \u2026 ${left.toLocaleString("en")} more characters are in the run folder`) : null;
}

/** A prompt on one line. */
function oneLine(prompt) {
  if (Array.isArray(prompt) && prompt.length && Array.isArray(prompt[0])) return prompt.map((m) => whole(m[1])[0]).join(" / ");
  return whole(prompt)[0];
}

/** A prompt with the roles of its messages. */
function promptNodes(prompt) {
  if (Array.isArray(prompt) && (!prompt.length || Array.isArray(prompt[0]))) {
    return prompt.map(([role, content]) => [
      el("span", { class: "role" }, ...visible(role)),
      el("div", { class: "text", dir: "auto" }, ...visible(whole(content)[0]), cutNote(whole(content)[1])),
    ]).flat();
  }
  return [el("div", { class: "text", dir: "auto" }, ...visible(whole(prompt)[0]), cutNote(whole(prompt)[1]))];
}

/** A table. Heads are texts or [text, class]; the first cell of a row is its head. */
function table({ caption, heads, rows, kind, titled }) {
  const cell = (content, index, scope) => {
    const [body, name] = content && content.body !== undefined ? [content.body, content.class] : [content, null];
    return el(scope ? "th" : "td", { class: name, scope: scope || null }, ...[body].flat());
  };
  return el("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": caption },
    el("table", { class: kind },
      el("caption", { class: titled ? "unseen" : null }, caption),
      el("thead", {}, el("tr", {}, ...heads.map((head) => cell(head, 0, "col")))),
      el("tbody", {}, ...rows.map((row) => el("tr", {}, ...row.map((item, index) => cell(item, index, index ? null : "row")))))));
}

const right = (body) => ({ body, class: "number" });
