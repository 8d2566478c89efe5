// Questions to the server, and actions, each with its confirmation.

import { byId, say } from "./dom.js";

const WITHIN_MS = 10000;
export const RANKS_WITHIN_MS = 35000; // what ranks are asked for

export async function ask(path, words = {}, within = WITHIN_MS) {
  const query = new URLSearchParams(words).toString();
  return answered(await fetched(query ? `${path}?${query}` : path, { cache: "no-store" }, within));
}

export async function fetched(address, options, within) {
  try {
    return await fetch(address, { ...options, signal: AbortSignal.timeout(within) });
  } catch (error) {
    throw error.name === "TimeoutError" ? new Error(`the server did not answer within ${within / 1000} s`) : error;
  }
}

export async function act(path, body) {
  const headers = { "Content-Type": "application/json" };
  return answered(await fetched(path, { method: "POST", headers, body: JSON.stringify(body) }, RANKS_WITHIN_MS));
}

async function answered(response) {
  if (response.status === 401) throw new Error("this page needs its token again: `fleet dashboard` prints the address, as `fleet run --dashboard` has done");
  let value;
  try {
    value = await response.json();
  } catch {
    throw new Error(`the server said ${response.status}`);
  }
  if (!response.ok) throw new Error(value.said || `the server said ${response.status}`);
  return value;
}

let silence = 0;

// A sentence at the foot of the page, for a while.
export function tell(text, failed = false) {
  const said = byId("said");
  say(said, text);
  said.dataset.failed = failed;
  clearTimeout(silence);
  silence = setTimeout(() => say(said, ""), failed ? 15000 : 6000);
}

// Asks whether it is meant, and does it. The buttons of the dialog are the only way.
export function confirmed(question, yes, action) {
  const dialog = byId("confirm");
  const before = document.activeElement;
  say(byId("confirm-text"), question);
  say(byId("confirm-yes"), yes);
  byId("confirm-no").onclick = () => dialog.close();
  byId("confirm-yes").onclick = async () => {
    dialog.close();
    try {
      tell((await action()).said);
    } catch (error) {
      tell(error.message, true);
    }
  };
  dialog.onclose = () => before && before.focus && before.focus();
  dialog.showModal();
}
