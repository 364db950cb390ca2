// All runs: those in trouble first, then other active runs, then ended runs.

import { follow, json } from "./feed.js";
import { spark } from "./spark.js";
import { conditionMark, el, errorWords, number, plural, put, runUrl, span, whole } from "./text.js";

const ORDER = ["failed", "failing", "building up", "stalled", "ranks missing", "running", "interrupted", "ended"];
const ENDED_SHOWN = 20;
let allEnded = false;
let known = null;
const rows = new Map();

function summary({ runs, ended }) {
  const active = runs.filter((run) => run.state === "active");
  if (!active.length) return ended ? `No active runs, ${whole(ended)} ended` : "No runs yet";
  const bad = ORDER.slice(0, 5)
    .map((condition) => [condition, active.filter((run) => run.condition === condition).length])
    .filter(([, count]) => count)
    .map(([condition, count]) => `${whole(count)} ${condition === "ranks missing" ? "with ranks missing" : condition}`);
  return `${plural(active.length, "run")} active, ${bad.length ? bad.join(", ") : "all running"}`;
}

function incidentLine(run) {
  const incident = (run.open_incidents ?? []).at(-1);
  if (!incident) {
    return run.verdict === "healthy" ? null : el("p", { class: "quiet" }, `last incident: ${run.verdict_title.toLowerCase()}`);
  }
  const { verdict } = incident;
  const where = [
    verdict.rank === null ? null : `rank ${verdict.rank}`,
    verdict.layer ? `layer ${verdict.layer}` : null,
  ].filter(Boolean);
  return el("p", { class: "alarm" },
    el("a", { href: `${runUrl(run.run)}?attempt=${incident.attempt}#incident` }, verdict.title),
    ` ${verdict.names_last_step ? "after" : "at"} step ${whole(verdict.first_bad_step)}`,
    verdict.onset_step === null ? "" : `, first sign at step ${whole(verdict.onset_step)}`,
    where.length ? `, ${where.join(", ")}` : "");
}

function errorLine(run) {
  return Object.keys(run.errors).length ? el("p", { class: "alarm" }, errorWords(run.errors)) : null;
}

// A row stays the same node while its run is shown, so that clicks land and keyboard focus survives a refresh.
function makeRow(run) {
  const cell = (label) => el("td", { "data-label": label });
  const condition = cell("");
  const alarm = el("div");
  const head = el("th", { scope: "row" },
    el("a", { href: runUrl(run.run) }, run.run), el("span", { class: "quiet" }, ` ${run.experiment}`), alarm);
  const [step, norm, loss, ranks, last] = ["step", "global norm", "loss", "ranks", "last step"].map(cell);
  const node = el("tr", { "data-run": run.run }, condition, head, step, norm, loss, ranks, last);
  return { node, condition, alarm, step, norm, loss, ranks, last, alarmText: "" };
}

function row(run, now) {
  if (!rows.has(run.run)) rows.set(run.run, makeRow(run));
  const { newest, recent } = run;
  const parts = rows.get(run.run);
  const value = (text) => el("span", { class: "value" }, text);
  const level = (what, source) => value(number(newest[`${source}_nonfinite`] || newest[what]));
  parts.node.dataset.condition = run.condition;
  parts.condition.replaceChildren(conditionMark(run.condition));
  const lines = [incidentLine(run), errorLine(run)].filter(Boolean);
  const alarmText = lines.map((line) => line.textContent).join("\n");
  if (alarmText !== parts.alarmText) parts.alarm.replaceChildren(...lines);
  parts.alarmText = alarmText;
  parts.step.replaceChildren(value(whole(newest.step)));
  parts.norm.replaceChildren(
    spark(recent?.global_norm, { logarithmic: true, name: "global norm" }), level("global_norm", "gradient"));
  parts.loss.replaceChildren(spark(recent?.loss, { name: "loss" }), level("loss", "loss"));
  parts.ranks.replaceChildren(value(`${run.ranks_reporting} of ${run.world_size}`));
  parts.last.replaceChildren(
    value(run.last_step_seconds ? `${span(Math.max(0, now - run.last_step_seconds))} ago` : "none yet"));
  return parts.node;
}

function fill(id, runs, now, ...more) {
  const section = document.getElementById(id);
  if (!section.firstChild) {
    const heads = ["condition", "run", "step", "global norm", "loss", "ranks", "last step"];
    section.append(el("table", { class: "runs" },
      el("thead", {}, el("tr", {}, heads.map((head) => el("th", { scope: "col" }, head)))), el("tbody")),
    el("div"));
    if (id === "ended") section.prepend(el("h2", {}, "Ended"));
  }
  section.querySelector("table").hidden = !runs.length;
  if (id === "ended") section.querySelector("h2").hidden = !runs.length;
  const body = section.querySelector("tbody");
  const nodes = runs.map((run) => row(run, now));
  if (nodes.length !== body.childElementCount || nodes.some((node, i) => node !== body.children[i])) {
    const focused = document.activeElement;
    body.replaceChildren(...nodes);
    if (body.contains(focused)) focused.focus({ preventScroll: true });
  }
  const below = more.filter(Boolean);
  const extra = section.lastElementChild;
  if (extra.textContent !== below.map((node) => node.textContent).join("")) extra.replaceChildren(...below);
}

function show() {
  const { runs, now_seconds: now } = known;
  const rank = (run) => ORDER.indexOf(run.condition);
  const active = runs.filter((run) => run.state === "active")
    .sort((a, b) => rank(a) - rank(b) || b.started_seconds - a.started_seconds);
  const ended = runs.filter((run) => run.state === "ended");
  const text = summary(known);
  put("summary", text);
  document.title = `${text} · Foreshock`;
  fill("active", active, now, runs.length ? null : el("p", {}, "Add two lines to a training script: ",
    el("code", {}, "watch = foreshock.attach(model, optimizer)"), " and, in the loop, ",
    el("code", {}, "watch.observe(loss=loss, step=step)"), "."));
  fill("ended", ended, now, known.ended > ended.length
    ? el("button", { type: "button", onclick: () => { allEnded = true; update(); } }, `Show all ${whole(known.ended)}`)
    : null);
}

const update = follow("/api/v1/live", async () => {
  known = await json(`/api/v1/runs?recent=1${allEnded ? "" : `&ended=${ENDED_SHOWN}`}`);
  show();
});
