// Workers by host: a cell a slot. A cell's state is its colour, its shape and its text; of many hosts, one cell each.

import { arrange, byId, clock, el, hue, many, note, percent, say, set, shownOf } from "./dom.js";

const HOSTS_SHOWN = 300, CELLS_SHOWN = 4000, SLOTS_DRAWN = 64, EVENTS_SHOWN = 100;
const ORDER = { lost: 0, draining: 1, ready: 2 };

export class Workers {
  constructor(feed, open, menu) {
    this.feed = feed;
    this.open = open;
    this.menu = menu;
    this.made = new Map(); // elements of hosts
    this.filter = byId("workers-filter");
    this.filter.addEventListener("input", () => this.render());
  }

  render() {
    const all = this.feed.tables.workers;
    const wanted = this.filter.value.trim().toLowerCase();
    const hosts = new Map();
    let found = 0;
    for (const [id, worker] of all) {
      if (wanted && !`${id} ${worker.host} ${worker.state}`.toLowerCase().includes(wanted)) continue;
      found++;
      if (!hosts.has(worker.host)) hosts.set(worker.host, []);
      hosts.get(worker.host).push([id, worker]);
    }
    say(byId("workers-count"), all.size ? `${all.size}` : "");
    const compact = hosts.size > HOSTS_SHOWN;
    const sorted = [...hosts].sort((a, b) => worst(a[1]) - worst(b[1]) || (a[0] < b[0] ? -1 : 1));
    const shown = sorted.slice(0, compact ? CELLS_SHOWN : HOSTS_SHOWN);
    const list = byId("hosts");
    list.classList.toggle("compact", compact);
    if (compact !== this.compact) {
      this.compact = compact;
      this.made.clear();
      list.replaceChildren();
    }
    const fill = compact ? this.cell : this.host;
    arrange(list, this.made, shown, () => el("li"), (element, workers, host) => fill.call(this, element, host, workers));
    const missing = shownOf(shown.length, hosts.size, "hosts");
    note(byId("workers-note"), all.size === 0 ? "Nothing yet: no worker is connected. `fleet worker` on a machine adds its slots."
      : found === 0 ? `No match: none of ${many(all.size, "worker")} has “${wanted}” in its name, host or state.`
      : compact ? `A square a host, those with trouble first; ${missing || `${hosts.size} hosts`}.` : missing);
  }

  // A load changes each second, and what the slots hold seldom: only a worker that holds something else is drawn again.
  host(element, host, workers) {
    element.parts ??= new Map();
    if (!element.firstElementChild) element.append(el("div", { class: "host" }, el("span", { class: "name" }, host), meter(0, "CPU")));
    setMeter(element.firstElementChild.lastElementChild, Math.max(...workers.map(([, worker]) => worker.load)), "CPU");
    const kept = new Set(workers.map(([id]) => id));
    for (const [id, part] of element.parts) if (!kept.has(id)) part.remove(), element.parts.delete(id);
    let at = element.firstElementChild.nextElementSibling;
    for (const [id, worker] of workers) {
      const states = (worker.jobs ?? []).map(([job]) => this.feed.tables.jobs.get(job)?.status);
      const key = JSON.stringify([{ ...worker, load: 0 }, states]);
      const before = element.parts.get(id);
      if (before?.key === key) {
        if (before === at) at = at.nextElementSibling;
        else element.insertBefore(before, at);
        continue;
      }
      const focused = before?.contains(document.activeElement) ? document.activeElement.dataset.key : null;
      const part = this.worker(id, worker);
      part.key = key;
      if (before === at) at = at?.nextElementSibling ?? null;
      before ? before.replaceWith(part) : element.insertBefore(part, at);
      element.parts.set(id, part);
      if (focused) part.querySelector(`[data-key="${CSS.escape(focused)}"]`)?.focus();
    }
  }

  worker(id, worker) {
    const cells = el("span", { class: "cells" });
    const said = [];
    let drawn = 0;
    for (const [job, ranks, count] of worker.jobs ?? []) {
      said.push(`${many(count, "rank")} of job ${job}`);
      const row = this.feed.tables.jobs.get(job);
      for (const rank of ranks) {
        if (drawn++ >= SLOTS_DRAWN) break;
        cells.append(el("button", {
          class: "cell busy", data: { hue: hue(job), state: row?.status ?? "", key: `${job}/${rank}` },
          title: `rank ${rank} of job ${job}, ${row?.status ?? ""}`, onclick: () => this.open(job),
        }, `${rank}`));
      }
    }
    for (let free = worker.busy; free < worker.slots && drawn < SLOTS_DRAWN; free++, drawn++)
      cells.append(el("span", { class: "cell free", title: "free" }));
    if (worker.slots > drawn) cells.append(el("span", { class: "more" }, `+${worker.slots - drawn}`));
    const words = [worker.state, `${worker.busy} of ${worker.slots} slots busy`, ...said].join(", ");
    return el("div", { class: "worker", data: { state: worker.state } },
      el("span", { class: "name", title: worker.version ?? "" }, id), worker.state === "ready" ? null : el("span", { class: "state" }, worker.state),
      el("span", { class: "unseen" }, words), cells,
      el("button", { class: "small", "aria-label": `Drain worker ${id}`, data: { key: `drain/${id}` }, onclick: () => this.menu(id, worker) },
        worker.state === "draining" ? "undo" : "drain"));
  }

  cell(element, host, workers) {
    const state = Object.keys(ORDER)[worst(workers)];
    const slots = sum(workers, "slots"), busy = sum(workers, "busy");
    element.className = "square";
    element.dataset.state = state;
    element.dataset.full = Math.min(4, Math.ceil(4 * busy / Math.max(1, slots)));
    const words = `${host}: ${many(workers.length, "worker")}, ${state}, ${busy} of ${slots} slots busy`;
    if (element.title === words) return;
    set(element, "title", words);
    element.replaceChildren(el("span", { class: "unseen" }, words));
  }

  events() {
    const events = [...this.feed.tables.events].sort((a, b) => b[0] - a[0]);
    say(byId("events-count"), events.length ? `${events.length}` : "");
    const list = byId("events");
    const newest = list.firstElementChild?.dataset.number ?? "";
    if (newest === (events[0]?.[0] ?? "") && !events.length === !list.childElementCount) return;
    list.replaceChildren(...events.slice(0, EVENTS_SHOWN).map(([number, event]) =>
      el("li", { data: { number, level: event.level } }, el("time", {}, clock(event.at)), " ", event.text)));
    if (events.length > EVENTS_SHOWN) list.append(el("li", {}, shownOf(EVENTS_SHOWN, events.length, "events")));
    if (!events.length) list.append(el("li", {}, "Nothing yet: no worker has come or gone, and no job, since this orchestrator started."));
  }
}

const sum = (workers, name) => workers.reduce((total, [, worker]) => total + worker[name], 0);
const worst = (workers) => Math.min(...workers.map(([, worker]) => ORDER[worker.state] ?? 2));

export function meter(share, what) {
  const made = el("span", { class: "meter" }, el("meter", { min: 0, max: 1, high: 0.95, "aria-label": what }), el("span", { class: "figure" }));
  setMeter(made, share, what);
  return made;
}

export function setMeter(made, share, what) {
  const words = percent(share);
  if (made.lastElementChild.textContent === words) return;
  made.firstElementChild.value = Math.min(1, share);
  made.title = `${what} ${words}`;
  say(made.lastElementChild, words);
}
