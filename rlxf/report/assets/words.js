// Words that differ between two texts, and the shade of tokens.

const LONGEST = 4e6; // cells of the table of common words

function wordsOf(text) {
  if (window.Intl && Intl.Segmenter) return Array.from(new Intl.Segmenter("en", { granularity: "word" }).segment(text), (part) => part.segment);
  return text.split(/(\s+)/).filter(Boolean);
}

/** For two lists of words: which words of each are not in their longest common subsequence; null if they are too long. */
function difference(one, other) {
  let head = 0;
  while (head < one.length && head < other.length && one[head] === other[head]) head++;
  let tail = 0;
  while (tail < one.length - head && tail < other.length - head && one[one.length - 1 - tail] === other[other.length - 1 - tail]) tail++;
  const [a, b] = [one.slice(head, one.length - tail), other.slice(head, other.length - tail)];
  if (a.length * b.length > LONGEST) return null;
  const width = b.length + 1;
  const common = new Uint16Array((a.length + 1) * width);
  for (let i = a.length - 1; i >= 0; i--) {
    for (let j = b.length - 1; j >= 0; j--) {
      common[i * width + j] = a[i] === b[j] ? common[(i + 1) * width + j + 1] + 1 : Math.max(common[(i + 1) * width + j], common[i * width + j + 1]);
    }
  }
  const own = [new Set(), new Set()];
  let [i, j] = [0, 0];
  while (i < a.length || j < b.length) {
    if (i < a.length && j < b.length && a[i] === b[j]) { i++; j++; }
    else if (j >= b.length || (i < a.length && common[(i + 1) * width + j] >= common[i * width + j + 1])) own[0].add(head + i++);
    else own[1].add(head + j++);
  }
  return own;
}

/** The nodes of a text with its own words marked. Marked words side by side are one mark. */
function markedNodes(words, own) {
  const nodes = [];
  let open = null;
  words.forEach((word, place) => {
    const joins = own.has(place) || (open && /^\s+$/.test(word) && own.has(place + 1));
    if (joins && !open) nodes.push(open = el("mark", {}));
    if (!joins) open = null;
    (open || nodes)[open ? "append" : "push"](...visible(word));
  });
  return nodes;
}

const SHADES = [0.1, 0.4, 0.8, 1.5, 3]; // nats, from which a shade begins

/** The colour behind a token of this log-ratio. */
function shade(ratio) {
  const level = SHADES.filter((least) => Math.abs(ratio) >= least).length;
  return level ? `rgba(var(${ratio > 0 ? "--up" : "--down"}), ${0.09 * level})` : "transparent";
}

/** The tokens of a text, shaded; arrow keys move between them, and the line below says the numbers. */
function tokenNodes(tokens, shared) {
  const readout = shared || newReadout();
  const spans = tokens.t.map((text, place) => {
    const [policy, reference] = [tokens.p[place], tokens.r[place]];
    const ratio = known(policy) && known(reference) ? (policy - reference) / 100 : null;
    const made = el("span", { class: `token${ratio !== null && ratio <= -SHADES[0] ? " less" : ""}`, "data-place": place, title: ratio === null ? "not known" : `${signed(ratio, 2)} nats` }, ...visible(text));
    if (ratio !== null) made.style.background = shade(ratio);
    return made;
  });
  let here = -1;
  const move = (place) => {
    if (place < 0 || place >= spans.length) return;
    if (here >= 0) spans[here].classList.remove("here");
    here = place;
    spans[here].classList.add("here");
    const [policy, reference] = [tokens.p[here], tokens.r[here]];
    const ratio = known(policy) && known(reference) ? signed((policy - reference) / 100, 2) : "\u2013";
    readout.replaceChildren(`Token ${here + 1} of ${spans.length} \u201c`, ...visible(tokens.t[here]), `\u201d: log-ratio ${ratio} nats (policy ${known(policy) ? signed(policy / 100, 2) : "\u2013"}, reference ${known(reference) ? signed(reference / 100, 2) : "\u2013"})`);
  };
  const box = el("div", {
    class: "text tokens", dir: "auto", tabindex: "0", role: "group", "aria-label": "Tokens, shaded by their log-ratio; arrow keys move between them",
    mouseover: (event) => { const found = event.target.closest(".token"); if (found) move(Number(found.dataset.place)); },
    focus: () => { if (here < 0) move(0); },
    keydown: (event) => {
      if (event.key === "ArrowRight" || event.key === "ArrowDown") move(here + 1);
      else if (event.key === "ArrowLeft" || event.key === "ArrowUp") move(here - 1);
      else if (event.key === "Home") move(0);
      else if (event.key === "End") move(spans.length - 1);
      else return;
      event.preventDefault();
      event.stopPropagation();
    },
  }, ...spans);
  return shared ? [box] : [box, readout];
}

function newReadout() {
  return el("p", { class: "readout", "aria-live": "polite" }, "Point at a token, or move with the arrow keys.");
}

/** What the shades mean. */
function shadeKey() {
  const sample = (ratio, text) => { const made = el("span", { class: ratio < 0 ? "token less" : "token" }, text); made.style.background = shade(ratio); return made; };
  return el("p", { class: "shades" }, "log-ratio of policy to reference, nats: ", sample(-3, "\u22123"), sample(-0.8, "\u22120.8"), sample(0, "0"), sample(0.8, "+0.8"), sample(3, "+3"),
    " underlined: the policy likes the token less than the reference does");
}
