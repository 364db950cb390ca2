// One run on the step axis. `view` holds what is shown, `known` the collector's last answer.

import { LINES, drawLine, markLegend } from "./charts.js";
import { Cursor } from "./cursor.js";
import { follow, json } from "./feed.js";
import { HEATS, cellWords, drawHeat, legend } from "./heat.js";
import { age, earlier, eventTable, incidentCard } from "./incident.js";
import { clock, conditionMark, el, errorWords, number, put, runApi, span, whole } from "./text.js";

const name = decodeURIComponent(location.pathname.slice("/run/".length));
const api = runApi(name);
const query = new URLSearchParams(location.search);
const asked = (key) => (/^\d+$/.test(query.get(key) ?? "") ? Number(query.get(key)) : null);
const FOLLOWED = 2000; // steps shown of a long run by default
const BEFORE = 100;
const AFTER = 60; // steps around an incident
const MOST_RANKS = 64; // in the table, missing ranks first; the heat map shows all
const HEAT_GAP = 1500; // milliseconds between heat map refreshes: they change slowly and cost the most

// first and last are sequence numbers, null for the ends of the run; newest is how many of the newest steps to follow.
const view = { attempt: asked("attempt"), first: asked("first"), last: asked("last"), newest: null };
let known = null;
let series = null;
let heats = {};
let heatsAt = 0;
let offset = 0;
let pointerDown = false;
let drawn = Promise.resolve();
const pause = () => new Promise((resolve) => { setTimeout(resolve); });

// -- queries

function range() {
  const newest = known.attempts[view.attempt].steps;
  if (view.newest !== null) return { first: Math.max(1, newest - view.newest + 1), last: null };
  return { first: view.first ?? 1, last: view.last };
}

function address(path, more) {
  const { first, last } = range();
  const parameters = new URLSearchParams({ attempt: view.attempt, first, ...more });
  if (last !== null) parameters.set("last", last);
  return `${api}/${path}?${parameters}`;
}

async function refresh() {
  const before = known;
  known = await json(`${api}?ranks=${MOST_RANKS}`);
  if (before === null) chooseView();
  if (view.attempt === null || view.attempt >= known.attempts.length) view.attempt = known.attempt;
  words();
  const width = document.getElementById("charts").clientWidth || 1000;
  series = await json(address("series", { points: Math.min(1000, Math.max(200, width)) }));
  const gaps = new Set(series.sequence.map((sequence, i) => series.step[i] - sequence));
  // The axis shows the script's step counter if it advances with the optimizer's steps, else the number of steps.
  offset = gaps.size === 1 ? [...gaps][0] : 0;
  words();
  readout();
  if (Date.now() - heatsAt > (known.world_size > 256 ? 4 : 1) * HEAT_GAP || !before) {
    const columns = width < 600 ? 120 : 240;
    const found = await Promise.all(HEATS.map((chart) => json(address(`heat/${chart.id}`, { columns }))));
    heats = Object.fromEntries(HEATS.map((chart, i) => [chart.id, found[i]]));
    heatsAt = Date.now();
  }
  draw();
}

// The initial view: what the address asks for, else the last incident, else the newest steps.
function chooseView() {
  view.attempt ??= known.attempt;
  if (view.first !== null || view.last !== null) return;
  const steps = known.attempts[view.attempt]?.steps ?? 0;
  const incident = known.incidents.findLast((each) => each.attempt === view.attempt);
  const at = incident && sequenceOf(incident);
  if (at && steps > FOLLOWED / 2) {
    view.first = Math.max(1, at - BEFORE - incident.verdict.lead_steps);
    view.last = at + AFTER;
  } else if (steps > FOLLOWED) {
    view.newest = FOLLOWED;
  }
}

function sequenceOf(incident) {
  return incident.sequence ?? null;
}

// -- rendering

function words() {
  const now = known.now_seconds;
  document.title = `${known.condition}: ${known.run} · Foreshock`;
  put("condition", conditionMark(known.condition), el("span", { class: "quiet" }, ` ${known.experiment}`),
    Object.keys(known.errors).length ? el("span", { class: "alarm" }, ` ${errorWords(known.errors)}`) : null);
  attempts();
  const shown = known.incidents.filter((incident) => incident.attempt === view.attempt);
  const newest = shown.at(-1);
  putIfChanged("incident", `${newest?.id} ${newest?.closed_seconds} ${newest?.verdict.summary} ${known.incidents.length}`, () => [
    newest ? incidentCard(newest, showIncident) : null,
    earlier(known.incidents.filter((incident) => incident !== newest).reverse(), showIncident),
  ]);
  if (newest) put("incident-age", age(newest, now, known.condition === "failed" && newest === known.incidents.at(-1)));
  levels(now);
  const mine = known.events.filter((event) => event.attempt === view.attempt);
  putIfChanged("events", mine.length, () => [el("h2", {}, "Events"), el("div", { class: "scroll" }, eventTable(mine.slice(-50).reverse(), showEvent))]);
  const scrolled = document.querySelector("#ranks .scroll")?.scrollTop ?? 0;
  put("ranks", el("h2", {}, `Ranks: ${rankWords()}`), rankTable(now));
  document.querySelector("#ranks .scroll").scrollTop = scrolled;
  putIfChanged("facts", known.attempt, facts);
}

// Leaves an unchanged part alone, so that focus and selection survive a refresh.
function putIfChanged(id, version, make) {
  const node = document.getElementById(id);
  if (node.dataset.version === `${version}`) return;
  node.dataset.version = `${version}`;
  put(id, make());
}

function attempts() {
  putIfChanged("attempts", `${known.attempts.length} ${view.attempt}`, () => {
    if (known.attempts.length < 2) return [];
    const chooser = el("select", { id: "attempt" }, known.attempts.map((each) =>
      el("option", { value: each.attempt, selected: each.attempt === view.attempt }, `${each.attempt}, ${clock(each.started_seconds)}`)));
    chooser.addEventListener("change", () => {
      Object.assign(view, { attempt: Number(chooser.value), first: null, last: null, newest: null });
      changed();
    });
    return [el("label", { for: "attempt" }, "attempt "), chooser];
  });
}

function levels(now) {
  const { newest } = known;
  const last = known.last_step_seconds ? `${span(Math.max(0, now - known.last_step_seconds))} ago` : "none yet";
  const items = [
    ["step", whole(newest.step)], ["global norm", number(newest.gradient_nonfinite || newest.global_norm)],
    ["loss", number(newest.loss_nonfinite || newest.loss)], ["learning rate", number(newest.learning_rate)],
    ["clip coefficient", number(newest.clip_coefficient)],
    ["spikes", whole(known.counters.spike)], ["build-ups", whole(known.counters.build_up)],
    ["skipped", whole(known.counters.skipped)], ["last step", last],
  ];
  put("levels", items.map(([term, value]) => el("div", { "data-level": term }, el("dt", {}, term), el("dd", {}, value))));
}

function rankWords() {
  if (known.state === "active") return `${whole(known.ranks_reporting)} of ${whole(known.world_size)} reporting`;
  const lost = known.world_size - known.ranks_reporting;
  return lost ? `${whole(lost)} of ${whole(known.world_size)} exited unexpectedly` : `all ${whole(known.world_size)} exited`;
}

function rankTable(now) {
  const odd = (rank) => (rank.state === "running" || rank.state === "finished" ? 1 : 0);
  const ranks = [...known.ranks].sort((a, b) => odd(a) - odd(b) || a.rank - b.rank);
  return el("div", { class: "scroll" }, el("table", {},
    el("thead", {}, el("tr", {}, ["rank", "node", "state", "step", "local norm", "last seen"].map((head) => el("th", { scope: "col" }, head)))),
    el("tbody", {}, ranks.map((rank) => el("tr", {},
      el("th", { scope: "row" }, `${rank.rank}`), el("td", {}, rank.node || "–"),
      el("td", {}, rank.state, rank.last_complete ? "" : ", in an unfinished step", rank.detail ? `: ${rank.detail}` : ""),
      el("td", {}, whole(rank.last_step)), el("td", {}, number(rank.local_norm_nonfinite || rank.local_norm)),
      el("td", {}, `${span(Math.max(0, now - rank.last_report_seconds))} ago`))))),
    known.world_size > ranks.length ? el("p", { class: "quiet" }, `${whole(ranks.length)} of ${whole(known.world_size)} ranks, missing ranks first`) : null);
}

function facts() {
  const { model, optimizer, versions } = known;
  const rows = [
    ["model", `${model.type || "unknown"}, ${whole(model.elements)} elements in ${whole(model.parameters)} parameters`],
    ["optimizer", `${optimizer.type || "unknown"}${optimizer.fused ? ", fused" : ""}`], ["clip", known.clip || "none"],
    ["started", clock(known.started_seconds)],
    ["versions", Object.entries(versions).map(([key, value]) => `${key} ${value}`).join(", ") || "unknown"],
    ["as JSON", el("a", { href: api }, api)],
  ];
  return [el("h2", {}, "Run details"), el("dl", { class: "facts" }, rows.map(([term, value]) => el("div", {}, el("dt", {}, term), el("dd", {}, value))))];
}

// -- charts

const cursor = new Cursor({ moved: (at, plot, y) => readout(at, plot, y), zoom: zoomTo });

function build() {
  const parent = document.getElementById("charts");
  for (const chart of [...LINES, ...HEATS]) {
    const node = el("div", { class: "plot", "aria-hidden": "true" });
    const frame = el("div", { class: "frame", tabindex: 0, role: "group", "aria-label": `${chart.title}: ${chart.note}` }, node);
    const heat = HEATS.includes(chart);
    const empty = el("p", { class: "quiet", hidden: true });
    parent.append(el("figure", { "data-chart": chart.id },
      el("figcaption", {}, el("h2", {}, chart.title), el("span", { class: "quiet note" }, chart.note), heat ? legend() : chart.marks ? markLegend(chart) : null), frame, empty));
    cursor.add({ chart, frame, node, empty, heat });
    frame.addEventListener("pointerdown", () => { pointerDown = true; });
  }
  addEventListener("pointerup", () => { pointerDown = false; });
  parent.hidden = false;
  const buttons = [
    ["All", () => zoomTo()], ["Last 1,000", () => lately(1000)], ["Last 100", () => lately(100)],
    ["−", () => cursor.key(new KeyboardEvent("keydown", { key: "-" }), null), "zoom out"],
    ["+", () => cursor.key(new KeyboardEvent("keydown", { key: "+" }), null), "zoom in"],
  ];
  put("zoom", buttons.map(([text, onclick, label]) => el("button", { type: "button", onclick, "aria-label": label }, text)));
}

function scopeOf() {
  const { first, last } = range();
  const newest = Math.max(known.attempts[view.attempt].steps, 1);
  const low = first + offset;
  const high = Math.max(low + 1, Math.min(last ?? newest, newest) + offset);
  return { low: low - (high - low) * 0.005, high: high + (high - low) * 0.005 };
}

// One chart per task, so that the page stays responsive. A newer call replaces an older one.
let turn = 0;
function draw() {
  const mine = ++turn;
  drawn = drawn.then(async () => {
    if (pointerDown || mine !== turn || !series) return;
    if (!cursor.plots.length) build();
    cursor.scope = scopeOf();
    const events = known.events
      .filter((event) => event.attempt === view.attempt && "sequence" in event)
      .map((event) => ({ ...event, x: event.sequence + offset }));
    const shared = { series, events, scope: cursor.scope, offset };
    for (const plot of cursor.plots) {
      await pause();
      if (mine !== turn || pointerDown) return;
      const heat = heats[plot.chart.id];
      const why = !series.sequence.length ? "No steps yet." : plot.heat ? emptyHeat(plot.chart, heat) : emptyLine(plot.chart);
      if (plot.heat) plot.frame.closest("figure").querySelector(".note").textContent = heat?.rows.length === 1 ? plot.chart.alone ?? plot.chart.note : plot.chart.note;
      plot.empty.hidden = !why;
      plot.empty.textContent = why;
      plot.frame.hidden = Boolean(why);
      if (why) continue;
      await (plot.heat ? drawHeat(plot.node, plot.chart, { ...shared, heat }) : drawLine(plot.node, plot.chart, shared));
      if (!plot.node.dataset.bound) bind(plot);
    }
    cursor.draw();
    document.body.dataset.drawn = series.newest;
  }).catch((error) => { document.getElementById("help").textContent = `No charts: ${error.message}`; });
}

function emptyLine(chart) {
  return chart.sparse && series[chart.values].every((value) => value === null) ? "Not measured on these steps." : "";
}

function emptyHeat(chart, heat) {
  if (heat?.sequence.length) return "";
  if (heat?.kept === "incident") return "Rank and layer records are kept while a run is active and for 15 minutes after it ends; rank records around an incident are kept permanently. None cover these steps.";
  if (chart.id === "updates") return "No updates by layer for these steps: only the newest are kept.";
  return chart.id === "ranks" ? "No local norms for these steps: only the newest are kept." : "No layer norms for these steps: only the newest are kept.";
}

function bind(plot) {
  plot.node.dataset.bound = "yes";
  plot.node.on("plotly_relayout", (change) => {
    if ("xaxis.range[0]" in change) zoomTo(change["xaxis.range[0]"], change["xaxis.range[1]"]);
  });
  plot.node.on("plotly_doubleclick", () => zoomTo());
}

function zoomTo(low, high) {
  pointerDown = false;
  if (low === undefined) {
    Object.assign(view, { first: null, last: null, newest: null });
  } else {
    const newest = known.attempts[view.attempt].steps;
    const first = Math.max(1, Math.min(newest - 4, Math.round(low - offset)));
    const last = Math.max(first + 4, Math.round(high - offset));
    Object.assign(view, { first, last: last >= newest ? null : last, newest: null });
  }
  changed();
}

function lately(count) {
  Object.assign(view, { first: null, last: null, newest: count });
  changed();
}

function around(sequence, lead) {
  const newest = known.attempts[view.attempt].steps;
  const last = sequence + AFTER;
  Object.assign(view, { first: Math.max(1, sequence - BEFORE - lead), last: last >= newest ? null : last, newest: null });
  changed();
  document.getElementById("charts").scrollIntoView({ behavior: "smooth" });
}

function showIncident(incident) {
  view.attempt = incident.attempt;
  const sequence = sequenceOf(incident);
  if (sequence) around(sequence, incident.verdict.lead_steps);
  else changed();
}

function showEvent(event) {
  around(event.sequence, 0);
}

// The URL holds the view, so that it can be shared.
function changed() {
  const parameters = new URLSearchParams();
  for (const key of ["attempt", "first", "last"]) if (view[key] !== null) parameters.set(key, view[key]);
  history.replaceState(null, "", `${location.pathname}?${parameters}${location.hash}`);
  heatsAt = 0;
  update();
}

function readout(at = cursor.at, plot = null, y = null) {
  if (!series?.sequence.length) return;
  let i = series.sequence.length - 1;
  if (at !== null) {
    const wanted = at - offset;
    i = series.sequence.findIndex((sequence) => sequence >= wanted - series.bin_width / 2);
    if (i < 0) i = series.sequence.length - 1;
  }
  const value = (term, words) => el("span", {}, el("span", { class: "quiet" }, `${term} `), el("b", {}, words));
  const usual = series.usual_low[i] === null ? "" : ` (usually ${number(series.usual_low[i])} to ${number(series.usual_high[i])})`;
  const parts = [
    value(at === null ? "newest step" : "step", whole(series.step[i])),
    value("norm", (series.global_norm[i] === null ? number(series.gradient_nonfinite[i] || null) : number(series.global_norm[i])) + usual),
    value("loss", series.loss[i] === null ? number(series.loss_nonfinite[i] || null) : number(series.loss[i])),
    value("clip", number(series.clip_coefficient[i])),
    value("rate", number(series.learning_rate[i])),
    value("update", number(newestUpdate(i))),
  ];
  if (at !== null) {
    for (const chart of HEATS) {
      const heat = heats[chart.id];
      if (!heat?.sequence.length) continue;
      const words = cellWords(heat, chart, series.sequence[i], plot?.chart === chart && y !== null ? rowAt(plot, heat, y) : null);
      if (words) parts.push(el("span", {}, words));
    }
  }
  if (series.bin_width > 1) parts.push(el("span", { class: "quiet" }, `each point: the largest norm in ${series.bin_width} steps`));
  if (!offset && series.step[0] !== series.sequence[0]) parts.push(el("span", { class: "quiet" }, "axis: optimizer steps of this attempt"));
  put("readout", parts);
}

// A few steps back, where this one was not measured.
function newestUpdate(i) {
  return series.update_ratio.slice(Math.max(0, i - 24), i + 1).findLast((value) => value !== null) ?? null;
}

function rowAt(plot, heat, y) {
  const height = plot.node.clientHeight - 28;
  const row = Math.floor(((y - 6) / height) * heat.rows.length);
  return row >= 0 && row < heat.rows.length ? row : null;
}

for (const what of ["(prefers-color-scheme: dark)", "(pointer: coarse)"]) matchMedia(what).addEventListener("change", () => draw());
let resizing = 0;
addEventListener("resize", () => {
  clearTimeout(resizing);
  resizing = setTimeout(draw, 150);
});

async function tolerant() {
  try {
    await refresh();
  } catch (error) {
    if (error.status !== 404 || known) throw error;
    put("condition", "No run with this name yet. ", el("a", { href: "/" }, "All runs"));
    throw error;
  }
}

const update = follow(`/api/v1/live?run=${encodeURIComponent(name)}`, tolerant);
