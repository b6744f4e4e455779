// Helpers for the page's elements and requests. Text from events, ids and titles becomes text nodes here, never markup.

export const byId = (id) => document.getElementById(id);

export function el(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== undefined && value !== null) element.setAttribute(name, value);
  }
  element.append(...children); // strings become text nodes
  return element;
}

export function svg(tag, attributes = {}, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

// Set the text only if it differs: a change twice a second would disturb screen readers and selections.
export function set_text(id, text) {
  const element = byId(id);
  if (element.textContent !== text) element.textContent = text;
}

// Replace all children; the focus moves to the new child with the data-key of the focused one.
export function replace_children(element, children) {
  const key = element.contains(document.activeElement) ? document.activeElement.dataset.key : undefined;
  element.replaceChildren(...children);
  if (key !== undefined) element.querySelector(`[data-key="${CSS.escape(key)}"]`)?.focus({ preventScroll: true });
}

export async function get_json(path, parameters = {}) {
  return json_of(await fetch(`${path}?${new URLSearchParams(parameters)}`));
}

export async function post_json(path, value) {
  const headers = { "Content-Type": "application/json" };
  return json_of(await fetch(path, { method: "POST", headers, body: JSON.stringify(value) }));
}

async function json_of(response) {
  if (response.status === 401) location.reload(); // the token has changed: show the login form
  if (!response.ok) throw new Error((await response.text()).trim() || response.statusText);
  return response.json();
}

const integer = new Intl.NumberFormat("en");
export const count = (n) => integer.format(Math.round(n));
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
