// Curves over time, drawn by uPlot: a line a rank, beyond sixteen of them bands of quartiles. And bars of shares.

import { el, percent, say, set, visible } from "./dom.js";

const POINTS_KEPT = 600, LINES_AT_MOST = 16, HEIGHT = 150;
const dark = matchMedia("(prefers-color-scheme: dark)");

const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

export class Chart {
  // `shown` puts a value into words.
  constructor(place, title, shown) {
    this.shown = shown;
    this.times = [];
    this.rows = []; // a row of values a point, each at the place of its name
    this.places = new Map(); // by name, also of what is there no more
    this.place = el("figure", { class: "chart" }, el("figcaption", {}, title, " ", this.now = el("span", { class: "note" })), this.canvas = el("div", { role: "img", "aria-label": title }),
      this.empty = el("p", { class: "note" }, "Nothing yet: the curve begins when you open the job."));
    place.append(this.place);
    this.retint = () => this.rebuild();
    dark.addEventListener("change", this.retint);
    this.sizes = new ResizeObserver(() => this.plot?.setSize({ width: this.width(), height: HEIGHT }));
    this.sizes.observe(this.place);
  }

  stop() {
    dark.removeEventListener("change", this.retint);
    this.sizes.disconnect();
    this.plot?.destroy();
  }

  width = () => Math.max(200, this.place.clientWidth - 8);

  // `values` are by name; an unknown one is null. A name has its curve and its colour for good.
  add(time, values, names) {
    const row = [];
    names.forEach((name, i) => {
      if (!this.places.has(name)) this.places.set(name, this.places.size);
      row[this.places.get(name)] = values[i];
    });
    this.times.push(time);
    this.rows.push(row);
    if (this.times.length > POINTS_KEPT) this.times.shift(), this.rows.shift();
    const known = values.filter((value) => value !== null).sort((a, b) => a - b);
    const words = known.length === 0 ? "" : known.length === 1 ? this.shown(known[0])
      : `${this.shown(known[0])} to ${this.shown(known[known.length - 1])}, median ${this.shown(at(known, 0.5))}`;
    say(this.now, words);
    this.canvas.setAttribute("aria-label", `${this.place.firstChild.firstChild.data}: ${words}`);
    this.empty.hidden = this.times.length > 1;
    this.canvas.hidden = !this.empty.hidden;
    const key = this.places.size > LINES_AT_MOST ? "bands" : `${this.places.size} lines`;
    if (key !== this.key) {
      this.key = key;
      this.rebuild();
    } else if (this.times.length > 1) {
      this.plot.setData(this.data());
    }
  }

  data() {
    if (this.key !== "bands") return [this.times, ...[...this.places.values()].map((place) => this.rows.map((row) => row[place] ?? null))];
    const sorted = this.rows.map((row) => row.filter((value) => value !== null).sort((a, b) => a - b));
    return [this.times, ...[0, 0.25, 0.5, 0.75, 1].map((part) => sorted.map((row) => (row.length ? at(row, part) : null)))];
  }

  rebuild() {
    if (this.key === undefined) return;
    this.plot?.destroy();
    const axis = { stroke: colour("--soft"), grid: { stroke: colour("--line"), width: 1 }, ticks: { show: false }, font: "11px system-ui, sans-serif" };
    const names = this.key === "bands" ? ["least", "lower quartile", "median", "upper quartile", "most"] : [...this.places.keys()];
    const line = (label, i) => ({ label, stroke: this.key === "bands" ? colour("--h0") : colour(`--h${i % 8}`), width: this.key === "bands" ? (i === 2 ? 2 : 0.5) : 1.5, dash: i >= 8 && this.key !== "bands" ? [4, 3] : undefined, points: { show: false } });
    const fill = colour("--h0");
    this.plot = new uPlot({
      width: this.width(), height: HEIGHT, legend: { show: false }, cursor: { show: false }, padding: [8, 8, 0, 0],
      scales: { y: { range: (_, low, high) => [0, high > 0 ? high * 1.05 : 1] } },
      axes: [{ ...axis, values: "{HH}:{mm}:{ss}", space: 70, size: 26 }, { ...axis, size: 62, values: (_, ticks) => ticks.map(this.shown) }],
      series: [{}, ...names.map(line)],
      bands: this.key === "bands" ? [{ series: [5, 1], fill: `${fill}22` }, { series: [4, 2], fill: `${fill}44` }] : [],
    }, this.data(), this.canvas);
  }
}

// The value below which a part of the sorted ones lies.
export const at = (sorted, part) => sorted[Math.min(sorted.length - 1, Math.round(part * (sorted.length - 1)))];

export const bar = () => el("span", { class: "bar", role: "img" });

// A bar of shares with a name each, and the same in words.
export function setBar(made, parts) {
  const words = visible(parts.map(([name, share]) => `${name} ${percent(share)}`).join(", "));
  if (made.title === words) return;
  set(made, "title", words);
  set(made, "aria-label", words);
  made.replaceChildren(...parts.map(([name, share, kind]) => {
    const piece = el("span", { class: `piece ${kind}`, title: `${name} ${percent(share)}` }, share > 0.12 ? percent(share) : "");
    piece.style.width = `${Math.max(0, Math.min(100, 100 * share))}%`;
    return piece;
  }));
}
