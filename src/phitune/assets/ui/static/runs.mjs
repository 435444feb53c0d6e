// The table of runs, new every two seconds without losing selection or focus; curves of the
// selected ones over each other, and the settings in which they differ.

import { $, $$, ago, acting, bytes, complain, debounced, duration, el, every, fixed, get, moment, newest, own, plural, post, put,
  query, scrolling, standing, table, write } from './api.mjs';
import { Chart, colours, controls, curve, legend } from './chart.mjs';

const MOST = 12; // runs in one overlay
const tbody = $('#rows');
const chosen = new Set(JSON.parse(sessionStorage.getItem('phitune.chosen') ?? '[]'));
const sizes = new Map();
const place = (id) => `/run?run=${encodeURIComponent(id)}`;
let runs = null; // until the first answer; the server's own rows stand there
let sort = null; // {name, down}
let asked = false; // whether a size is on its way

function made(id) {
  const box = el('input', { type: 'checkbox' });
  return el('tr', { 'data-id': id },
    el('td', {}, box),
    el('th.name', { scope: 'row' }, el('a', { href: place(id), dir: 'auto' })),
    el('td.progress', {}, el('span.state'), ' ', el('progress'), el('small.standing')),
    ...['r.middle.loss', 'r.validation', 'wide.model', 'wide.data', 'r.middle.left', 'r.wide.updated', 'r.middle.bytes']
      .map((kind) => el(`td.${kind}`, { dir: kind.includes('wide.m') || kind.includes('wide.d') ? 'auto' : null })));
}

function fill(tr, run) {
  const cell = (kind, text) => write($(`.${kind}`, tr), text);
  const [box, state, bar] = [$('input', tr), $('.state', tr), $('progress', tr)];
  box.checked = chosen.has(run.id);
  tr.classList.toggle('chosen', box.checked);
  if (!box.getAttribute('aria-label')) box.setAttribute('aria-label', `Select ${run.name}`);
  write($('.name a', tr), run.name);
  state.dataset.state = run.state;
  write(state, run.state + (run.state === 'running' && run.phase && run.phase !== 'training' ? `: ${run.phase}` : ''));
  Object.assign(bar, { max: run.total_steps || 1, value: run.step || 0 });
  bar.hidden = !run.total_steps || run.state === 'finished' || (run.state === 'failed' && !run.step);
  if (!bar.getAttribute('aria-label')) bar.setAttribute('aria-label', `Steps of ${run.name}`);
  const words = $('.standing', tr);
  // How far it came says most, but of one that went wrong it is why.
  write(words, (['failed', 'killed', 'elsewhere', 'unknown'].includes(run.state) ? '' : standing(run)) || run.said || '');
  words.title = run.said ?? '';
  cell('loss', fixed(run.loss));
  cell('validation', fixed(run.validation_loss));
  cell('model', run.model ?? '-');
  cell('data', run.data ?? '-');
  cell('left', run.state === 'running' ? duration(run.seconds_left) : '-');
  cell('updated', run.updated ? ago(run.updated) : '-');
  $('.updated', tr).title = run.updated ? moment(run.updated) : '';
  cell('bytes', bytes(run.bytes ?? sizes.get(run.id)));
}

function show() {
  if (!runs) return;
  const wanted = $('#filter').value.trim().toLowerCase().split(/\s+/);
  const has = (run) => wanted.every((word) => [run.id, run.name, run.model, run.data, run.state].join(' ').toLowerCase().includes(word));
  const listed = runs.filter(has);
  if (sort) {
    const value = (run) => (sort.name === 'bytes' ? run.bytes ?? sizes.get(run.id) : run[sort.name]) ?? null;
    const order = (a, b) => (typeof a === 'string' ? a.localeCompare(b, undefined, { numeric: true }) : a - b) * (sort.down ? -1 : 1);
    // What is not known stands last, whichever way the others go.
    listed.sort((a, b) => (value(a) === null) - (value(b) === null) || (value(a) === null ? 0 : order(value(a), value(b))));
  }
  const held = document.activeElement;
  const there = new Map($$('tr', tbody).map((tr) => [tr.dataset.id, tr]));
  listed.forEach((run, index) => {
    const tr = there.get(run.id) ?? made(run.id);
    there.delete(run.id);
    fill(tr, run);
    if (tbody.children[index] !== tr) tbody.insertBefore(tr, tbody.children[index] ?? null);
  });
  there.forEach((tr) => tr.remove());
  if (held !== document.activeElement && held.isConnected) held.focus({ preventScroll: true }); // A row that moves loses it.
  $('#empty').hidden = runs.length > 0;
  $('#listed').hidden = !runs.length;
  $('#none').hidden = listed.length > 0;
  bar();
}

function bar() {
  $('#bar').hidden = !chosen.size;
  write($('#chosen'), chosen.size ? `${plural(chosen.size, 'run')} selected${chosen.size > MOST ? `; curves of the first ${MOST}` : ''}` : '');
  $('#delete').disabled = chosen.size !== 1;
  $('#delete').title = chosen.size > 1 ? 'One run at a time is deleted.' : '';
  const able = runs.filter((run) => chosen.has(run.id) && run.has_adapter).map((run) => run.id);
  $('#talk').hidden = !able.length;
  $('#talk').href = query('/talk', { run: able });
}

/** Sizes of folders are asked for one by one, since a large one takes its time. */
async function measure() {
  if (asked) return;
  asked = true;
  for (const run of runs.filter(({ id, bytes: known }) => (known ?? null) === null && !sizes.has(id))) {
    sizes.set(run.id, await get('/api/size', { run: run.id }).then((answer) => answer.bytes).catch(() => null));
    const tr = tbody.querySelector(`[data-id="${CSS.escape(run.id)}"]`);
    if (tr) fill(tr, runs.find(({ id }) => id === run.id) ?? run);
  }
  asked = false;
}

const chart = new Chart($('#curves'), 'Loss of the selected runs', { height: 320 });
let overlaid = [];
const view = controls($('#view'), draw, { metric: true });

function draw() {
  const lines = overlaid.map((run, index) => {
    const points = curve(run[view.metric], 'loss', view.axis);
    return { label: run.name, color: colours[index], dash: index % 2 ? [7, 3] : undefined, points: { x: points.x, y: points.y } };
  });
  chart.draw(lines, view);
  legend($('#legend'), lines);
}

const overlay = newest(async (signal) => {
  const some = [...chosen].slice(0, MOST);
  $('#overlay').hidden = !some.length;
  $('#difference').hidden = some.length < 2;
  if (!some.length) { overlaid = []; return; }
  try {
    const [curves, difference] = await Promise.all([
      get('/api/overlay', { run: some, points: 400 }, { signal }),
      some.length > 1 ? get('/api/difference', { run: some }, { signal }) : null,
    ]);
    overlaid = curves.runs;
    draw();
    if (difference) {
      put($('#settings'), difference.settings.length
        ? scrolling('Table of the settings', table(['setting', ...overlaid.map((run) => run.name)],
          difference.settings.map(({ name, values }) => [el('code', {}, name), ...values.map((value) => own(value))])))
        : el('p.pale', {}, 'All settings are the same.'));
    }
    complain($('#overlay-alert'), null);
  } catch (error) { complain($('#overlay-alert'), error); }
});
const soon = debounced(150, overlay);

function choose() {
  sessionStorage.setItem('phitune.chosen', JSON.stringify([...chosen]));
  show();
  soon();
}

tbody.addEventListener('change', (event) => {
  const { id } = event.target.closest('tr').dataset;
  if (event.target.checked) chosen.add(id); else chosen.delete(id);
  choose();
});
$('#clear').addEventListener('click', () => { chosen.clear(); choose(); $('#filter').focus(); });
$('#filter').addEventListener('input', show);
$$('[data-sort]').forEach((button) => button.addEventListener('click', () => {
  const name = button.dataset.sort;
  sort = sort?.name !== name ? { name, down: false } : sort.down ? null : { name, down: true };
  $$('th[aria-sort]').forEach((th) => th.removeAttribute('aria-sort'));
  if (sort) button.closest('th').setAttribute('aria-sort', sort.down ? 'descending' : 'ascending');
  show();
}));

const dialog = $('#deleting');
$('#delete').addEventListener('click', () => {
  const run = runs?.find(({ id }) => chosen.has(id));
  if (!run) return;
  $('#typed').value = '';
  $('#really').disabled = true;
  dialog.dataset.id = run.id;
  write($('#doomed'), run.name);
  complain($('#delete-alert'), null);
  dialog.showModal();
  $('#typed').focus();
});
$('#typed').addEventListener('input', () => { $('#really').disabled = $('#typed').value !== $('#doomed').textContent; });
$('#keep').addEventListener('click', () => dialog.close());
$('form', dialog).addEventListener('submit', (event) => {
  event.preventDefault();
  acting($('#really'), $('#delete-alert'), async () => {
    if ($('#really').disabled) return;
    await post('/api/delete', { run: dialog.dataset.id, name: $('#typed').value });
    runs = runs.filter(({ id }) => id !== dialog.dataset.id);
    chosen.delete(dialog.dataset.id);
    dialog.close();
    choose();
    $('#filter').focus();
  });
});

let polled = 0;
every(2000, async () => {
  try {
    runs = (await get('/api/runs')).runs;
    complain($('#alert'), null);
  } catch (error) {
    if (!error.gone) complain($('#alert'), error);
    throw error;
  }
  const left = [...chosen].filter((id) => !runs.some((run) => run.id === id));
  left.forEach((id) => chosen.delete(id));
  show();
  measure();
  const alive = runs.some((run) => chosen.has(run.id) && ['running', 'preparing'].includes(run.state));
  if (chosen.size && (!polled || left.length || (alive && polled % 3 === 0))) overlay();
  polled += 1;
});
