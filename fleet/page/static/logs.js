// What a job prints: in the order in which it came, equal lines of many ranks folded into one, searched, and followed.

import { ask } from "./ask.js";
import { el, hue, many, note, rankSet, say, visible } from "./dom.js";

const LINES_KEPT = 5000, LINES_SHOWN = 1000, FOLD_OVER = 200, LINE_CHARS = 4000, REST_CHARS = 32000, FOLLOW_EVERY_MS = 1000, PARTS_AT_ONCE = 10, HITS_AT_MOST = 500;

export class Logs {
  constructor(place, job) {
    this.job = job;
    this.next = 0;
    this.instance = "";
    this.lines = []; // { text, ranks, element }
    this.rest = new Map(); // by rank: the line that is not whole yet
    this.begun = []; // lines of `rest`, as they are drawn
    this.decoders = new Map();
    this.dropped = false;
    this.printed = 0; // lines of all ranks in all, also those that never came here
    this.top = 0;
    place.append(
      el("div", { class: "head" },
        el("label", { class: "filter" }, "Search ", this.search = el("input", { type: "search", autocomplete: "off", placeholder: "text, or a rank: r3", oninput: () => this.show() })),
        el("label", {}, this.follow = el("input", { type: "checkbox", checked: true }), " follow"),
        this.whole = el("button", { hidden: true, onclick: () => this.searchAll() }, "Search all that it printed"), this.said = el("span", { class: "note" })),
      this.hits = el("div", { hidden: true }),
      this.text = el("pre", { class: "log", tabIndex: 0, "aria-label": "Output of the ranks" }));
    say(this.said, "Loading …");
    this.text.addEventListener("scroll", () => {
      if (this.text.scrollTop < this.top - 4 && !this.atEnd()) this.follow.checked = false; // a person looks further up
      this.top = this.text.scrollTop;
    });
    this.timer = setInterval(() => this.look(), FOLLOW_EVERY_MS);
    this.look();
  }

  // Of a submitted job the orchestrator keeps the logs.
  of(job) {
    if (this.attempt !== undefined && this.attempt !== job.attempt) this.end();
    this.attempt = job.attempt;
    this.world = job.world_size;
    this.whole.hidden = !job.detached;
  }

  stop() {
    clearInterval(this.timer);
    this.job = null;
  }

  async look() {
    if (this.asking || document.hidden || this.job === null) return;
    this.asking = true;
    try {
      let more = true; // of a rank that prints without end there is always more
      for (let turn = 0; more && turn < PARTS_AT_ONCE && this.job !== null; turn++) {
        const found = await ask("/api/output", { id: this.job, after: this.next });
        const anew = this.instance && found.instance !== this.instance;
        this.instance = found.instance;
        if (anew) {
          this.clear(); // its chunks have numbers of their own
          continue;
        }
        if (found.missing) this.dropped = true;
        this.next = found.next;
        this.printed = found.lines;
        for (const [rank, data] of found.chunks) this.take(rank, data);
        more = found.more;
      }
      this.show();
    } catch {
      // The connection's state is said at the head of the page; the next look goes on from here.
    } finally {
      this.asking = false;
    }
  }

  clear() {
    this.next = 0;
    this.lines = [];
    this.rest.clear();
    this.decoders.clear();
    this.begun = [];
    this.dropped = true;
    this.text.replaceChildren();
  }

  take(rank, base64) {
    if (!this.decoders.has(rank)) this.decoders.set(rank, new TextDecoder("utf-8"));
    const parts = ((this.rest.get(rank) ?? "") + this.decoders.get(rank).decode(bytes(base64), { stream: true })).split("\n");
    let rest = parts.pop();
    rest = rest.slice(rest.replace(/\r+$/, "").lastIndexOf("\r") + 1); // what a bar has drawn over is gone
    if (rest.length > REST_CHARS) parts.push(rest), rest = ""; // a line without an end
    this.rest.set(rank, rest);
    for (const part of parts) this.fold(rank, read(part));
  }

  // What the ranks of an attempt have not ended with a line end is a line all the same.
  end() {
    for (const [rank, rest] of this.rest) if (rest) this.fold(rank, read(rest));
    this.rest.clear();
    this.decoders.clear();
  }

  // Lines that ranks have begun, such as questions and bars: equal ones are one. Those that were there before keep their element.
  beginnings() {
    const before = new Map(this.begun.map((line) => [line.text, line])), now = new Map();
    for (const [rank, rest] of this.rest) {
      const text = read(rest);
      if (!text) continue;
      if (!now.has(text)) now.set(text, { text, ranks: new Set(), changed: true, element: before.get(text)?.element ?? null });
      now.get(text).ranks.add(rank);
      before.delete(text);
    }
    for (const line of before.values()) line.element?.remove();
    return (this.begun = [...now.values()]);
  }

  // A line that other ranks have printed a moment ago joins theirs, if this rank has printed nothing since.
  fold(rank, text) {
    for (let at = this.lines.length - 1; at >= 0 && at >= this.lines.length - FOLD_OVER; at--) {
      const line = this.lines[at];
      if (line.ranks.has(rank)) break;
      if (line.text === text) {
        line.ranks.add(rank);
        line.changed = true;
        return;
      }
    }
    this.lines.push({ text, ranks: new Set([rank]), changed: true, element: null });
    while (this.lines.length > LINES_KEPT) {
      this.lines.shift().element?.remove();
      this.dropped = true;
    }
  }

  show() {
    const wanted = this.search.value.trim().toLowerCase(), ofRank = /^r(\d+)$/.exec(wanted);
    const all = [...this.lines, ...this.beginnings()];
    const found = !wanted ? all : all.filter((line) => (ofRank ? line.ranks.has(Number(ofRank[1])) : line.text.toLowerCase().includes(wanted)));
    const shown = found.slice(-LINES_SHOWN), keep = new Set(shown);
    for (const line of all) if (line.element && !keep.has(line)) line.element.remove(), (line.element = null);
    let at = this.text.firstElementChild;
    for (const line of shown) {
      if (!line.element) line.element = el("span", { class: "line" }, el("b"), el("span", {}, line.text + "\n")), (line.changed = true);
      if (line.changed) {
        line.changed = false;
        const ranks = [...line.ranks].sort((a, b) => a - b);
        say(line.element.firstElementChild, ranks.length > 4 ? `${ranks.length} ranks` : `r${rankSet(ranks)}`);
        line.element.firstElementChild.title = `ranks ${rankSet(ranks)}`;
        line.element.dataset.hue = ranks.length > 1 ? "" : hue(`rank ${ranks[0]}`);
      }
      if (line.element === at) at = at.nextElementSibling;
      else this.text.insertBefore(line.element, at);
    }
    const parts = [];
    if (!all.length) parts.push(this.dropped ? "What it printed is not kept here any more: `fleet logs` shows that of submitted jobs." : "Nothing yet: no rank has printed a line.");
    else if (!found.length) parts.push(`No match among ${all.length} lines.`);
    else if (of(shown) < Math.max(this.printed, of(all))) parts.push(`shown: ${of(shown)} of ${Math.max(this.printed, of(all))} lines`);
    if (all.length && this.dropped) parts.push("earlier ones are not kept here");
    note(this.said, parts.join("; "));
    if (this.follow.checked) {
      this.text.scrollTop = this.text.scrollHeight;
      this.top = this.text.scrollTop;
    }
  }

  // The whole logs, on the orchestrator's disk: from the first rank to the last, as far as HITS_AT_MOST.
  async searchAll() {
    const text = this.search.value.trim(), job = this.job, found = [];
    this.hits.hidden = false;
    if (!text) return say(this.hits, "Say what to search for, to the left.");
    say(this.hits, "Searching …");
    try {
      let rank = 0, offset = 0, before = "";
      while (found.length < HITS_AT_MOST && job === this.job) {
        const part = await ask("/api/search", { id: job, text, rank, offset });
        found.push(...part.lines);
        ({ rank, offset } = part);
        if (rank >= this.world || before === `${rank}/${offset}`) break;
        before = `${rank}/${offset}`;
        say(this.hits, `Searching … rank ${rank}, ${many(found.length, "line")} so far`);
      }
      if (job !== this.job) return;
      const decoder = new TextDecoder();
      const lines = found.slice(0, HITS_AT_MOST).map(([of, line]) => el("span", { class: "line", data: { hue: hue(`rank ${of}`) } }, el("b", {}, `r${of}`),
        el("span", {}, `${read(decoder.decode(bytes(line)))}\n`)));
      this.hits.replaceChildren(el("p", { class: "note" }, found.length > HITS_AT_MOST ? `shown: the first ${HITS_AT_MOST} lines with “${text}”` : `${many(found.length, "line")} with “${text}” in all that it printed`),
        el("pre", { class: "log", tabIndex: 0, "aria-label": "Lines that were found" }, ...lines));
    } catch (error) {
      say(this.hits, error.message);
    }
  }

  atEnd() {
    return this.text.scrollHeight - this.text.scrollTop - this.text.clientHeight < 24;
  }
}

const cut = (text) => (text.length > LINE_CHARS ? `${text.slice(0, LINE_CHARS)} … (shown: ${LINE_CHARS} of ${text.length} characters)` : text);

// Lines as the ranks printed them: a folded one is one of each of its ranks.
const of = (lines) => lines.reduce((sum, line) => sum + line.ranks.size, 0);

const bytes = (base64) => Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));

// A line as it is shown.
const read = (line) => cut(visible(drawn(line)));

// The last state of a line that draws over itself with carriage returns, as progress bars do. Colours are left out.
function drawn(line) {
  const states = line.replace(/\r+$/, "").split("\r");
  return states[states.length - 1].replace(/\u001b\[[0-9;]*m/g, "");
}
