// What a job's ranks use and where their time goes: CPU, memory, steps, shares of their time, collectives.

import { ask } from "./ask.js";
import { Chart, at, bar, setBar } from "./charts.js";
import { amount, arrange, el, many, note, percent, say, shownOf, span } from "./dom.js";
import { meter, setMeter } from "./workers.js";

const BARS_AT_MOST = 16, WORKERS_SHOWN = 16;
const STREAM = ["what", "path", "in all", "size", "now", "each", "bandwidth"];

export class Use {
  constructor(place, job) {
    this.job = job;
    this.before = new Map(); // by rank: the last answer
    this.answers = new Map(); // by worker: the last answer
    this.counted = new Map(); // by worker and collective: the last answer
    this.place = place;
    this.made = { workers: new Map(), bars: new Map(), streams: new Map() }; // elements
    place.append(
      this.times = el("div", { class: "times", hidden: true }, el("h3", {}, "Where the time goes"), this.slow = el("p", { class: "slow" }),
        this.keys = el("p", { class: "note keys" }), el("table", {}, this.bars = el("tbody"))),
      this.charts = el("div", { class: "charts" }),
      this.collectives = el("div", { class: "collectives", hidden: true }, el("h3", {}, "Collectives"),
        el("div", { class: "scroll", tabIndex: 0, role: "region", "aria-label": "Collectives" }, el("table", {},
          el("thead", {}, el("tr", {}, ...STREAM.map((name) => el("th", { scope: "col" }, name)))), this.streams = el("tbody")))),
      this.workers = el("div", { class: "by-worker" }),
      this.said = el("p", { class: "note" }));
    this.cpu = new Chart(this.charts, "CPU by rank", (cores) => (cores < 0.995 ? percent(cores) : `${cores.toFixed(1)} cores`));
    this.memory = new Chart(this.charts, "Memory by rank", amount);
    say(this.said, "Loading …");
  }

  stop() {
    this.job = null;
    for (const chart of [this.cpu, this.memory, this.steps, this.rates, this.taskRate]) chart?.stop();
  }

  over() {
    this.workers.hidden = true;
    if (!this.before.size) this.charts.hidden = true, note(this.said, "");
  }

  async look() {
    if (this.asking || this.job === null) return;
    this.asking = true;
    try {
      const { used } = await ask("/api/use", { id: this.job });
      if (this.job !== null && used.length) this.take(used);
    } catch {
      // The job has ended, or the connection is down: both are said elsewhere.
    } finally {
      this.asking = false;
    }
  }

  take(used) {
    const cpu = [], memory = [], names = [];
    const ranks = used.flatMap((one) => one.ranks.map((rank) => ({ ...rank, at_s: one.at_s }))).sort((a, b) => a.rank - b.rank);
    if (ranks.every((rank) => this.before.get(rank.rank)?.at_s === rank.at_s) && ranks.length) return; // the same answer
    const latest = this.latest(used);
    this.stream(this.rated(latest));
    for (const rank of ranks) {
      const before = this.before.get(rank.rank);
      cpu.push(before && before.pid === rank.pid && rank.at_s > before.at_s ? Math.max(0, (rank.cpu_s - before.cpu_s) / (rank.at_s - before.at_s)) : null);
      memory.push(rank.memory_bytes);
      names.push(`rank ${rank.rank}`);
      this.before.set(rank.rank, rank);
    }
    const now = Date.now() / 1000;
    this.tasks(ranks.find((rank) => rank.task >= 0), now);
    if (cpu.some((value) => value !== null)) this.cpu.add(now, cpu, names);
    if (ranks.length) this.memory.add(now, memory, names);
    const sorted = latest.sort((a, b) => a.worker_id.localeCompare(b.worker_id, undefined, { numeric: true }));
    const shown = sorted.slice(0, WORKERS_SHOWN);
    arrange(this.workers, this.made.workers, shown.map((one) => [one.worker_id, one]),
      (id) => el("div", { class: "use" }, el("b", {}, id), " ", el("span", { class: "note" }), meter(0, "CPU"), meter(0, "memory"), el("span", { class: "figure" })),
      ({ children: [, host, cpu, memory, figure] }, one) => {
        say(host, one.host);
        setMeter(cpu, one.load, "CPU");
        setMeter(memory, one.memory_bytes / (one.memory_limit_bytes || 1), "memory");
        say(figure, amount(one.memory_bytes));
      });
    note(this.said, [shownOf(shown.length, latest.length, "workers"), ranks.length > BARS_AT_MOST ? `bands: least, quartiles, most of ${ranks.length} ranks` : ""].filter(Boolean).join("; "));
  }

  // What a task runner of an Executor is at.
  tasks(runner, now) {
    if (!runner) return;
    if (!this.doing) this.place.prepend(this.doing = el("p", { class: "slow" }));
    const name = runner.function ? ` (${runner.function})` : "";
    const current = runner.task > 0 ? `in task ${runner.task}${name} for ${span(runner.task_s)}` : "waiting for a task";
    const by = [...runner.functions].sort((a, b) => b[1] - a[1]).map(([named, count]) => `${named} ${count}`).join(", ");
    say(this.doing, `An Executor's runner: ${many(runner.tasks_done, "task")} done, ${current}.${by && ` Calls: ${by}.`}`);
    const before = this.done;
    this.done = { rank: runner.rank, at: runner.at_s, count: runner.tasks_done };
    if (before?.rank !== runner.rank || runner.at_s <= before.at) return;
    this.taskRate ??= new Chart(this.charts, "Tasks a second", rate);
    this.taskRate.add(now, [Math.max(0, runner.tasks_done - before.count) / (runner.at_s - before.at)], ["tasks"]);
  }

  // Shares of the ranks' time, and their steps, from the state of the job.
  show(job, slow) {
    const times = job.times ?? [];
    this.world = job.world_size;
    this.on = new Set(job.workers);
    this.times.hidden = !times.length && !slow;
    if (this.times.hidden) return;
    const bars = times.length > BARS_AT_MOST ? notable(times, job.straggler) : times;
    const kinds = new Map();
    arrange(this.bars, this.made.bars, bars.map((rank) => [rank.rank, rank]),
      (rank) => el("tr", {}, el("th", { scope: "row" }, `rank ${rank}`), el("td", { class: "wide" }, bar()), el("td", { class: "reason" })),
      ({ children: [, wide, reason] }, rank) => {
        const parts = shares(rank), most = rank.lines?.[0];
        for (const [name, share, kind] of parts) if (share > 0.005) kinds.set(name, kind);
        setBar(wide.firstElementChild, parts);
        say(reason, most ? `${percent(most[1])} at ${most[0]}` : "");
      });
    note(this.slow, slow ?? "");
    const left = times.length > bars.length ? ` ${shownOf(bars.length, times.length, "ranks")}: those that wait least and most` : "";
    const keys = JSON.stringify([[...kinds], left]);
    if (this.keys.key !== keys) {
      this.keys.key = keys;
      this.keys.replaceChildren(...[...kinds].map(([name, kind]) => el("span", { class: "key" }, el("span", { class: `piece ${kind}` }), name)), left);
    }
    const stepping = times.filter((rank) => rank.steps_per_s > 0);
    if (stepping.length) {
      this.steps ??= new Chart(this.charts, "Steps a second", (rate) => rate.toPrecision(3));
      this.steps.add(Date.now() / 1000, [Math.min(...stepping.map((rank) => rank.steps_per_s))], ["steps"]);
    }
  }

  // The last answers of the workers that have the job now: one that has not answered in time is still there.
  latest(used) {
    for (const one of used) this.answers.set(one.worker_id, one);
    for (const id of this.answers.keys()) if (!this.on.has(id)) this.answers.delete(id);
    return [...this.answers.values()];
  }

  // Collectives of all workers' ranks by what and how, and how much of them is made in a second. A worker's answers say when they
  // are of; of a new attempt it has counted less than before, and nothing is known of it yet. A rate is known if all workers' are.
  rated(used) {
    const sums = new Map(), names = ["count", "byte_count", "seconds"];
    for (const worker of used) {
      for (const one of worker.collectives) {
        const key = `${one.operation}/${one.path}`, counted = `${worker.worker_id}/${key}`, before = this.counted.get(counted);
        const sum = sums.get(key) ?? { operation: one.operation, path: one.path, count: 0, byte_count: 0, seconds: 0, known: true, now: { count: 0, byte_count: 0, seconds: 0 } };
        const elapsed = before ? worker.at_s - before.at_s : 0, known = elapsed > 0 && one.count >= before.count;
        const same = before && elapsed === 0; // its rates are those of that answer
        const rates = same ? before.rates : known ? names.map((name) => Math.max(0, one[name] - before[name]) / elapsed) : null;
        names.forEach((name, i) => {
          sum[name] += one[name];
          if (rates) sum.now[name] += rates[i];
        });
        sum.known &&= rates !== null;
        sums.set(key, sum);
        if (!same) this.counted.set(counted, { ...one, at_s: worker.at_s, rates });
      }
    }
    return [...sums.values()].sort((a, b) => b.seconds - a.seconds);
  }

  // A table of the collectives of a job by what and how, with their rates since the last look, and the sum as a curve.
  stream(found) {
    const rows = [];
    this.collectives.hidden = !found.length;
    if (!found.length) return;
    let sum = 0;
    for (const one of found) {
      const { count, byte_count: bytes, seconds } = one.known ? one.now : { count: 0, byte_count: 0, seconds: 0 };
      sum += bytes;
      rows.push([one.operation, one.path, many(Math.round(one.count / (this.world || 1)), "call"), amount(one.byte_count / Math.max(1, one.count)), count ? `${rate(count / (this.world || 1))} /s` : "–",
        count ? `${(1000 * seconds / count).toPrecision(3)} ms` : "–", count ? `${amount(bytes / Math.max(1e-9, seconds))}/s` : "–"]);
    }
    arrange(this.streams, this.made.streams, rows.map((row) => [`${row[0]}/${row[1]}`, row]), () => el("tr", {}, ...STREAM.map(() => el("td"))),
      (made, words) => words.forEach((word, i) => say(made.children[i], word)));
    if (found.every((one) => one.known)) {
      this.rates ??= new Chart(this.charts, "Bytes in collectives, all ranks", (bytes) => `${amount(bytes)}/s`);
      this.rates.add(Date.now() / 1000, [sum], ["bytes"]);
    }
  }
}

const rate = (number) => number.toFixed(number < 10 ? 1 : 0);

const ORDER = ["data", "forward", "backward", "update"]; // of a step
const placed = (name) => (ORDER.includes(name) ? ORDER.indexOf(name) : ORDER.length);

// Shares of one rank's time: its phases if it tells them, else all that is outside of collectives; then collectives, and waits.
function shares(rank) {
  const inside = Math.min(1, rank.collective), waited = Math.min(inside, rank.waited);
  const named = [...(rank.phases ?? [])].filter(([name]) => name !== "waiting");
  const sum = named.reduce((total, [, share]) => total + share, 0);
  named.sort(([a], [b]) => placed(a) - placed(b));
  const kind = (name) => (ORDER.includes(name) ? name : "other");
  const own = sum > 0 ? named.map(([name, share]) => [name, share, kind(name)]) : [];
  const rest = Math.max(0, 1 - inside - sum);
  return [...own, [sum > 0 ? "the rest" : "computing", rest, sum > 0 ? "other" : "forward"], ["in collectives", inside - waited, "collective"], ["waiting for others", waited, "waiting"]];
}

// Of many ranks: those that hold the others up, those that wait least and most, and the median one.
function notable(times, straggler) {
  const sorted = [...times].sort((a, b) => a.waited - b.waited);
  const slow = new Set(straggler?.ranks ?? []);
  const found = new Set([...times.filter((rank) => slow.has(rank.rank)).slice(0, 8), ...sorted.slice(0, 5), at(sorted, 0.5), ...sorted.slice(-2)]);
  return [...found].sort((a, b) => a.rank - b.rank);
}
