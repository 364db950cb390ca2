// The incident card: what happened, since when, where, the evidence and what to try, above everything else.

import { clock, el, number, plural, span, whole } from "./text.js";

// failed: the incident was still open when the run ended.
export function age(incident, now, failed) {
  if (incident.closed_seconds === null) return `open for ${span(Math.max(0, now - incident.opened_seconds))}`;
  return `${failed ? "open until the run ended," : "closed"} ${clock(incident.closed_seconds)}`;
}

export function incidentCard(incident, show) {
  const { verdict } = incident;
  const fact = (term, ...words) => el("div", { "data-fact": term }, el("dt", {}, term), el("dd", {}, ...words));
  const list = (kind, items) => el(kind, {}, items.map((item) => el("li", {}, item)));
  const open = incident.closed_seconds === null;
  return el("article", { class: "incident", "data-open": open, "data-incident": incident.id },
    el("h2", {}, verdict.title,
      // Screen readers announce the card once, and not again each time its age changes.
      el("span", { class: "quiet", "aria-live": "off" }, ` incident ${incident.id}, `, el("span", { id: "incident-age" }))),
    el("dl", { class: "where" },
      fact(verdict.names_last_step ? "last step" : verdict.finite ? "since" : "not finite since", el("strong", {}, `step ${whole(verdict.first_bad_step)}`), el("small", {}, clock(incident.opened_seconds))),
      verdict.finite ? null : fact("first sign", verdict.onset_step === null ? "none" : el("strong", {}, `step ${whole(verdict.onset_step)}`),
        verdict.onset_step === null ? null : el("small", {}, `${plural(verdict.lead_steps, "step")} earlier`)),
      verdict.rank === null && !verdict.ranks_alike ? null
        : fact("rank", el("strong", {}, verdict.rank === null ? "all ranks" : whole(verdict.rank))),
      verdict.likely_root ? fact("likely root", el("strong", {}, verdict.likely_root.replaceAll("_", " "))) : null,
      verdict.finite && !verdict.layer ? null
        : fact("layer", el("strong", {}, verdict.layer || "unknown"), verdict.parameter ? el("small", {}, verdict.parameter) : null),
      fact("confidence", el("strong", {}, `${Math.round(verdict.confidence * 100)} %`))),
    el("p", { class: "summary" }, verdict.summary),
    el("div", { class: "columns" },
      el("div", {}, el("h3", {}, "Try"), list("ol", verdict.try),
        el("p", {}, el("a", { class: "button", href: `/runbooks/${verdict.runbook}` }, "Open the runbook"), " ",
          el("button", { type: "button", onclick: () => show(incident) }, "Show these steps"))),
      el("div", {}, el("h3", {}, "Evidence"), list("ul", verdict.evidence),
        verdict.alternatives.length ? el("p", { class: "quiet" }, `Alternative explanations: ${verdict.alternatives.join("; ")}.`) : null)));
}

export function earlier(incidents, show) {
  if (!incidents.length) return null;
  return el("details", { class: "earlier" },
    el("summary", {}, plural(incidents.length, "earlier incident")),
    el("ul", {}, incidents.map((incident) => el("li", {},
      el("button", { type: "button", class: "plain", onclick: () => show(incident) }, `step ${whole(incident.verdict.first_bad_step)}`),
      ` ${incident.verdict.title}, attempt ${incident.attempt}, ${clock(incident.opened_seconds)}`))));
}

const KINDS = {
  spike: "spike", build_up: "build-up", loss_spike: "loss spike", nonfinite: "not finite", recovered: "finite again",
  rank_lost: "rank lost", probe_error: "probe error",
};

export function eventTable(events, show) {
  if (!events.length) return el("p", { class: "quiet" }, "No events yet.");
  return el("table", {},
    el("thead", {}, el("tr", {}, ["step", "event", "value", "usual"].map((head) => el("th", { scope: "col" }, head)))),
    el("tbody", {}, events.map((event) => el("tr", {},
      el("td", {}, "sequence" in event
        ? el("button", { type: "button", class: "plain", onclick: () => show(event) }, whole(event.step)) : whole(event.step)),
      el("td", {}, KINDS[event.kind] ?? event.kind,
        event.rank === undefined ? "" : ` (rank ${event.rank}${event.detail ? `: ${event.detail}` : ""})`),
      el("td", {}, number(event.value)), el("td", {}, number(event.usual))))));
}
