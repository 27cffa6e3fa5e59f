// Small charts in SVG. A chart is drawn anew from its data; there are at most a few hundred points in each.

import { clock, day } from "/format.js";

const SVG = "http://www.w3.org/2000/svg";
const MARGIN = { top: 8, right: 10, bottom: 22, left: 46 };

export function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key === "colour") made.style.setProperty("--c", value);
    else if (value !== null && value !== undefined) made.setAttribute(key, value);
  }
  made.append(...children);
  return made;
}

function shape(name, attributes, text) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key === "colour") made.style.setProperty("--c", value);
    else made.setAttribute(key, value);
  }
  if (text !== undefined) made.textContent = text;
  return made;
}

/** About `count` round numbers from low to high. */
export function ticks(low, high, count) {
  const rough = (high - low) / Math.max(1, count);
  if (!(rough > 0)) return [low];
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((m) => m * power).find((s) => s >= rough);
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + 1e-9 * step; i++) found.push(i * step || 0); // and not -0
  return found;
}

const TIME_STEPS = [5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 10800, 21600, 43200, 86400, 172800, 604800];

function timeTicks(from, to, count) {
  const step = TIME_STEPS.find((s) => (to - from) / s <= count) ?? 604800 * Math.ceil((to - from) / 604800 / count);
  const offset = new Date(from * 1000).getTimezoneOffset() * 60;
  const found = [];
  for (let at = Math.ceil((from - offset) / step) * step + offset; at <= to; at += step) found.push(at);
  return found.map((at) => [at, step >= 86400 ? day(at) : clock(at, step < 60)]);
}

/**
 * A chart over time in `host`. `read(at)` gives what the tooltip says there: [[colour, name, value]].
 * Arrow keys move the cross-hair as a pointer does.
 */
export class Chart {
  constructor(host, label, { format, read }) {
    this.host = host;
    this.format = format;
    this.read = read;
    this.svg = shape("svg", { role: "img", tabindex: "0", "aria-label": label });
    this.empty = element("p", { class: "empty" });
    this.tip = element("div", { class: "tip", hidden: "" });
    this.label = label;
    this.at = null;
    host.append(this.svg, this.empty, this.tip);
    host.addEventListener("pointermove", (e) => this.point(e.clientX - host.getBoundingClientRect().left));
    host.addEventListener("pointerleave", () => this.leave());
    this.svg.addEventListener("blur", () => this.leave());
    this.svg.addEventListener("keydown", (e) => this.key(e));
  }

  get box() {
    return { width: this.host.clientWidth, height: this.host.clientHeight };
  }

  /** `draw(x, y)` gives shapes; `span`: [from, to] in seconds; `range`: [low, high]; `marks`: times of what went wrong. */
  draw({ span, range, shapes, marks, note, says }) {
    const { width, height } = this.box;
    this.empty.textContent = note ?? "";
    this.svg.setAttribute("aria-label", says ? `${this.label}: ${says}` : this.label);
    if (note || width === 0) {
      this.svg.replaceChildren();
      this.scale = null;
      return;
    }
    this.svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    const [from, to] = span;
    const [low, high] = range;
    const inner = { width: width - MARGIN.left - MARGIN.right, height: height - MARGIN.top - MARGIN.bottom };
    const x = (at) => MARGIN.left + ((at - from) / (to - from)) * inner.width;
    const y = (value) => MARGIN.top + (1 - (value - low) / (high - low)) * inner.height;
    this.scale = { from, to, x, inner, height };
    const parts = [];
    for (const value of ticks(low, high, Math.max(2, Math.floor(inner.height / 46)))) {
      parts.push(shape("line", { class: "grid", x1: MARGIN.left, x2: width - MARGIN.right, y1: y(value), y2: y(value) }));
      parts.push(shape("text", { x: MARGIN.left - 8, y: y(value) + 4, "text-anchor": "end" }, this.format(value)));
    }
    for (const [at, text] of timeTicks(from, to, Math.max(2, Math.floor(inner.width / 92)))) {
      const edge = x(at) > width - 40 ? "end" : "middle";
      parts.push(shape("text", { x: Math.min(x(at), width - MARGIN.right), y: height - 5, "text-anchor": edge }, text));
    }
    parts.push(...shapes(x, y));
    for (const at of marks) {
      if (at >= from && at <= to) {
        parts.push(shape("line", { class: "mark", x1: x(at), x2: x(at), y1: MARGIN.top, y2: height - MARGIN.bottom }));
      }
    }
    this.cross = shape("line", { class: "cross", y1: MARGIN.top, y2: height - MARGIN.bottom, visibility: "hidden" });
    this.svg.replaceChildren(...parts, this.cross);
    if (this.at !== null) this.show(this.at);
  }

  point(px) {
    if (!this.scale) return;
    const { from, to, inner } = this.scale;
    const share = Math.min(1, Math.max(0, (px - MARGIN.left) / inner.width));
    this.show(from + share * (to - from));
  }

  key(event) {
    const steps = { ArrowLeft: -1, ArrowRight: 1 };
    if (event.key === "Escape") this.leave();
    if (!this.scale || !(event.key in steps)) return;
    const { from, to } = this.scale;
    const next = (this.at ?? to) + (steps[event.key] * (to - from)) / 60;
    this.show(Math.min(to, Math.max(from, next)));
    event.preventDefault();
  }

  leave() {
    this.at = null;
    this.tip.hidden = true;
    this.cross?.setAttribute("visibility", "hidden");
  }

  show(at) {
    const { x, from, to } = this.scale;
    const items = this.read(at);
    if (at < from || at > to || !items.length) return this.leave();
    this.at = at;
    const px = x(at);
    this.cross.setAttribute("x1", px);
    this.cross.setAttribute("x2", px);
    this.cross.setAttribute("visibility", "visible");
    this.tip.replaceChildren(
      element("b", {}, to - from > 86400 ? `${day(at)} ${clock(at, false)}` : clock(at, true)),
      ...items.map(([colour, name, value]) =>
        element("div", {}, element("span", { class: "key", colour }), element("span", {}, name), element("span", {}, value))),
    );
    this.tip.hidden = false;
    const right = px > this.box.width / 2;
    this.tip.style.left = right ? "" : `${px + 12}px`;
    this.tip.style.right = right ? `${this.box.width - px + 12}px` : "";
  }
}

/** Lines through the points; none where nothing was heard for longer than `gap` seconds. */
export function curve(points, x, y, colour, kind = "", gap = Infinity) {
  const goesOn = (i) => i && points[i][0] - points[i - 1][0] <= gap;
  const d = points.map(([at, value], i) => `${goesOn(i) ? "L" : "M"}${x(at).toFixed(1)} ${y(value).toFixed(1)}`).join("");
  return shape("path", { class: `curve ${kind}`, d, colour });
}

export function knots(points, x, y) {
  return points.map(([at, value]) => shape("circle", { class: "knot", cx: x(at), cy: y(value), r: points.length > 80 ? 1.6 : 2.8 }));
}

/** Stacked areas: `layers` are [colour, values], all over the same `times`. */
export function stack(times, layers, x, y) {
  let below = times.map(() => 0);
  return layers.map(([colour, values]) => {
    const above = below.map((b, i) => b + values[i]);
    const up = times.map((t, i) => `${i ? "L" : "M"}${x(t).toFixed(1)} ${y(above[i]).toFixed(1)}`).join("");
    const down = times.map((t, i) => `L${x(t).toFixed(1)} ${y(below[i]).toFixed(1)}`).reverse().join("");
    below = above;
    return shape("path", { class: "area", d: `${up}${down}Z`, colour });
  });
}

/** The value of a curve at a time: that of the last point before it, unless that is too long ago. */
export function valueAt(points, at, patience = Infinity) {
  let low = 0;
  let high = points.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (points[middle][0] <= at) low = middle + 1;
    else high = middle;
  }
  const found = low ? points[low - 1] : null;
  return found && at - found[0] <= patience ? found[1] : null;
}
