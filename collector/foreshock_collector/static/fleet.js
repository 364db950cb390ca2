// All runs: those in trouble first, then those that run, then those that have ended.

import { follow, json } from "./feed.js";
import { spark } from "./spark.js";
import { conditionMark, el, number, plural, put, runUrl, span, verdictTitle, whole } from "./text.js";

const ORDER = ["failing", "building up", "stalled", "ranks missing", "running", "failed", "ended"];
const ENDED_SHOWN = 20;
let allEnded = false;
let known = null;

function summary({ runs, ended }) {
  const active = runs.filter((run) => run.state === "active");
  if (!active.length) return ended ? `No run is active, ${whole(ended)} ended` : "No run has reported yet";
  const bad = ORDER.slice(0, 4)
    .map((condition) => [condition, active.filter((run) => run.condition === condition).length])
    .filter(([, count]) => count)
    .map(([condition, count]) => `${whole(count)} ${condition === "ranks missing" ? "with ranks missing" : condition}`);
  return `${plural(active.length, "run")} active, ${bad.length ? bad.join(", ") : "all running"}`;
}

function incidentLine(run) {
  const incident = (run.open_incidents ?? []).at(-1);
  if (!incident) {
    return run.verdict === "healthy" ? null : el("p", { class: "quiet" }, `last incident: ${verdictTitle(run.verdict).toLowerCase()}`);
  }
  const { verdict } = incident;
  const where = [
    verdict.rank === null ? null : `rank ${verdict.rank}`,
    verdict.layer ? `layer ${verdict.layer}` : null,
  ].filter(Boolean);
  return el("p", { class: "alarm" },
    el("a", { href: `${runUrl(run.run)}?attempt=${incident.attempt}#incident` }, verdictTitle(verdict.cause)),
    ` at step ${whole(verdict.first_bad_step)}`,
    verdict.onset_step === null ? "" : `, first sign at step ${whole(verdict.onset_step)}`,
    where.length ? `, ${where.join(", ")}` : "");
}

function row(run, now) {
  const { newest, recent } = run;
  const last = (what) => (what in newest && recent?.[what].at(-1) === null ? "not finite" : number(newest[what]));
  const cell = (label, ...content) => el("td", { "data-label": label }, ...content);
  const age = run.last_step_seconds ? `${span(Math.max(0, now - run.last_step_seconds))} ago` : "none yet";
  return el("tr", { "data-run": run.run, "data-condition": run.condition },
    cell("", conditionMark(run.condition)),
    el("th", { scope: "row" },
      el("a", { href: runUrl(run.run) }, run.run), el("span", { class: "quiet" }, ` ${run.experiment}`),
      incidentLine(run)),
    cell("step", el("span", { class: "value" }, whole(newest.step))),
    cell("global norm", spark(recent?.global_norm, { logarithmic: true, name: "global norm" }),
      el("span", { class: "value" }, last("global_norm"))),
    cell("loss", spark(recent?.loss, { name: "loss" }), el("span", { class: "value" }, last("loss"))),
    cell("ranks", el("span", { class: "value" }, `${run.ranks_reporting} of ${run.world_size}`)),
    cell("last step", el("span", { class: "value" }, age)));
}

function table(runs, now) {
  const heads = ["condition", "run", "step", "global norm", "loss", "ranks", "last step"];
  return el("table", { class: "runs" },
    el("thead", {}, el("tr", {}, heads.map((head) => el("th", { scope: "col" }, head)))),
    el("tbody", {}, runs.map((run) => row(run, now))));
}

function show() {
  const { runs, now_seconds: now } = known;
  const rank = (run) => ORDER.indexOf(run.condition);
  const active = runs.filter((run) => run.state === "active")
    .sort((a, b) => rank(a) - rank(b) || b.started_seconds - a.started_seconds);
  const ended = runs.filter((run) => run.state === "ended");
  const focused = document.activeElement?.getAttribute("href");
  put("summary", summary(known));
  document.title = `${summary(known)} · Foreshock`;
  put("active", active.length ? table(active, now) : null,
    runs.length ? null : el("p", {}, "Add two lines to a training script: ",
      el("code", {}, "watch = foreshock.attach(model, optimizer)"), " and, in the loop, ",
      el("code", {}, "watch.observe(loss=loss, step=step)"), "."));
  put("ended", ended.length ? [el("h2", {}, "Ended"), table(ended, now)] : null,
    known.ended > ended.length
      ? el("button", { type: "button", onclick: () => { allEnded = true; update(); } }, `Show all ${whole(known.ended)}`)
      : null);
  // The rows are new; whoever was on a link by keyboard still is.
  if (focused) document.querySelector(`a[href="${CSS.escape(focused)}"]`)?.focus({ preventScroll: true });
}

const update = follow("/api/v1/live", async () => {
  known = await json(`/api/v1/runs?recent=1${allEnded ? "" : `&ended=${ENDED_SHOWN}`}`);
  show();
});
