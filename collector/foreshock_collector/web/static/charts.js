// Line charts over steps, drawn by plotly.js. All charts share one step axis.

import { el, number, svg } from "./text.js";

export const LINES = [
  {
    id: "norm", title: "Global norm", values: "global_norm", bad: "gradient_nonfinite", logarithmic: true, height: 230,
    band: true, marks: ["spike", "build_up", "nonfinite"],
    note: "before clipping, log scale; shaded: the range expected from the run's history (mean ± 3 σ)",
  },
  {
    id: "loss", title: "Loss", values: "loss", bad: "loss_nonfinite", height: 130, marks: ["loss_spike", "nonfinite"],
    note: "mean over ranks",
  },
  { id: "clip", title: "Clip coefficient", values: "clip_coefficient", height: 85, range: [-0.05, 1.08], note: "1: not clipped" },
  {
    id: "update", title: "Update ratio", values: "update_ratio", logarithmic: true, height: 110, sparse: true,
    note: "norm of a step's update over the norm of the weights, log scale; measured on every 10th or 25th step",
  },
  { id: "rate", title: "Learning rate", values: "learning_rate", height: 95, fromZero: true, note: "first parameter group" },
];

export const MARKS = {
  spike: { symbol: "triangle-up-open", word: "spike", color: "--warn" },
  build_up: { symbol: "triangle-up", word: "build-up begins", color: "--warn" },
  loss_spike: { symbol: "triangle-up-open", word: "loss spike", color: "--warn" },
  nonfinite: { symbol: "x-thin", word: "not finite", color: "--bad" },
};

const FONT = "system-ui, sans-serif";

export function color(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

// Every chart has the same margins, so that a step is at the same position in all of them.
export function margins(width) {
  return { l: width < 600 ? 54 : 116, r: 10, t: 6, b: 22, pad: 0 };
}

let loading = null;

// 4.8 MB that block the page for a moment: loaded only after all text is displayed.
export function plotly() {
  loading ??= new Promise((resolve, reject) => {
    const script = el("script", { src: document.getElementById("data").dataset.plotly, async: true });
    script.addEventListener("load", () => resolve(globalThis.Plotly));
    script.addEventListener("error", () => reject(new Error("plotly.js did not load")));
    document.head.append(script);
  });
  return loading;
}

export function layout(width, height, scope, more = {}) {
  const axis = {
    gridcolor: color("--grid"), linecolor: color("--rule"), zeroline: false, tickfont: { size: 11 }, fixedrange: true,
  };
  return {
    width, height, margin: margins(width), showlegend: false, hovermode: false,
    dragmode: matchMedia("(pointer: coarse)").matches ? false : "zoom",
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: FONT, size: 11, color: color("--soft") },
    uirevision: "same",
    ...more,
    xaxis: {
      ...axis, range: [scope.low, scope.high], fixedrange: false, showgrid: false, ticks: "outside", ticklen: 3,
      tickcolor: color("--rule"), showline: true, nticks: width < 600 ? 5 : 10, tickformat: ",d", ...more.xaxis,
    },
    yaxis: { ...axis, nticks: height > 150 ? 6 : 4, exponentformat: "power", ...more.yaxis },
  };
}

export const CONFIG = { displayModeBar: false, doubleClick: false, showTips: false, responsive: false };

function bandTraces(series, x) {
  if (!series.usual_low.some((value) => value !== null)) return [];
  const line = { width: 0, shape: "linear" };
  return [
    { x, y: series.usual_low, mode: "lines", line, hoverinfo: "skip" },
    { x, y: series.usual_high, mode: "lines", line, fill: "tonexty", fillcolor: color("--band"), hoverinfo: "skip" },
  ];
}

function markTraces(chart, series, events, x) {
  const traces = [];
  const add = (xs, kind) => {
    const { symbol, color: name } = MARKS[kind];
    traces.push({
      x: xs, y: xs.map(() => 0.94), yaxis: "y2", mode: "markers", hoverinfo: "skip", cliponaxis: false,
      marker: { symbol, size: kind === "nonfinite" ? 8 : 9, color: color(name), line: { width: 1.6, color: color(name) } },
    });
  };
  for (const kind of chart.marks ?? []) {
    if (kind === "nonfinite") add(x.filter((_, i) => series[chart.bad][i]), kind);
    else add(events.filter((event) => event.kind === kind).map((event) => event.x), kind);
  }
  return traces.filter((trace) => trace.x.length);
}

const KEYS = {
  spike: "M6 2L10.5 10H1.5z", build_up: "M6 2L10.5 10H1.5z", loss_spike: "M6 2L10.5 10H1.5z", nonfinite: "M2 2l8 8M10 2l-8 8",
};

export function markLegend(chart) {
  return el("span", { class: "legend" }, chart.marks.map((kind) => el("span", {},
    svg("svg", { viewBox: "0 0 12 12", class: `swatch mark ${kind}`, "aria-hidden": "true" }, svg("path", { d: KEYS[kind] })),
    MARKS[kind].word)));
}

// Vertical lines through all charts where an episode began.
export function lines(events) {
  return events.filter((event) => event.kind === "build_up" || event.kind === "nonfinite").map((event) => ({
    type: "line", xref: "x", yref: "paper", x0: event.x, x1: event.x, y0: 0, y1: 1, layer: "below",
    line: { width: 1, dash: event.kind === "nonfinite" ? "solid" : "dot", color: color(MARKS[event.kind].color) },
  }));
}

export async function drawLine(node, chart, { series, events, scope, offset }) {
  const Plotly = await plotly();
  const x = series.sequence.map((sequence) => sequence + offset);
  const values = series[chart.values];
  const trace = {
    x, y: values, mode: x.length < 3 ? "markers" : "lines", hoverinfo: "skip", connectgaps: Boolean(chart.sparse),
    line: { color: color("--trace"), width: 1.4 }, marker: { color: color("--trace"), size: 4 },
  };
  const yaxis = { type: chart.logarithmic ? "log" : "linear" };
  if (chart.range) yaxis.range = chart.range;
  if (chart.fromZero) yaxis.rangemode = "tozero";
  if (chart.logarithmic) Object.assign(yaxis, logRange([values, chart.band ? series.usual_low : [], chart.band ? series.usual_high : []]));
  const more = {
    yaxis, shapes: lines(events),
    yaxis2: { overlaying: "y", range: [0, 1], visible: false, fixedrange: true },
  };
  const traces = [...(chart.band ? bandTraces(series, x) : []), trace, ...markTraces(chart, series, events, x)];
  await Plotly.react(node, traces, layout(node.clientWidth, chart.height, scope, more), CONFIG);
}

// At least one decade, or a calm norm would look like noise. Ticks at 1, 2 and 5 if they fit, else at powers of ten.
function logRange(columns) {
  const logs = columns.flat().filter((value) => value > 0).map(Math.log10);
  if (!logs.length) return {};
  let low = logs.reduce((a, b) => Math.min(a, b));
  let high = logs.reduce((a, b) => Math.max(a, b));
  const lack = Math.max(0, 1 - (high - low)) / 2;
  low -= lack; high += lack;
  const reach = high - low;
  const digits = reach > 2.2 ? [1] : [1, 2, 5];
  const every = Math.ceil(reach / 6);
  const ticks = [];
  for (let power = Math.floor(low); power <= high; power += 1) {
    if (power % every === 0) ticks.push(...digits.map((digit) => Number(`${digit}e${power}`)));
  }
  return {
    range: [low - 0.04 * reach, high + 0.1 * reach], tickmode: "array", tickvals: ticks, ticktext: ticks.map(number),
  };
}
