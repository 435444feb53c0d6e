// What all pages share: requests, elements made of texts, numbers in words, polling.
// A text of a run becomes an element only through textContent, so that it can never be markup.

export const $ = (selector, root = document) => root.querySelector(selector);
export const $$ = (selector, root = document) => [...root.querySelectorAll(selector)];

/** The server's sentence on what was wrong; `gone` where no server answered. */
export class Problem extends Error {
  constructor(message, gone = false) { super(message); this.gone = gone; }
}

async function request(path, options = {}) {
  let response;
  try {
    response = await fetch(path, { credentials: 'same-origin', cache: 'no-store', ...options });
  } catch (error) {
    if (error.name === 'AbortError') throw error;
    showGone(true);
    throw new Problem('The server of this page does not answer. Runs go on without it.', true);
  }
  showGone(false);
  if (response.ok) return response;
  const body = await response.json().catch(() => null);
  throw new Problem(body?.error?.message ?? `The server answered ${response.status} ${response.statusText}.`);
}

function showGone(gone) {
  const words = gone ? 'The server of this page does not answer; runs go on without it. Start it again with'
    + ' "phitune ui" - this page tries again by itself.' : '';
  if ($('#gone').textContent !== words) $('#gone').textContent = words;
}

/** A query of names with values; a list repeats its name, and what is null is left out. */
export function query(path, values) {
  const pairs = Object.entries(values).flatMap(([name, value]) => [value ?? []].flat().map((one) => [name, one]));
  return `${path}?${new URLSearchParams(pairs)}`;
}

export const get = async (path, values = {}, options = {}) => (await request(query(path, values), options)).json();
// A newer question takes the place of an older one of the same page, not of another tab.
const PAGE = Math.random().toString(36).slice(2);
export const send = (path, body, options = {}) => request(path, {
  method: 'POST', headers: { 'Content-Type': 'application/json', 'X-Page': PAGE }, body: JSON.stringify(body), ...options,
});
export const post = async (path, body = {}, options = {}) => (await send(path, body, options)).json();

/** An element: el('p.pale', {title: 'x', onclick}, 'text', child, ...). */
export function el(kind, given = {}, ...children) {
  const [tag, ...classes] = kind.split('.');
  const element = document.createElement(tag || 'div');
  if (classes.length) element.className = classes.join(' ');
  for (const [name, value] of Object.entries(given)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith('on')) element.addEventListener(name.slice(2), value);
    else if (name in element && typeof value !== 'string') element[name] = value;
    else element.setAttribute(name, value === true ? '' : value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}
/** A text from elsewhere, which turns nothing around it. */
export const own = (text, kind = 'span') => el(kind, { dir: 'auto' }, String(text ?? ''));
export const put = (place, ...children) => (place.replaceChildren(...children.flat().filter(Boolean)), place);
/** Like put, but what the reader unfolded stays open. */
export function renew(place, ...children) {
  const name = (details) => $('summary', details).textContent.replace(/[\d,.]+/g, '#');
  const opened = new Set($$('details[open]', place).map(name));
  put(place, ...children);
  $$('details', place).filter((details) => opened.has(name(details))).forEach((details) => { details.open = true; });
}
/** Only what changed is written, so that a screen reader is not told the same twice. */
export function write(place, text) { if (place.textContent !== text) place.textContent = text; }

/** A table with headers. Columns that begin with ">" are numbers. */
export function table(columns, rows, { caption, kind = 'table' } = {}) {
  const right = columns.map((column) => typeof column === 'string' && column.startsWith('>'));
  const cell = (value, index) => {
    const filled = value instanceof Node ? [value] : [String(value ?? '-')];
    return el(index ? 'td' : 'th', { scope: index ? null : 'row', class: right[index] ? 'r' : null, dir: right[index] ? null : 'auto' }, ...filled);
  };
  return el(kind, {},
    caption && el('caption.hidden', {}, caption),
    el('thead', {}, el('tr', {}, columns.map((column, index) =>
      el('th', { scope: 'col', class: right[index] ? 'r' : null, dir: 'auto' }, String(column).replace(/^>/, ''))))),
    el('tbody', {}, rows.map((row) => el('tr', {}, row.map(cell)))));
}
/** What may be wider than the page: it scrolls by itself, by keyboard too. */
export const scrolling = (label, ...children) => el('div.scroll', { tabindex: '0', role: 'region', 'aria-label': label }, ...children);

/** Shows a problem where the action was; nothing for a request that was taken back. */
export function complain(place, error) {
  if (error?.name === 'AbortError') return;
  write(place, error ? String(error.message ?? error) : '');
}
/** Runs an action of a button: no second click while it lasts, and its problem is shown. */
export async function acting(button, place, action) {
  if (button.getAttribute('aria-busy') === 'true') return;
  complain(place, null);
  button.setAttribute('aria-busy', 'true');
  try { await action(); } catch (error) { complain(place, error); } finally { button.removeAttribute('aria-busy'); }
}
export async function copy(button, text) {
  const before = button.textContent;
  try { await navigator.clipboard.writeText(text); button.textContent = 'Copied'; } catch { button.textContent = 'Select and copy'; }
  setTimeout(() => { button.textContent = before; }, 1500);
}

/** Calls again and again while the page is visible, each time after the last call has ended. */
export function every(milliseconds, call) {
  let timer = 0;
  let busy = false;
  const tick = async () => {
    clearTimeout(timer);
    if (busy || document.hidden) return;
    busy = true;
    let again = true;
    try { again = await call(); } catch (error) { if (!(error instanceof Problem)) console.error(error); }
    busy = false;
    if (again !== false) timer = setTimeout(tick, milliseconds);
    else document.removeEventListener('visibilitychange', tick);
  };
  document.addEventListener('visibilitychange', tick);
  tick();
  return tick;
}
export function debounced(milliseconds, call) {
  let timer = 0;
  return (...given) => { clearTimeout(timer); timer = setTimeout(() => call(...given), milliseconds); };
}
/** The newest call wins: the one before is taken back. */
export function newest(call) {
  let controller = null;
  return (...given) => {
    controller?.abort();
    controller = new AbortController();
    return call(controller.signal, ...given);
  };
}

// Numbers in words. What is not known is a dash.
export const DASH = '-';
const known = (value) => value !== null && value !== undefined && Number.isFinite(value);
export const count = (value) => (known(value) ? Math.round(value).toLocaleString('en') : DASH);
export function number(value, digits = 4) {
  if (!known(value)) return DASH;
  const size = Math.abs(value);
  return size !== 0 && (size < 1e-3 || size >= 1e6) ? value.toExponential(2) : String(+value.toPrecision(digits));
}
export const fixed = (value, digits = 4) => (!known(value) ? DASH : Math.abs(value) < 1e5 ? value.toFixed(digits) : value.toExponential(2));
/** A size in the units of the command line: 1.25 GiB, 390.5 MiB. */
export function bytes(value) {
  if (!known(value)) return DASH;
  const [size, unit] = [[2 ** 29, 'GiB', 2 ** 30], [2 ** 19, 'MiB', 2 ** 20], [0, 'KiB', 2 ** 10]]
    .filter(([least]) => Math.abs(value) >= least).map(([, name, one]) => [value / one, name])[0];
  return `${size.toFixed(unit === 'GiB' ? 2 : 1)} ${unit}`;
}
export function duration(seconds) {
  if (!known(seconds)) return DASH;
  if (seconds < 90) return `${Math.round(seconds)} s`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min`;
  return seconds < 172800 ? `${(seconds / 3600).toFixed(seconds < 36000 ? 1 : 0)} h` : `${Math.round(seconds / 86400)} days`;
}
export function ago(text) {
  const seconds = (Date.now() - Date.parse(text)) / 1000;
  if (!known(seconds)) return DASH;
  return seconds < 5 ? 'now' : `${duration(seconds)} ago`;
}
/** A time as 2026-11-28 04:58, where the reader is. */
export function moment(time) {
  const date = new Date(time);
  if (Number.isNaN(date.getTime())) return DASH;
  const two = (value) => String(value).padStart(2, '0');
  return `${date.getFullYear()}-${two(date.getMonth() + 1)}-${two(date.getDate())} ${two(date.getHours())}:${two(date.getMinutes())}`;
}
export const plural = (amount, noun) => `${count(amount)} ${noun}${amount === 1 ? '' : 's'}`;
/** Where a run stands: step 12 of 40, epoch 1 of 3. */
export function standing(row) {
  const parts = [];
  if (known(row.step)) parts.push(known(row.total_steps) ? `step ${count(row.step)} of ${count(row.total_steps)}` : `step ${count(row.step)}`);
  if (known(row.epoch) && known(row.epochs)) parts.push(`epoch ${number(row.epoch, 3)} of ${count(row.epochs)}`);
  return parts.join(', ');
}
