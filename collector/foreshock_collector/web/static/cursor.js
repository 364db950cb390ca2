// One cursor through all charts, moved by pointer or keyboard, and zooming.

import { margins } from "./charts.js";
import { el } from "./text.js";

export class Cursor {
  // Calls moved(x, plot, y) with a position on the step axis or null, and zoom(low, high), or zoom() to show all.
  constructor({ moved, zoom }) {
    this.plots = [];
    this.scope = { low: 0, high: 1 };
    this.at = null;
    this.moved = moved;
    this.zoom = zoom;
  }

  add(plot) {
    const line = el("div", { class: "cursor" });
    plot.frame.append(line);
    this.plots.push({ ...plot, line });
    plot.frame.addEventListener("pointermove", (event) => {
      const box = plot.frame.getBoundingClientRect();
      const { l, r } = margins(box.width);
      const share = (event.clientX - box.left - l) / (box.width - l - r);
      const inside = share >= 0 && share <= 1;
      this.set(inside ? this.scope.low + share * (this.scope.high - this.scope.low) : null, plot, event.clientY - box.top);
    });
    plot.frame.addEventListener("pointerleave", () => this.set(null));
    plot.frame.addEventListener("keydown", (event) => this.key(event, plot));
  }

  set(at, plot = null, y = null) {
    this.at = at;
    this.draw();
    this.moved(at, plot, y);
  }

  draw() {
    const { low, high } = this.scope;
    for (const { frame, line } of this.plots) {
      const shown = this.at !== null && this.at >= low && this.at <= high;
      line.hidden = !shown;
      if (!shown) continue;
      const { l, r } = margins(frame.clientWidth);
      line.style.left = `${l + ((this.at - low) / (high - low)) * (frame.clientWidth - l - r)}px`;
    }
  }

  key(event, plot) {
    const { low, high } = this.scope;
    const reach = high - low;
    const center = this.at ?? (low + high) / 2;
    const step = Math.max(1, Math.round(reach / (event.shiftKey ? 10 : 200)));
    const actions = {
      ArrowLeft: () => this.set(Math.max(Math.ceil(low), Math.round(center) - step), plot),
      ArrowRight: () => this.set(Math.min(Math.floor(high), Math.round(center) + step), plot),
      "+": () => this.zoom(center - reach / 4, center + reach / 4),
      "=": () => this.zoom(center - reach / 4, center + reach / 4),
      "-": () => this.zoom(center - reach, center + reach),
      0: () => this.zoom(),
      Escape: () => this.set(null),
    };
    if (!(event.key in actions) || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    actions[event.key]();
  }
}
