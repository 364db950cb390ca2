// Text and small shapes. Everything that comes from a run goes in as text, never as HTML.

export function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === false || value === null || value === undefined) continue;
    if (name === "onclick") node.addEventListener("click", value);
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== ""));
  return node;
}

export function svg(tag, attributes = {}, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

export function put(id, ...children) {
  document.getElementById(id).replaceChildren(...children.flat().filter((child) => child));
}

// Four digits distinguish norms; more would suggest false precision.
export function number(value) {
  if (value === null || value === undefined) return "–";
  if (value === "nan") return "NaN";
  if (value === "inf") return "Inf";
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e5)) return value.toExponential(2).replace("e+", "e");
  return Number.isInteger(value) ? whole(value) : String(Number(value.toPrecision(4)));
}

export function whole(value) {
  return value === null || value === undefined ? "–" : Math.round(value).toLocaleString("en-US");
}

export function span(seconds) {
  if (seconds < 1.5) return "1 s";
  if (seconds < 90) return `${Math.round(seconds)} s`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min`;
  if (seconds < 129600) return `${Math.round(seconds / 3600)} h`;
  return `${Math.round(seconds / 86400)} days`;
}

export function clock(seconds) {
  return new Date(seconds * 1000).toLocaleString(undefined, { dateStyle: "medium", timeStyle: "medium" });
}

export const plural = (count, one, many = `${one}s`) => `${whole(count)} ${count === 1 ? one : many}`;

// Each condition has its own word and shape, so that no one depends on colors.
const SHAPES = {
  failing: "M2 2l8 8M10 2l-8 8",
  failed: "M2 2l8 8M10 2l-8 8",
  "building up": "M6 1.5L11 10.5H1z",
  stalled: "M2 2h3v8H2zM7 2h3v8H7z",
  "ranks missing": "M6 1l5 5-5 5-5-5z",
  running: "M6 2a4 4 0 1 0 0 8a4 4 0 1 0 0-8z",
  interrupted: "M3 2h6v8H3z",
  ended: "M6 2.5a3.5 3.5 0 1 0 0 7a3.5 3.5 0 1 0 0-7z",
};

// Internal errors of the collector; its log has the tracebacks.
export function errorWords(errors) {
  const parts = Object.entries(errors).map(([stage, count]) => `${stage} ${whole(count)}`);
  return `internal errors in the collector, see its log: ${parts.join(", ")}`;
}

export function conditionMark(condition) {
  const shape = svg("svg", { viewBox: "0 0 12 12", class: "shape", "aria-hidden": "true" },
    svg("path", { d: SHAPES[condition] ?? SHAPES.ended }));
  return el("span", { class: "condition", "data-condition": condition }, shape, condition);
}

export const runUrl = (name) => `/run/${encodeURIComponent(name)}`;
export const runApi = (name) => `/api/v1/runs/${encodeURIComponent(name)}`;
