"use strict";
// The search table: filters, sorts and shows the utterances in the page's JSON. Texts come from
// models and strangers, so they are set as text and never as markup.
const data = JSON.parse(document.getElementById("data").textContent);
const all = data.utterances;
const PAGE = 50; // rows shown at first, and by "show more"
const LONGEST_RUN = 60; // tokens of a run that are shown, as in pages.py
const element = (id) => document.getElementById(id);
const state = { sort: "errors", system: 0, descending: true, shown: PAGE };
let matching = all;

all.forEach((utterance, index) => {
  const { id, reference, systems } = utterance;
  utterance.index = index;
  utterance.text = [id, reference || "", ...systems.map((s) => s.hypothesis)].join("\n").toLowerCase();
  utterance.rates = systems.map((s) => s.rate);
  utterance.errors = systems.map((s) => s.errors);
});

function make(tag, classes, text, ...children) {
  const made = document.createElement(tag);
  if (classes) made.className = classes;
  if (text !== null && text !== undefined) made.textContent = text;
  made.append(...children);
  return made;
}

const percent = (rate) => (rate === null ? "–" : (100 * rate).toFixed(1) + "\u202f%");

function alignment(system) {
  const characters = system.unit === "character";
  const line = make("span", characters ? "align" : "align spaced");
  line.dir = "auto";
  const split = (text) => (characters ? [...text] : text.split(" ").filter(Boolean));
  const cell = (token) => make("span", token ? "" : "none", token || "·");
  for (const [kind, reference, hypothesis] of system.alignment) {
    const above = split(reference), below = split(hypothesis);
    const pair = (top, bottom) => line.append(make("span", "pair " + kind, null, cell(top), cell(bottom)));
    const length = Math.max(above.length, below.length);
    for (let i = 0; i < Math.min(length, LONGEST_RUN); i++) pair(above[i], below[i]);
    const rest = "… " + (length - LONGEST_RUN) + " more";
    if (length > LONGEST_RUN) pair(above.length ? rest : "", below.length ? rest : "");
  }
  return line;
}

function details(utterance) {
  const box = make("div", "opened");
  const card = element("u" + utterance.index);
  const inCard = card && card.querySelector("audio"); // where embedded audio stands, once
  const source = inCard ? inCard.src : utterance.audio;
  if (source) {
    const player = make("audio");
    player.controls = true;
    player.preload = "none";
    player.src = source;
    box.append(player);
  }
  const groups = Object.entries(utterance.groups).map(([column, value]) => column + " " + value).join(", ");
  box.append(make("p", "soft", groups));
  utterance.systems.forEach((system, i) => {
    const head = make("header", "", null, make("b", "", data.systems[i]), make("span", "", percent(system.rate)));
    system.signs.forEach((sign) => head.append(make("span", "sign", data.signs[sign] || sign)));
    box.append(head, alignment(system));
    const written = make("p", "soft", system.hypothesis);
    written.dir = "auto";
    box.append(written);
  });
  return box;
}

function row(utterance) {
  const { id, reference, seconds, rates } = utterance;
  const open = make("button", "open", id);
  open.type = "button";
  open.setAttribute("aria-expanded", "false");
  const text = make("td", "text", reference === null ? "(no reference)" : reference);
  text.dir = "auto";
  const length = make("td", "", seconds === null ? "–" : seconds.toFixed(1));
  const line = make("tr", "", null, make("td", "", null, open), length);
  rates.forEach((rate) => line.append(make("td", "", percent(rate))));
  line.append(text);
  open.addEventListener("click", () => {
    const opened = open.getAttribute("aria-expanded") === "true";
    open.setAttribute("aria-expanded", String(!opened));
    if (opened) return line.nextElementSibling.remove();
    const cell = make("td", "", null, details(utterance));
    cell.colSpan = line.cells.length;
    line.after(make("tr", "", null, cell));
  });
  return line;
}

function sortKey(utterance) {
  if (state.sort === "rate") return utterance.rates[state.system];
  if (state.sort === "errors") return Math.max(...utterance.errors);
  return utterance[state.sort];
}

function bySortKey(a, b) {
  const first = sortKey(a), second = sortKey(b);
  if (first === null || second === null) return (first === null) - (second === null); // unknown last
  const order = first < second ? -1 : first > second ? 1 : 0;
  return (state.descending ? -order : order) || a.index - b.index;
}

function show() {
  element("rows").replaceChildren(...matching.slice(0, state.shown).map(row));
  element("number").textContent = matching.length + " of " + all.length + " utterances";
  element("more").hidden = matching.length <= state.shown;
  document.querySelectorAll("#table th").forEach((head) => {
    const here = head.dataset.sort === state.sort && Number(head.dataset.system || 0) === state.system;
    head.setAttribute("aria-sort", here ? (state.descending ? "descending" : "ascending") : "none");
  });
}

function update() {
  const words = element("search").value.toLowerCase();
  const [column, group] = JSON.parse(element("group").value || "[null,null]");
  const sign = element("sign").value;
  const differs = element("differs").checked;
  matching = all.filter(({ text, groups, systems, errors }) =>
    text.includes(words) &&
    (column === null || groups[column] === group) &&
    (!sign || systems.some((s) => (sign === "any" ? s.signs.length : s.signs.includes(sign)))) &&
    (!differs || errors.some((number) => number !== errors[0])));
  matching.sort(bySortKey);
  state.shown = PAGE;
  show();
}

function fillFilters() {
  const sizes = Object.create(null); // column -> group -> number of utterances
  for (const utterance of all)
    for (const [column, group] of Object.entries(utterance.groups)) {
      sizes[column] = sizes[column] || new Map();
      sizes[column].set(group, (sizes[column].get(group) || 0) + 1);
    }
  for (const [column, groups] of Object.entries(sizes)) {
    const options = make("optgroup");
    options.label = column;
    for (const [group, size] of [...groups].sort()) {
      const option = make("option", "", group + " (" + size + ")");
      option.value = JSON.stringify([column, group]);
      options.append(option);
    }
    element("group").append(options);
  }
  for (const [sign, name] of Object.entries(data.signs)) {
    const option = make("option", "", name);
    option.value = sign;
    element("sign").append(option);
  }
}

fillFilters();
element("search").addEventListener("input", update);
["group", "sign", "differs"].forEach((id) => element(id).addEventListener("change", update));
element("more").addEventListener("click", () => { state.shown += PAGE; show(); });
document.querySelectorAll("#table th button").forEach((button) => button.addEventListener("click", () => {
  const { sort, system } = button.parentElement.dataset;
  const same = sort === state.sort && Number(system || 0) === state.system;
  state.descending = same ? !state.descending : sort !== "id";
  [state.sort, state.system] = [sort, Number(system || 0)];
  update();
}));
update();
element("browser").hidden = false;
