// One run. A reload shows all at once from the history; then what is new is read each second, from
// the place in the file where the last answer ended.

import { $, acting, bytes, complain, copy, count, duration, el, every, fixed, get, moment, number, own, plural, post, put,
  scrolling, standing, table, write } from './api.mjs';
import { Chart, append, controls, curve, legend, placeOf } from './chart.mjs';

const run = $('#run').dataset.run;
const MOST_POINTS = 4000; // the history is read anew, downsampled, beyond this
const history = { train: {}, validation: {}, incidents: [], offset: null };
let row = null;
let changeable = [];
let settings = [];

const charts = {
  loss: new Chart($('#loss'), 'Loss', { height: 300, group: 'run' }),
  learning_rate: new Chart($('#learning_rate'), 'Learning rate', { height: 150, group: 'run' }),
  grad_norm: new Chart($('#grad_norm'), 'Gradient norm', { height: 150, group: 'run' }),
  tokens_per_second: new Chart($('#tokens_per_second'), 'Tokens a second', { height: 150, group: 'run' }),
};
const view = controls($('#view'), draw);

function draw() {
  const { train, validation, incidents } = history;
  const marks = incidents.map(({ step }, index) => ({ x: placeOf(train, step, view.axis), label: String(index + 1) }));
  const lines = [
    { label: 'training', color: '--c0', points: curve(train, 'loss', view.axis) },
    { label: 'validation', color: '--c1', points: { ...curve(validation, 'loss', view.axis), low: null } },
  ];
  charts.loss.draw(lines, { ...view, marks });
  legend($('#legend'), lines.filter(({ points }) => points.x.length));
  const small = { learning_rate: '--c7', grad_norm: '--c5', tokens_per_second: '--c2' };
  for (const [name, color] of Object.entries(small)) {
    const line = { label: charts[name].what.toLowerCase(), color, points: curve(train, name, view.axis) };
    charts[name].draw([line], { ...view, log: view.log && name === 'grad_norm', smoothing: name === 'learning_rate' ? 0 : view.smoothing, marks });
  }
}

function showIncidents() {
  const list = history.incidents.map(({ step, kind, text }) =>
    el('li', {}, el('strong', {}, kind), step === null ? ' ' : ` at step ${count(step)}: `, own(text)));
  put($('#incidents'), list.length && el('details', { open: list.length <= 8 },
    el('summary', {}, el('h3', {}, plural(list.length, 'incident'))), el('ol.incidents', {}, list)));
}

/** Read aloud where the state changes, and once a minute; not with each step. */
let spoken = { of: '', at: 0 };
function speak() {
  const of = [row.state, row.phase].join();
  if (of === spoken.of && Date.now() - spoken.at < 60000) return;
  spoken = { of, at: Date.now() };
  write($('#spoken'), `${$('#state').textContent}. ${row.said ?? ''}`);
}

function facts(pairs) {
  return pairs.filter(([, value]) => value !== null && value !== '-').map(([name, value]) =>
    el('div', {}, el('dt', {}, name), el('dd', { dir: 'auto' }, value)));
}

function showRow() {
  const running = ['running', 'preparing'].includes(row.state);
  const state = $('#state');
  state.dataset.state = row.state;
  write(state, row.state + (row.phase && running && row.phase !== row.state ? `: ${row.phase}` : ''));
  write($('#said'), row.said ?? '');
  speak();
  const bar = $('#progress');
  Object.assign(bar, { max: row.total_steps || 1, value: row.step || 0 });
  bar.hidden = !row.total_steps;
  bar.setAttribute('aria-valuetext', standing(row));
  const planned = row.planned_bytes && row.limit_bytes ? `${bytes(row.planned_bytes)} of ${bytes(row.limit_bytes)}` : bytes(row.planned_bytes);
  put($('#facts'), ...facts([
    ['Step', row.total_steps ? `${count(row.step)} of ${count(row.total_steps)}` : count(row.step)],
    ['Epoch', row.epochs ? `${number(row.epoch, 3)} of ${count(row.epochs)}` : '-'],
    ['Rows', row.total_rows ? `${count(row.rows)} of ${count(row.total_rows)}` : '-'],
    ['Time left', running ? duration(row.seconds_left) : '-'],
    ['Loss', fixed(row.loss)],
    ['Best validation loss', fixed(row.validation_loss)],
    ['Memory planned', planned],
    ['Model', row.model ?? '-'],
    ['Data', row.data ?? '-'],
    ['Began', row.started ? moment(row.started) : '-'],
  ]));
  $('#stop').hidden = !running;
  $('#resume').hidden = !row.can_resume;
  $('#change').hidden = !row.can_change;
  $('#talk').hidden = $('#results').hidden = !row.has_adapter;
  document.title = `${running && row.total_steps ? `${Math.floor((100 * row.step) / row.total_steps)} % ` : ''}${row.name} - phitune`;
}

async function showAbout() {
  const about = await get('/api/run', { run });
  ({ changeable, settings } = about);
  put($('#settings'), scrolling('Table of settings', table(['setting', 'value', 'origin', 'remark'],
    settings.map(({ name, value, origin, remark }) => [el('code', {}, name), own(value), origin, own(remark)]))));
  put($('#command'), about.command && [el('h3', {}, 'On the command line'), commandBox(about.command)],
    about.checkpoints?.length && el('p.pale', {}, `Checkpoints at step ${about.checkpoints.map(count).join(', ')}.`));
  const plain = Object.entries(about.summary ?? {}).filter(([, value]) => value !== null && typeof value !== 'object');
  $('#outcome').hidden = !plain.length;
  put($('#summary'), ...facts(plain.map(([name, value]) => [name.replaceAll('_', ' '), typeof value === 'number' ? number(value, 6) : String(value)])));
  const log = $('#log');
  const below = log.scrollTop + log.clientHeight >= log.scrollHeight - 8; // Who reads above is left there.
  $('#logged').hidden = !about.log;
  write(log, about.log ?? '');
  if (below) log.scrollTop = log.scrollHeight;
  return about.row;
}

function commandBox(command) {
  const button = el('button.small', { type: 'button', onclick: () => copy(button, command) }, 'Copy');
  return el('div.command', {}, el('pre', { tabindex: '0', role: 'region', 'aria-label': 'Command' }, command), button);
}

async function showSamples() {
  const { prompts, left_out: leftOut } = await get('/api/samples', { run });
  $('#samples').hidden = !prompts.length;
  const before = [...document.querySelectorAll('.strip')].map((strip) => strip.scrollLeft);
  put($('#prompts'), ...prompts.map(({ prompt, answers }, index) => el('section', { 'aria-label': `Prompt ${index + 1}` },
    el('p.prompt', { dir: 'auto', tabindex: '0' }, prompt),
    el('ol.strip', { tabindex: '0', 'aria-label': `Answers to prompt ${index + 1}, in the order of training` }, answers.map((answer) => el('li', {},
      el('small', {}, answer.epoch === 0 ? 'before training' : answer.step === null ? `epoch ${number(answer.epoch)}` : `step ${count(answer.step)}`, answer.tokens === null ? '' : ` · ${plural(answer.tokens, 'token')}`, answer.stopped === false ? ' · cut' : ''),
      el('p.answer', { dir: 'auto' }, answer.pieces.map(({ text, changed }) => (changed ? el('mark', {}, text) : text)))))))),
  leftOut ? el('p.pale', {}, `${plural(leftOut, 'answer')} left out here; all are in samples.jsonl.`) : null);
  document.querySelectorAll('.strip').forEach((strip, index) => { strip.scrollLeft = before[index] ?? strip.scrollWidth; });
}

async function start() {
  const [found, about] = await Promise.all([get('/api/history', { run, points: 800 }), showAbout()]);
  Object.assign(history, found);
  row = about;
  showRow();
  draw();
  showIncidents();
  await showSamples();
}

let polled = 0;
let seen = '';
let failed = false;
every(1000, async () => {
  try {
    if (history.offset === null) await start();
    const news = await get('/api/tail', { run, from: history.offset });
    if (news.restarted || (history.train.step?.length ?? 0) > MOST_POINTS) { history.offset = null; return; }
    const added = news.train.step?.length || news.validation.step?.length;
    append(history.train, news.train);
    append(history.validation, news.validation);
    history.incidents.push(...news.incidents);
    Object.assign(history, { offset: news.offset });
    row = news.row;
    showRow();
    if (added || news.incidents.length) draw();
    if (news.incidents.length) showIncidents();
    // The log and the answers change less often than the curves.
    const now = [row.state, row.phase, Math.floor(row.epoch ?? 0)].join();
    if (now !== seen || (polled % 3 === 0 && ['running', 'preparing'].includes(row.state))) await showAbout();
    if (now !== seen && seen) await showSamples();
    seen = now;
    polled += 1;
    if (failed) complain($('#alert'), null);
    failed = false;
  } catch (error) {
    if (!error.gone) { complain($('#alert'), error); failed = true; }
    throw error;
  }
});

$('#stop').addEventListener('click', (event) => acting(event.currentTarget, $('#alert'), async () => {
  write($('#said'), 'Stopping: a checkpoint is written first.');
  ({ row } = await post('/api/stop', { run }));
  showRow();
}));
const resume = (button, place, changes) => acting(button, place, async () => {
  ({ row } = await post('/api/resume', { run, changes }));
  showRow();
  $('#changing').close();
});
$('#resume').addEventListener('click', (event) => resume(event.currentTarget, $('#alert'), {}));

function addChange() {
  const value = el('input', { 'aria-label': 'Value', autocomplete: 'off' });
  const fill = () => { value.value = settings.find(({ name }) => name === select.value)?.value ?? ''; };
  const select = el('select', { 'aria-label': 'Setting', onchange: fill }, changeable.map((name) => el('option', { value: name }, name)));
  const taken = [...$('#changes').querySelectorAll('select')].map((one) => one.value);
  select.value = changeable.find((name) => !taken.includes(name)) ?? changeable[0];
  fill();
  $('#changes').append(el('div.fields', {}, select, value));
  select.focus();
}
$('#change').addEventListener('click', () => {
  put($('#changes'));
  complain($('#change-alert'), null);
  $('#changing').showModal();
  addChange();
});
$('#more').addEventListener('click', addChange);
$('#leave').addEventListener('click', () => $('#changing').close());
$('#changing form').addEventListener('submit', (event) => {
  event.preventDefault();
  const pairs = [...$('#changes').children].map((line) => [$('select', line).value, $('input', line).value.trim()]);
  const old = Object.fromEntries(settings.map(({ name, value }) => [name, value]));
  resume($('#go'), $('#change-alert'), Object.fromEntries(pairs.filter(([name, value]) => value && value !== old[name])));
});
