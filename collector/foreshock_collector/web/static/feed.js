// Keeps the page up to date: a stream announces changes and `refresh` fetches it. Without a stream, the page polls.

import { el, put, span } from "./text.js";

const POLL = 2000;
const LEAST_GAP = 250; // between two refreshes, so that a busy run does not overload the page
const QUIET = 25000; // the stream sends an event every 10 s: after this long it is dead, whatever the browser reports

export async function json(url) {
  const response = await fetch(url, { headers: { Accept: "application/json" } }).catch(() => {
    throw Object.assign(new Error("the collector does not answer"), { status: 0 });
  });
  if (!response.ok) {
    const body = await response.json().catch(() => ({}));
    throw Object.assign(new Error(body.error ?? `HTTP ${response.status}`), { status: response.status });
  }
  return response.json();
}

export function follow(url, refresh) {
  let stream = null;
  let reached = Date.now(); // when the collector last answered
  let broken = "";
  let running = false;
  let again = false;

  async function update() {
    if (running) { again = true; return; }
    running = true;
    try {
      do {
        again = false;
        await attempt();
        show();
        await new Promise((resolve) => { setTimeout(resolve, LEAST_GAP); });
      } while (again);
    } finally {
      running = false;
    }
  }

  async function attempt() {
    try {
      await refresh();
      reached = Date.now();
      broken = "";
    } catch (error) {
      if (!("status" in error)) throw error; // a bug in this page: let the console show it
      broken = error.message;
    }
  }

  function open() {
    // Browsers allow six connections per host, so background tabs close theirs.
    if (document.hidden || stream) return;
    stream = new EventSource(url);
    // Refresh on a heartbeat as well: the page shows how long ago things happened.
    for (const kind of ["change", "heartbeat"]) stream.addEventListener(kind, () => { reached = Date.now(); update(); });
  }

  function close() {
    stream?.close();
    stream = null;
  }

  const streaming = () => stream !== null && stream.readyState === EventSource.OPEN;

  function show() {
    const connection = document.getElementById("connection");
    const state = broken ? "broken" : streaming() ? "live" : "polling";
    connection.dataset.state = state;
    const words = {
      live: "live",
      polling: `polling every ${span(POLL / 1000)}`,
      broken: `stale since ${new Date(reached).toLocaleTimeString()}: ${broken}`,
    };
    if (connection.textContent !== words[state]) put("connection", el("span", {}, words[state]));
  }

  document.addEventListener("visibilitychange", () => (document.hidden ? close() : (open(), update())));
  setInterval(() => {
    if (document.hidden) return;
    if (broken || !streaming() || Date.now() - reached > QUIET) {
      // A refused stream stays closed; each poll tries a new one.
      if (stream && (stream.readyState === EventSource.CLOSED || Date.now() - reached > QUIET)) close();
      open();
      update();
    }
    show();
  }, POLL);
  open();
  update();
  return update;
}
