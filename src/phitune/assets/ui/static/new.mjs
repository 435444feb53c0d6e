// A new run. Every answer is a text, as on a command line. Those that are not the default stand
// behind the # of the address, so that a reload, or a link, brings them back.

import { $, $$, acting, bytes, complain, copy, count, debounced, duration, el, get, newest, own, plural, post, Problem, put,
  query, renew, scrolling, table, write } from './api.mjs';

const form = $('#form');
const knobs = new Map($$('[data-name]', form).map((input) => [input.dataset.name, input]));
// What another report than the one shown would come of.
const OF_ROWS = ['model_name', 'dataset_path', 'validation_path', 'validation_split', 'data_format', 'columns', 'roles', 'on_bad_row',
  'prompt_format', 'max_length', 'on_too_long', 'train_on_prompt', 'mix', 'seed'];

// --- answers -----------------------------------------------------------------------------------

const textOf = (input) => (input.type === 'checkbox' ? String(input.checked) : input.value.trim());
const modelName = () => $('#model').value || $('#model-name').value.trim();

function answers() {
  const given = {};
  if (modelName()) given.model_name = modelName();
  if ($('#data').value.trim()) given.dataset_path = $('#data').value.trim();
  for (const [name, input] of knobs) {
    const text = textOf(input);
    if (text && text !== input.dataset.default) given[name] = text;
  }
  return given;
}

function setKnob(name, text) {
  if (name === 'model_name') {
    const known = [...$('#model').options].some((option) => option.value === text);
    $('#model').value = known ? text : '';
    $('#model-name').value = known ? '' : text;
    $('#other').hidden = known;
  } else if (name === 'dataset_path') {
    $('#data').value = text;
  } else if (knobs.has(name)) {
    const input = knobs.get(name);
    if (input.type === 'checkbox') input.checked = text === 'true';
    else input.value = text;
  }
}

function fill(given) {
  for (const [name, input] of knobs) setKnob(name, given[name] ?? input.dataset.default);
  setKnob('model_name', given.model_name ?? $('#model').options[0].value);
  setKnob('dataset_path', given.dataset_path ?? '');
}

function keep() {
  history.replaceState(null, '', `/new#${new URLSearchParams(answers())}`);
  for (const group of $$('details.group')) {
    const changed = $$('[data-name]', group).filter((input) => textOf(input) && textOf(input) !== input.dataset.default).length;
    write($('.changed', group), changed ? `${changed} changed` : '');
  }
}

// --- the command line, and what is wrong with an answer -----------------------------------------

const showCommand = newest(async (signal) => {
  try {
    const { command, problems } = await post('/api/command', { answers: answers() }, { signal });
    write($('#command'), command);
    const wrong = new Map(problems.filter(({ name }) => $(`#f-${name}-wrong`)).map(({ name, message }) => [name, message]));
    for (const place of $$('[id^=f-][id$=-wrong]')) {
      const name = place.id.slice(2, -6);
      complain(place, wrong.get(name) ?? null);
      if (wrong.has(name)) {
        knobs.get(name)?.setAttribute('aria-invalid', 'true');
        place.closest('details')?.setAttribute('open', '');
      } else knobs.get(name)?.removeAttribute('aria-invalid');
    }
    complain($('#start-alert'), problems.filter(({ name }) => !wrong.has(name)).map(({ message }) => message).join('\n') || null);
    $('#start').disabled = problems.length > 0;
  } catch (error) { complain($('#start-alert'), error); }
});

// --- memory and time ------------------------------------------------------------------------------

const showPlan = newest(async (signal) => {
  $('#plan').setAttribute('aria-busy', 'true');
  try {
    const plan = await post('/api/plan', { answers: answers() }, { signal });
    complain($('#plan-alert'), null);
    $('#verdict').className = `verdict ${plan.fits ? 'ok' : 'error'}`;
    write($('#verdict'), plan.verdict);
    renew($('#plan'), memoryBar(plan), !plan.fits && remedies(plan), timeOf(plan),
      ...plan.warnings.map((words) => el('p.note.warning', {}, words)), ...memoryTable(plan));
    $('#plan').removeAttribute('aria-busy');
  } catch (error) {
    if (error.name === 'AbortError') return;
    $('#plan').removeAttribute('aria-busy');
    write($('#verdict'), '');
    put($('#plan'));
    complain($('#plan-alert'), error);
  }
});

const colourOf = (index) => `var(--c${index % 12})`;

/** The named buffers of the peak beside each other, against the limit. */
function memoryBar({ terms, total_bytes: total, memory: { budget_bytes: limit }, fits }) {
  const whole = Math.max(total, limit);
  const bar = el(fits ? 'div.membar' : 'div.membar.over', { role: 'img', 'data-bytes': String(total), 'data-limit': String(limit),
    'aria-label': `Memory: ${bytes(total)} of at most ${bytes(limit)}${fits ? '' : ', more than there is'}` });
  terms.forEach((term, index) => {
    if (!term.bytes) return;
    const part = el('span', { 'data-bytes': String(term.bytes), title: `${term.name}: ${bytes(term.bytes)}` });
    part.style.width = `${(100 * term.bytes) / whole}%`;
    part.style.background = colourOf(index);
    bar.append(part);
  });
  const edge = el('span.limit', { title: `the limit: ${bytes(limit)}` });
  edge.style.width = `${(100 * limit) / whole}%`;
  if (!fits) bar.append(edge);
  return bar;
}

function memoryTable({ terms, total_bytes: total, left_bytes: left, memory: { budget_bytes: limit } }) {
  const rows = terms.map((term, index) => ({ term, index })).filter(({ term }) => term.bytes).map(({ term, index }) => {
    const swatch = el('span.swatch');
    swatch.style.background = colourOf(index);
    return [el('span', {}, swatch, term.name), bytes(term.bytes), `${Math.round((100 * term.bytes) / total)} %`];
  });
  rows.push([el('strong', {}, 'peak'), bytes(total), ''], ['limit', bytes(limit), ''], [left < 0 ? el('strong.worse', {}, 'missing') : 'left', bytes(Math.abs(left)), '']);
  return [
    table(['memory at the peak', '>size', '>share'], rows, { kind: 'table.terms', caption: 'Memory at the peak of a step' }),
    el('details', {}, el('summary', {}, 'What these hold'), el('dl', {}, terms.filter((term) => term.bytes).flatMap((term) => [el('dt', {}, term.name), el('dd', {}, term.what)]))),
  ];
}

function remedies({ remedies: lines }) {
  return lines.length > 0 && el('div.note.warning', {}, el('strong', {}, 'It fits with '), lines.join('\nor with '));
}

function timeOf({ estimates, speeds, steps, rows, train_command: command }) {
  const stepsOf = `${plural(steps.in_all, 'step')}${rows.source ? ` over ${plural(rows.rows, 'row')}` : ''}`;
  const advised = Object.entries(steps.advised_settings ?? {}).map(([name, value]) => `${name} ${value}`).join(', ');
  return [
    el('p', {}, estimates.length ? `About ${estimates.map((one) => `${duration(one.hours * 3600)} on ${one.machine.name}`).join(' or ')}; ${stepsOf}.` : `${stepsOf}.`),
    steps.verdict !== 'enough' && el('p.note.warning', {}, `${steps.verdict === 'few' ? 'These are few steps' : 'These are too few steps to learn from'}${advised ? `: ${advised} makes more of them.` : '.'}`),
    rows.upper_bound && el('p.pale', {}, 'No data is named: each row is taken to be as long as max_length allows, so a real run takes less.'),
    !command && el('p.note.warning', {}, 'No change of settings makes it fit here; take a smaller model.'),
    speeds.length > 0 && el('details', {}, el('summary', {}, 'On other machines'), scrolling('Time on other machines', table(['machine', '>time', '>tokens/s'],
      speeds.filter((one) => one.hours).map((one) => [own(one.machine.name), duration(one.hours * 3600), count(one.tokens_per_second)])))),
  ].flat().filter(Boolean);
}

// --- the report on the data --------------------------------------------------------------------------

const hint = $('#report').firstElementChild;
const FIRST = 4; // findings that are shown at once, the worst first
let browsed = 1;
const check = newest(async (signal) => {
  if (!$('#data').value.trim()) return;
  write($('#checking'), 'Reading\u2026');
  try {
    const report = await post('/api/check', { answers: answers(), lines: null }, { signal });
    complain($('#check-alert'), null);
    renew($('#report'), ...reportOf(report.report ?? report));
    write($('#checking'), '');
  } catch (error) {
    if (error.name === 'AbortError') return;
    write($('#checking'), '');
    complain($('#check-alert'), error);
  }
});

function reportOf(report) {
  const worst = report.verdict ?? ['error', 'warning'].find((verdict) => report.checks.some((one) => one.verdict === verdict)) ?? 'ok';
  const bad = report.checks.filter(({ verdict }) => verdict !== 'ok');
  const good = report.checks.filter(({ verdict }) => verdict === 'ok');
  const { rows, tokens } = report;
  const words = { ok: 'Nothing is wrong with it.', warning: 'It can be trained; look at the warnings.', error: 'It cannot be trained as it is.' };
  return [
    el('p', {}, el('span.verdict', { class: `verdict ${worst}` }, words[worst]), ' ', own(report.formats.join('; ')), `. ${plural(rows.usable_rows, 'row')}: ${count(rows.train_rows)} to train, ${count(rows.validation_rows)} to validate`,
      rows.unusable_rows ? `, ${count(rows.unusable_rows)} not usable` : '', '.'),
    ...(report.notes ?? []).map((note) => el('p.note', {}, note)),
    report.no_tokens_because && el('p.note.warning', {}, report.no_tokens_because),
    bad.length > 0 && el('ul.findings', {}, bad.slice(0, FIRST).map(finding)),
    bad.length > FIRST && el('details', {}, el('summary', {}, `${count(bad.length - FIRST)} more to look at`), el('ul.findings', {}, bad.slice(FIRST).map(finding))),
    good.length > 0 && el('details', {}, el('summary', {}, `${plural(good.length, 'check')} passed`), el('ul.findings', {}, good.map(finding))),
    rowsOf(report),
    tokens && lengthsOf(tokens),
  ].filter(Boolean);
}

function finding({ title, verdict, message, rows, examples, places, details, remedy }) {
  const where = examples ?? (details?.length ? details : places ?? []).map((one, index) => (places?.[index] ? `${places[index].file}:${places[index].line}${details?.[index] ? `: ${details[index]}` : ''}` : one));
  return el(`li.${verdict}`, {}, el('span.verdict', { class: `verdict ${verdict}` }, verdict), ' ', el('strong', {}, title), rows ? ` (${plural(rows, 'row')})` : '',
    message && el('p', { dir: 'auto' }, message),
    where.length > 0 && el('details', {}, el('summary', {}, plural(where.length, 'example')), el('ul', {}, where.map((one) => el('li', { dir: 'auto' }, one)))),
    remedy && el('p', {}, el('span.pale', {}, 'Remedy: '), own(remedy)));
}

function rowsOf(report) {
  const shown = el('div', {}, report.samples.map(sampleOf));
  const wrong = el('p.alert', { role: 'alert' });
  const line = el('input.number', { type: 'number', min: '1', value: String(browsed), id: 'line', inputmode: 'numeric' });
  const look = newest(async (signal, to) => {
    browsed = Math.max(1, to);
    line.value = browsed;
    try {
      const answer = await post('/api/check', { answers: answers(), lines: String(browsed) }, { signal });
      put(shown, ...(answer.report ?? answer).samples.map(sampleOf));
      complain(wrong, null);
    } catch (error) { complain(wrong, error); }
  });
  line.addEventListener('change', () => look(Number(line.value) || 1));
  line.addEventListener('keydown', (event) => { if (event.key === 'Enter') { event.preventDefault(); look(Number(line.value) || 1); } });
  const step = (words, by) => el('button.small', { type: 'button', onclick: () => look(browsed + by) }, words);
  return el('section', { 'aria-labelledby': 'rows-title' },
    el('h3', { id: 'rows-title' }, 'Rows as the model sees them'),
    el('p.key', {}, el('span', {}, el('mark', {}, 'trained'), ' the loss counts it'), el('span', {}, 'plain: read, not trained'), el('span', {}, el('span.control', {}, 'boxed'), ' control token'), el('span.pale', {}, 'pale: added by the prompt format')),
    el('div.tools', {}, el('label', { for: 'line' }, 'Row on line'), line, step('Previous', -1), step('Next', 1)), wrong, shown);
}

function sampleOf({ title, file, line, tokens, trained_tokens: trained, spans }) {
  const named = `${title}, ${file}:${line}`;
  return el('section', {}, el('h4.hidden', {}, named),
    el('p.place.pale', { dir: 'auto', 'aria-hidden': 'true' }, named, tokens === null ? '' : ` · ${plural(tokens, 'token')}, ${count(trained)} trained`),
    el('div.tokens', { tabindex: '0', role: 'group', 'aria-label': `Tokens of ${file}:${line}`, dir: 'auto' }, spans.map((span) => {
      const kind = [span.control && 'control', !span.from_data && !span.control && !span.trained && 'added'].filter(Boolean).join(' ');
      return el(span.trained ? 'mark' : 'span', { class: kind || null, title: span.trained ? 'trained' : null }, span.text);
    })));
}

function lengthsOf(tokens) {
  const kinds = [['prompts', tokens.prompt_tokens], ['answers', tokens.answer_tokens], ['rows', tokens.row_tokens], ['rows with end', tokens.row_tokens_with_end_tokens]];
  const rows = kinds.filter(([, one]) => one).map(([kind, one]) => [kind, one.mean.toFixed(1), count(one.p50), count(one.p90), count(one.p95), count(one.p99), count(one.maximum), count(one.total)]);
  const histogram = tokens.histograms?.row_tokens;
  const bars = histogram && [...histogram.rows, ...(histogram.rows_beyond ? [histogram.rows_beyond] : [])];
  const most = bars && Math.max(...bars);
  const drawn = bars && el('div.histogram', { role: 'img', 'aria-label': `Rows by length: ${bars.map((amount, index) => (amount ? `${count(amount)} from ${count(index * histogram.width_tokens)}` : '')).filter(Boolean).slice(0, 12).join(', ')} tokens` },
    bars.map((amount, index) => {
      const first = index * histogram.width_tokens;
      const bar = el('span', { class: first > tokens.max_length_tokens ? 'over' : null, title: `from ${count(first)} tokens: ${plural(amount, 'row')}` });
      bar.style.height = amount ? `max(2px, ${(100 * amount) / most}%)` : '0';
      return bar;
    }));
  const dropped = tokens.rows_longer_than_max_length;
  const { row_tokens: lengths } = tokens;
  return el('details', {}, el('summary', {}, el('h3', {}, 'Lengths'), el('span.pale', {}, ` ${count(lengths.mean)} tokens a row, 95 % have at most ${count(lengths.p95)}, the longest ${count(lengths.maximum)}`, dropped ? `; ${plural(dropped, 'row')} longer than max_length` : '')),
    scrolling('Lengths in tokens', table(['tokens of', '>mean', '>p50', '>p90', '>p95', '>p99', '>longest', '>in all'], rows)), drawn,
    bars && el('p.row', {}, el('small', {}, '0'), el('small', {}, 'rows by length'), el('small.push', {}, `${count((bars.length) * histogram.width_tokens)} tokens`)));
}

// --- data: completion and upload ---------------------------------------------------------------------

const [data, list] = [$('#data'), $('#places')];
const files = $$('#files span').map((span) => span.textContent);
let at = -1;

function offer(places) {
  at = -1;
  put(list, ...places.slice(0, 50).map((place, index) => el('li', { role: 'option', id: `place-${index}`, 'aria-selected': 'false', dir: 'auto',
    onmousedown: (event) => { event.preventDefault(); take(place); } }, place)));
  open(places.length > 0);
}
function open(shown) {
  list.hidden = !shown;
  data.setAttribute('aria-expanded', String(shown));
  if (!shown) data.removeAttribute('aria-activedescendant');
}
function take(place) {
  data.value = place;
  if (place.endsWith('/')) suggest();
  else { open(false); changed('dataset_path'); }
}
const suggest = newest(async (signal) => {
  const text = data.value.trim();
  if (!text) return offer(files);
  try { return offer((await get('/api/places', { text }, { signal })).places); } catch { return open(false); }
});
const suggestSoon = debounced(120, suggest);
data.addEventListener('focus', () => { if (!data.value) suggest(); });
data.addEventListener('blur', () => open(false));
data.addEventListener('keydown', (event) => {
  const options = [...list.children];
  if (event.key === 'Escape') { open(false); changed('dataset_path'); }
  else if (event.key === 'Enter') {
    event.preventDefault();
    if (at >= 0 && !list.hidden) take(options[at].textContent); else { open(false); changed('dataset_path'); }
  } else if (event.key === 'ArrowDown' || event.key === 'ArrowUp') {
    event.preventDefault();
    if (list.hidden) { suggest(); return; }
    if (!options.length) return;
    at = (at + (event.key === 'ArrowDown' ? 1 : -1) + options.length) % options.length;
    options.forEach((option, index) => option.setAttribute('aria-selected', String(index === at)));
    data.setAttribute('aria-activedescendant', options[at].id);
    options[at].scrollIntoView({ block: 'nearest' });
  }
});

/** By XMLHttpRequest, since fetch does not tell how much of an upload has been sent. */
function upload(file) {
  const [bar, words, wrong] = [$('#sent'), $('#sent-words'), $('#f-dataset_path-wrong')];
  complain(wrong, null);
  bar.hidden = false;
  const sending = new XMLHttpRequest();
  sending.open('PUT', query('/api/upload', { name: file.name }));
  sending.responseType = 'json';
  sending.upload.onprogress = (event) => { if (event.lengthComputable) bar.value = event.loaded / event.total; write(words, `${bytes(event.loaded)} of ${bytes(file.size)}`); };
  sending.onloadend = () => {
    bar.hidden = true;
    if (sending.status >= 200 && sending.status < 300 && sending.response?.path) {
      write(words, `Uploaded, ${bytes(file.size)}.`);
      take(sending.response.path);
    } else {
      write(words, '');
      complain(wrong, new Problem(sending.response?.error?.message ?? 'The upload failed: the server of this page does not answer.'));
    }
  };
  sending.send(file);
}
$('#browse').addEventListener('click', () => $('#file').click());
$('#file').addEventListener('change', (event) => { if (event.target.files[0]) upload(event.target.files[0]); event.target.value = ''; });
const drop = $('#drop');
for (const [name, over] of [['dragover', true], ['dragleave', false], ['drop', false]]) {
  drop.addEventListener(name, (event) => { event.preventDefault(); drop.classList.toggle('over', over); });
}
drop.addEventListener('drop', (event) => { if (event.dataTransfer.files[0]) upload(event.dataTransfer.files[0]); });

// --- what happens -----------------------------------------------------------------------------------------

const planSoon = debounced(300, showPlan);
const checkSoon = debounced(600, check);
const commandSoon = debounced(120, showCommand);
let before = '';

function changed(name = null) {
  keep();
  const now = JSON.stringify(answers());
  if (now === before) return;
  before = now;
  commandSoon();
  planSoon();
  if (name === null || OF_ROWS.includes(name)) checkSoon();
}

form.addEventListener('input', (event) => {
  const { target } = event;
  if (target === $('#model')) $('#other').hidden = Boolean(target.value);
  if (target === data) { suggestSoon(); return; } // Its path counts once it is whole.
  if (target === $('#model-name') || target.id === 'line') return;
  changed(target === $('#model') ? 'model_name' : target.dataset.name ?? '');
});
form.addEventListener('keydown', (event) => {
  // Enter in a field would submit the form; nobody means to start a training by it.
  if (event.key !== 'Enter' || !event.target.matches('input, select')) return;
  event.preventDefault();
  changed(event.target.id === 'model-name' ? 'model_name' : event.target.dataset.name ?? '');
});
data.addEventListener('change', () => changed('dataset_path'));
$('#model-name').addEventListener('change', () => changed('model_name'));
$$('[data-preset]').forEach((button) => button.addEventListener('click', () => {
  const settings = Object.entries(JSON.parse(button.dataset.preset));
  settings.forEach(([name, text]) => setKnob(name, text));
  write($('#preset-said'), `${button.title}. Set: ${settings.map(([name, text]) => `${name} ${text}`).join(', ')}.`);
  changed();
}));
$('#check').addEventListener('click', () => {
  if (!data.value.trim()) { complain($('#check-alert'), 'Name the data first: the path of a file, or upload one.'); data.focus(); return; }
  check();
});
$('#copy').addEventListener('click', (event) => copy(event.currentTarget, $('#command').textContent));
$('#reset').addEventListener('click', () => { fill({}); put($('#report'), hint); changed(); });
form.addEventListener('submit', (event) => {
  event.preventDefault();
  acting($('#start'), $('#start-alert'), async () => {
    write($('#starting'), 'Starting\u2026');
    try {
      const { run } = await post('/api/start', { answers: answers() });
      location.assign(query('/run', { run }));
    } finally { write($('#starting'), ''); }
  });
});

const kept = location.hash.slice(1);
fill(kept ? Object.fromEntries(new URLSearchParams(kept)) : JSON.parse($('#given').dataset.values));
changed();
addEventListener('hashchange', () => { fill(Object.fromEntries(new URLSearchParams(location.hash.slice(1)))); changed(); });
