// A line of about sixty points without axes. A gap is a non-finite step.

import { number, svg } from "./text.js";

const WIDTH = 120;
const HEIGHT = 24;

export function spark(values, { logarithmic = false, name }) {
  const drawing = svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, class: "spark", role: "img", preserveAspectRatio: "none" });
  const scaled = (values ?? []).map((v) => (v === null ? null : logarithmic ? Math.log10(Math.max(v, 1e-12)) : v));
  const finite = scaled.filter((v) => v !== null);
  if (!finite.length) {
    drawing.setAttribute("aria-label", `${name}: no data yet`);
    return drawing;
  }
  let low = Math.min(...finite);
  let high = Math.max(...finite);
  // A calm run must not look noisy: a log axis spans at least a factor of ten, a linear axis at least 20 %.
  const least = logarithmic ? 1 : Math.max(Math.abs(high) * 0.2, 1e-9);
  const lack = Math.max(0, least - (high - low)) / 2;
  low -= lack; high += lack;
  const x = (i) => 2 + (i * (WIDTH - 4)) / Math.max(1, scaled.length - 1);
  const y = (v) => HEIGHT - 3 - ((v - low) * (HEIGHT - 6)) / (high - low);
  let path = "";
  let open = false;
  scaled.forEach((v, i) => {
    if (v === null) {
      open = false;
      drawing.append(svg("path", { d: `M${x(i) - 2} 2l4 4m0-4l-4 4`, class: "bad" }));
      return;
    }
    path += `${open ? "L" : "M"}${x(i).toFixed(1)} ${y(v).toFixed(1)}`;
    open = true;
  });
  drawing.append(svg("path", { d: path, class: "line" }));
  const ends = values.filter((v) => v !== null);
  drawing.setAttribute("aria-label", `${name}: from ${number(ends[0])} to ${number(ends.at(-1))}`);
  return drawing;
}
