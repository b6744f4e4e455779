// Small helpers. Whatever comes from events, ids and titles among it, becomes text here and never markup.

export const byId = (id) => document.getElementById(id);

export function el(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== undefined && value !== null) made.setAttribute(name, value);
  }
  made.append(...children); // strings become text nodes
  return made;
}

export function svg(tag, attributes = {}, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

// Only where it differs: else screen readers and selections would be disturbed twice a second.
export function say(id, text) {
  const place = byId(id);
  if (place.textContent !== text) place.textContent = text;
}

// New children, with the focus where it was: on the one with the same data-key.
export function replace(place, children) {
  const key = place.contains(document.activeElement) ? document.activeElement.dataset.key : undefined;
  place.replaceChildren(...children);
  if (key !== undefined) place.querySelector(`[data-key="${CSS.escape(key)}"]`)?.focus({ preventScroll: true });
}

export async function ask(path, parameters = {}) {
  const answer = await fetch(`${path}?${new URLSearchParams(parameters)}`);
  return read(answer);
}

export async function send(path, value) {
  const headers = { "Content-Type": "application/json" };
  return read(await fetch(path, { method: "POST", headers, body: JSON.stringify(value) }));
}

async function read(answer) {
  if (answer.status === 401) location.reload(); // the token has changed: the form asks for it
  if (!answer.ok) throw new Error((await answer.text()).trim() || answer.statusText);
  return answer.json();
}

const whole = new Intl.NumberFormat("en");
export const count = (n) => whole.format(Math.round(n));
export const short = (version) => (version.length > 14 ? `${version.slice(0, 12)}…` : version);
export const clock = (ms) => new Date(ms).toLocaleTimeString("en-GB");

export function milliseconds(ms) {
  if (ms === null) return "-";
  if (ms < 10) return `${ms.toFixed(1)} ms`;
  return ms < 1000 ? `${Math.round(ms)} ms` : `${seconds(ms / 1000)}`;
}

export function seconds(s) {
  if (s < 10) return `${s.toFixed(1)} s`;
  if (s < 120) return `${Math.round(s)} s`;
  return s < 7200 ? `${Math.round(s / 60)} min` : s < 172800 ? `${Math.round(s / 3600)} h` : `${count(s / 86400)} days`;
}
