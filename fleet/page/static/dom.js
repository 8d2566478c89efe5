// Elements and words. Text of jobs and ranks reaches the page through `el` and `say` only: whatever it holds is shown, never obeyed.

const READ = new Set(["title", "aria-label"]); // attributes that a person reads

export function el(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name === "class") made.className = value;
    else if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (name === "data") for (const [key, datum] of Object.entries(value)) made.dataset[key] = datum;
    else if (READ.has(name)) made.setAttribute(name, visible(value));
    else if (name in made && name !== "list") made[name] = value;
    else made.setAttribute(name, value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined).map((child) => (typeof child === "string" ? visible(child) : child)));
  return made;
}

export const byId = (id) => document.getElementById(id);

// Writes only what has changed, so that a selection and a screen reader are left in peace.
export function say(element, text) {
  const seen = visible(text);
  if (element.textContent !== seen) element.textContent = seen;
}

// Elements of a list by key, in their order. One that stays is filled anew, not made anew: the focus, a selection and a reader's place
// in it stay too.
export function arrange(parent, made, entries, make, fill) {
  const kept = new Set(entries.map(([key]) => key)), focused = parent.contains(document.activeElement) ? document.activeElement : null;
  for (const [key, element] of made) if (!kept.has(key)) element.remove(), made.delete(key);
  let at = parent.firstElementChild;
  for (const [key, datum] of entries) {
    let element = made.get(key);
    if (!element) made.set(key, element = make(key));
    fill(element, datum, key);
    if (element === at) at = at.nextElementSibling;
    else parent.insertBefore(element, at);
  }
  if (focused?.isConnected && focused !== document.activeElement) focused.focus({ preventScroll: true });
}

export function set(element, name, value) {
  if (element.getAttribute(name) !== value) element.setAttribute(name, value);
}

const UNSEEN = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff]/g;

// Control characters, which begin escape sequences, and marks that turn the direction of text, escaped as in Python.
export function visible(text) {
  return text.replace(UNSEEN, (letter) => {
    const code = letter.charCodeAt(0).toString(16);
    return code.length > 2 ? `\\u${code.padStart(4, "0")}` : `\\x${code.padStart(2, "0")}`;
  });
}

export function span(seconds) {
  if (!(seconds >= 0)) return "";
  if (seconds < 10) return `${seconds.toFixed(1)} s`;
  if (seconds < 120) return `${Math.round(seconds)} s`;
  if (seconds < 7200) return `${Math.floor(seconds / 60)} min ${String(Math.floor(seconds % 60)).padStart(2, "0")} s`;
  if (seconds < 172800) return `${Math.floor(seconds / 3600)} h ${String(Math.floor((seconds % 3600) / 60)).padStart(2, "0")} min`;
  return `${Math.floor(seconds / 86400)} days`;
}

export function amount(bytes) {
  const units = ["B", "kB", "MB", "GB", "TB"];
  let unit = 0;
  for (; bytes >= 1000 && unit < units.length - 1; unit++) bytes /= 1000;
  return `${bytes >= 100 || unit === 0 ? Math.round(bytes) : bytes.toFixed(1)} ${units[unit]}`;
}

export const percent = (share) => `${Math.round(share * 100)} %`;

export function clock(seconds) {
  return new Date(seconds * 1000).toLocaleTimeString([], { hour12: false });
}

export const many = (count, noun) => `${count} ${noun}${count === 1 ? "" : "s"}`;

// 0-3,7 for [0, 1, 2, 3, 7], as fleet writes sets of ranks.
export function rankSet(ranks) {
  const parts = [];
  for (let i = 0; i < ranks.length; i++) {
    const first = ranks[i];
    while (ranks[i + 1] === ranks[i] + 1) i++;
    parts.push(ranks[i] === first ? `${first}` : `${first}-${ranks[i]}`);
  }
  return parts.join(",");
}

// One of eight hues for a job, the same in every viewer.
export function hue(text) {
  let sum = 7;
  for (const letter of text) sum = (sum * 31 + letter.codePointAt(0)) % 65521;
  return sum % 8;
}

// "loading", "nothing yet", "no match" and "shown: 1000 of 5234" are different, and said.
export function note(element, text) {
  say(element, text);
  element.hidden = !text;
}

export function shownOf(shown, all, noun) {
  return shown < all ? `shown: ${shown} of ${all} ${noun}` : "";
}
