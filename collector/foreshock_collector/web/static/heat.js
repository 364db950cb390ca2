// Heat maps of ranks and layers over steps. Cells show multiples of the usual value, so that outliers stand out.

import { CONFIG, color, layout, lines, plotly } from "./charts.js";
import { el, number, svg } from "./text.js";

export const HEATS = [
  {
    id: "ranks", title: "Ranks", word: "rank",
    note: "local norm of each rank, before averaging, as a multiple of the median of all ranks at the same step",
    alone: "local norm, before averaging, as a multiple of its median in view",
  },
  {
    id: "layers", title: "Layers", word: "layer",
    note: "norm of each layer's averaged gradient, relative to its usual share of all layers at the same step",
  },
  {
    id: "updates", title: "Updates", word: "layer",
    note: "update ratio of each layer, relative to its usual share of all layers at the same step; measured on every 10th or 25th step",
  },
];

const REACH = 1.5; // decades to either side that the color scale covers

const median = (values) => {
  const sorted = values.filter((value) => Number.isFinite(value) && value > 0).sort((a, b) => a - b);
  return sorted.length ? sorted[sorted.length >> 1] : null;
};

// log10 of each cell over its usual value; null if unknown or non-finite.
// A rank's usual value is the median of all ranks at that step. Layers differ by nature, so a layer's usual value is its
// own median times the change of all layers at that step. Common changes stay gray; the norm chart shows them.
export function relative(heat, chart) {
  const { values } = heat;
  const own = chart.id !== "ranks" || values.length === 1;
  const rows = values.map((row) => (own ? median(row) : 1));
  const scaled = values.map((row, r) => row.map((value) => (Number.isFinite(value) && rows[r] ? value / rows[r] : null)));
  const columns = heat.sequence.map((_, i) => (values.length > 1 ? median(scaled.map((row) => row[i])) : 1));
  return scaled.map((row) => row.map((value, i) => (value > 0 && columns[i] ? Math.log10(value / columns[i]) : null)));
}

export async function drawHeat(node, chart, { heat, events, scope, offset }) {
  const Plotly = await plotly();
  const height = Math.round(28 + Math.min(360, Math.max(56, heat.rows.length * (heat.rows.length > 24 ? 5 : 15))));
  const middle = (heat.bin_width - 1) / 2;
  const x = heat.sequence.map((sequence) => sequence + offset + middle);
  heat.relative ??= relative(heat, chart);
  const bad = [];
  heat.values.forEach((row, r) => row.forEach((value, i) => { if (value === "inf" && bad.length < 2000) bad.push([x[i], r]); }));
  const every = Math.max(1, Math.ceil(heat.rows.length / ((height - 28) / 13)));
  const shown = heat.rows.map((_, i) => i).filter((i) => i % every === 0);
  const most = node.clientWidth < 600 ? 7 : 17;
  const traces = [{
    type: "heatmap", x, y: heat.rows.map((_, i) => i), z: heat.relative, zmin: -REACH, zmax: REACH, showscale: false,
    colorscale: [[0, color("--heat-low")], [0.5, color("--heat-usual")], [0.66, color("--heat-some")], [0.85, color("--heat-high")], [1, color("--heat-most")]],
    hoverinfo: "skip", xgap: 0, ygap: heat.rows.length > 40 ? 0 : 1,
  }, {
    x: bad.map(([at]) => at), y: bad.map(([, r]) => r), mode: "markers", hoverinfo: "skip",
    marker: { symbol: "x-thin", size: heat.rows.length > 24 ? 4 : 7, line: { width: 1.4, color: color("--bad") } },
  }];
  const more = {
    yaxis: {
      autorange: false, range: [heat.rows.length - 0.5, -0.5], showgrid: false, tickvals: shown,
      ticktext: shown.map((i) => short(heat.rows[i], most)), tickfont: { size: 10 },
    },
    shapes: lines(events).map((line) => ({ ...line, layer: "above" })),
  };
  await Plotly.react(node, traces, layout(node.clientWidth, height, scope, more), CONFIG);
}

// The end of a layer's path is more informative than its beginning. Plotly renders HTML in tick labels, so escape it.
function short(name, most) {
  const text = name.length > most ? `…${name.slice(1 - most)}` : name;
  return text.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");
}

// The text for one cell under the cursor.
export function cellWords(heat, chart, sequence, row) {
  const i = Math.floor((sequence - heat.sequence[0]) / heat.bin_width);
  if (!heat.sequence.length || i < 0 || i >= heat.sequence.length) return "";
  heat.relative ??= relative(heat, chart);
  const r = row ?? largestRow(heat, i);
  if (r === null) return "";
  const value = heat.values[r][i];
  if (value === null) return `${chart.word} ${heat.rows[r]}: no record`;
  const times = heat.relative[r][i];
  const many = times === null ? "not finite" : `${number(value)}, ${number(Number((10 ** times).toPrecision(2)))} × usual`;
  return `${row === null ? "most: " : ""}${chart.word} ${heat.rows[r]}: ${many}`;
}

function largestRow(heat, i) {
  let best = null;
  heat.values.forEach((row, r) => {
    const score = row[i] === "inf" ? Infinity : heat.relative[r][i];
    if (score !== null && (best === null || score > best.score)) best = { r, score };
  });
  return best?.r ?? null;
}

export function legend() {
  const steps = [["--heat-low", "1/30"], ["--heat-usual", "1 × usual"], ["--heat-some", "3"], ["--heat-high", "10"], ["--heat-most", "30 ×"]];
  return el("span", { class: "legend" },
    steps.map(([name, word]) => el("span", {}, svg("svg", { viewBox: "0 0 12 12", class: "swatch", "aria-hidden": "true" },
      svg("rect", { width: 12, height: 12, fill: `var(${name})` })), word)),
    el("span", {}, svg("svg", { viewBox: "0 0 12 12", class: "swatch cross", "aria-hidden": "true" },
      svg("path", { d: "M2 2l8 8M10 2l-8 8" })), "not finite"));
}
