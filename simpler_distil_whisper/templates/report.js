"use strict";
// The search table: filters, sorts and shows the utterances in the page's JSON. Texts come from
// models and strangers: they are only ever set as text, never as markup.
const data = JSON.parse(document.getElementById("data").textContent);
const all = data.utterances;
const PAGE = 50, LONGEST_RUN = 60;
const element = (id) => document.getElementById(id);
const state = { sort: "errors", system: 0, descending: true, shown: PAGE };
let found = all;

all.forEach((one, index) => {
  one.index = index;
  one.text = [one.id, one.reference || "", ...one.systems.map((s) => s.hypothesis)].join("\n").toLowerCase();
  one.rates = one.systems.map((s) => s.rate);
  one.errors = one.systems.map((s) => s.errors);
});

function make(tag, classes, text, ...children) {
  const made = document.createElement(tag);
  if (classes) made.className = classes;
  if (text !== null && text !== undefined) made.textContent = text;
  made.append(...children);
  return made;
}

const percent = (rate) => (rate === null ? "–" : (100 * rate).toFixed(1) + "\u202f%");

function alignment(one) {
  const line = make("span", one.unit === "character" ? "align" : "align spaced");
  line.dir = "auto";
  const split = (text) => (one.unit === "character" ? [...text] : text.split(" ").filter(Boolean));
  for (const [kind, reference, hypothesis] of one.alignment) {
    const ours = split(reference), theirs = split(hypothesis);
    const cell = (token) => make("span", token ? "" : "none", token || "·");
    const pair = (our, their) => line.append(make("span", "pair " + kind, null, cell(our), cell(their)));
    const length = Math.max(ours.length, theirs.length);
    for (let i = 0; i < Math.min(length, LONGEST_RUN); i++) pair(ours[i], theirs[i]);
    const rest = "… " + (length - LONGEST_RUN) + " more";
    if (length > LONGEST_RUN) pair(ours.length ? rest : "", theirs.length ? rest : "");
  }
  return line;
}

function details(one) {
  const box = make("div", "opened");
  const card = element("u" + one.index);
  const source = card && card.querySelector("audio") ? card.querySelector("audio").src : one.audio;
  if (source) {
    const player = make("audio");
    player.controls = true;
    player.preload = "none";
    player.src = source;
    box.append(player);
  }
  const groups = Object.entries(one.groups).map(([column, value]) => column + " " + value).join(", ");
  box.append(make("p", "soft", groups));
  one.systems.forEach((heard, i) => {
    const head = make("header", "", null, make("b", "", data.systems[i]), make("span", "", percent(heard.rate)));
    heard.signs.forEach((sign) => head.append(make("span", "sign", data.signs[sign] || sign)));
    box.append(head, alignment(heard));
    const written = make("p", "soft", heard.hypothesis);
    written.dir = "auto";
    box.append(written);
  });
  return box;
}

function row(one) {
  const open = make("button", "open", one.id);
  open.type = "button";
  open.setAttribute("aria-expanded", "false");
  const text = make("td", "text", one.reference === null ? "(no reference)" : one.reference);
  text.dir = "auto";
  const line = make("tr", "", null, make("td", "", null, open), make("td", "", one.seconds === null ? "–" : one.seconds.toFixed(1)));
  one.rates.forEach((rate) => line.append(make("td", "", percent(rate))));
  line.append(text);
  open.addEventListener("click", () => {
    const opened = open.getAttribute("aria-expanded") === "true";
    open.setAttribute("aria-expanded", String(!opened));
    if (opened) return line.nextElementSibling.remove();
    const cell = make("td", "", null, details(one));
    cell.colSpan = line.cells.length;
    line.after(make("tr", "", null, cell));
  });
  return line;
}

function value(one) {
  if (state.sort === "rate") return one.rates[state.system];
  if (state.sort === "errors") return Math.max(...one.errors);
  return one[state.sort];
}

function compare(a, b) {
  const first = value(a), second = value(b);
  if (first === null || second === null) return (first === null) - (second === null); // unknown last
  const order = first < second ? -1 : first > second ? 1 : 0;
  return (state.descending ? -order : order) || a.index - b.index;
}

function show() {
  element("rows").replaceChildren(...found.slice(0, state.shown).map(row));
  element("number").textContent = found.length + " of " + all.length + " utterances";
  element("more").hidden = found.length <= state.shown;
  document.querySelectorAll("#table th").forEach((head) => {
    const here = head.dataset.sort === state.sort && Number(head.dataset.system || 0) === state.system;
    head.setAttribute("aria-sort", here ? (state.descending ? "descending" : "ascending") : "none");
  });
}

function update() {
  const words = element("search").value.toLowerCase();
  const [column, wanted] = JSON.parse(element("group").value || "[null,null]");
  const sign = element("sign").value;
  const differs = element("differs").checked;
  found = all.filter((one) =>
    one.text.includes(words) &&
    (column === null || one.groups[column] === wanted) &&
    (!sign || one.systems.some((s) => (sign === "any" ? s.signs.length : s.signs.includes(sign)))) &&
    (!differs || one.errors.some((errors) => errors !== one.errors[0])));
  found.sort(compare);
  state.shown = PAGE;
  show();
}

function fillFilters() {
  const values = {};
  for (const one of all)
    for (const [column, name] of Object.entries(one.groups))
      (values[column] = values[column] || new Map()).set(name, (values[column].get(name) || 0) + 1);
  for (const [column, names] of Object.entries(values)) {
    const group = make("optgroup");
    group.label = column;
    for (const [name, times] of [...names].sort()) {
      const option = make("option", "", name + " (" + times + ")");
      option.value = JSON.stringify([column, name]);
      group.append(option);
    }
    element("group").append(group);
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
