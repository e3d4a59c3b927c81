"use strict";
// What all sections share: the page's data, the tooltip, the theme and keyboard groups.

const DATA = JSON.parse(document.getElementById("data").textContent);
const $ = (selector, root = document) => root.querySelector(selector);
const $$ = (selector, root = document) => [...root.querySelectorAll(selector)];

/** An element with text and attributes; text is never parsed as HTML. */
function make(tag, { text, ...attributes } = {}, ...children) {
  const svg = ["svg", "use", "path", "line", "circle", "text"].includes(tag);
  const node = svg
    ? document.createElementNS("http://www.w3.org/2000/svg", tag)
    : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  if (text !== undefined) node.textContent = text;
  node.append(...children);
  return node;
}

const glyph = (family) =>
  make("svg", { viewBox: "0 0 16 16", "aria-hidden": "true" }, make("use", { href: `#g-${family}` }));

/** Bytes of base64 text. */
const bytes = (text) => Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));

// Tooltip: the text of `data-tip`, for the pointer and for the keyboard alike.
const tip = $("#tip");
function showTip(node) {
  tip.textContent = node.dataset.tip;
  tip.hidden = false;
  const [at, own] = [node.getBoundingClientRect(), tip.getBoundingClientRect()];
  const left = Math.min(Math.max(8, at.left + at.width / 2 - own.width / 2), innerWidth - own.width - 8);
  const above = at.top - own.height - 8;
  tip.style.left = `${left}px`;
  tip.style.top = `${above > 8 ? above : at.bottom + 8}px`;
}
const hideTip = () => { tip.hidden = true; };
const withTip = (event) => event.target.closest?.("[data-tip]");
document.addEventListener("pointerover", (event) => { const node = withTip(event); node ? showTip(node) : hideTip(); });
document.addEventListener("focusin", (event) => { const node = withTip(event); node?.matches(":focus-visible") ? showTip(node) : hideTip(); });
document.addEventListener("focusout", hideTip);
document.addEventListener("keydown", (event) => { if (event.key === "Escape") hideTip(); });
document.addEventListener("scroll", hideTip, { passive: true, capture: true });

// Theme: what the system prefers until someone chooses.
const root = document.documentElement;
const prefersDark = matchMedia("(prefers-color-scheme: dark)");
const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : prefersDark.matches);
const onTheme = [];
function themed() {
  const button = $("#theme");
  button.textContent = isDark() ? "Light" : "Dark";
  button.setAttribute("aria-label", `Switch to the ${isDark() ? "light" : "dark"} theme`);
  for (const redraw of onTheme) redraw();
}
$("#theme").addEventListener("click", () => {
  root.dataset.theme = isDark() ? "light" : "dark";
  try { localStorage.setItem("ditopt-theme", root.dataset.theme); } catch { /* a private window */ }
  themed();
});
prefersDark.addEventListener("change", themed);
try {
  const kept = localStorage.getItem("ditopt-theme");
  if (kept === "light" || kept === "dark") root.dataset.theme = kept;
} catch { /* a private window */ }

/** The neighbour of a node in a line of nodes, by arrow keys, Home and End. */
const inLine = (nodes) => (index, key) => {
  const to = {
    ArrowRight: index + 1, ArrowDown: index + 1, ArrowLeft: index - 1, ArrowUp: index - 1,
    Home: 0, End: nodes.length - 1,
  }[key];
  return to === undefined ? undefined : nodes[Math.min(Math.max(to, 0), nodes.length - 1)];
};

/** One Tab stop for a group; `move(index, key)` says where keys lead, undefined for other keys. */
function roving(nodes, move = inLine(nodes), onFocus = () => {}) {
  nodes.forEach((node, index) => {
    node.setAttribute("tabindex", index === 0 ? "0" : "-1");
    node.addEventListener("focus", () => {
      for (const other of nodes) other.setAttribute("tabindex", other === node ? "0" : "-1");
      onFocus(index);
    });
    node.addEventListener("keydown", (event) => {
      const target = move(index, event.key);
      if (target === undefined) return;
      event.preventDefault();
      target.focus();
    });
  });
}

/** Buttons of which one is pressed. */
function pressOne(buttons, onChoice) {
  const press = (chosen) => {
    for (const button of buttons) button.setAttribute("aria-pressed", String(button === chosen));
    onChoice(chosen);
  };
  for (const button of buttons) button.addEventListener("click", () => press(button));
  return press;
}

// Marks of charts and calls of the schedule.
for (const group of $$("[data-roving]")) roving($$("[data-tip]", group));
for (const strip of $$(".strip")) {
  for (const node of [strip, ...$$(".numbers-row")]) node.style.setProperty("--calls", strip.dataset.calls);
  const calls = $$(".call", strip);
  const clear = () => {
    for (const call of calls) { call.classList.remove("source"); $(".coefficient", call)?.remove(); }
  };
  const trace = (call) => {
    clear();
    const row = JSON.parse(call.dataset.row ?? "[]");
    for (const [source, coefficient] of row) {
      calls[source].classList.add("source");
      calls[source].append(make("span", { class: "coefficient", text: coefficient }));
    }
  };
  for (const call of calls) {
    for (const name of ["pointerenter", "focus"]) call.addEventListener(name, () => trace(call));
    for (const name of ["pointerleave", "blur"]) call.addEventListener(name, clear);
  }
}
for (const mark of $$(".phase-mark")) mark.style.gridColumn = `span ${mark.dataset.span}`;

// Filter of decisions.
const filters = $$("#decision-filter button");
pressOne(filters, (button) => {
  for (const row of $$("#decision-table tbody tr")) {
    row.hidden = button.value !== "all" && row.dataset.applied !== button.value;
  }
});
