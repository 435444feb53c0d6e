// Evaluation, comparison, layers and exports of a run. Each is a job of the server, which goes on
// when this page is closed and is found again when it is opened.

import { $, $$, acting, bytes, complain, copy, count, el, every, fixed, get, number, own, plural, post, put, scrolling, table,
  write } from './api.mjs';

const run = $('#run').dataset.run;
const sections = new Map($$('.job').map((section) => [section.dataset.kind, section]));
const jobs = new Map(); // by kind: the newest job
const shown = new Map(); // by kind: the job whose result is shown

const RENDER = { evaluate: evaluation, compare: comparison, layers: heat, export: exported };

function show(kind) {
  const [section, job] = [sections.get(kind), jobs.get(kind)];
  const running = job?.state === 'running';
  $('.stop', section).hidden = !running;
  $('[type=submit]', section).disabled = running;
  const state = $('.state', section);
  state.hidden = !job;
  if (!job) return;
  state.dataset.state = job.state;
  write(state, job.state);
  write($('.said', section), job.state === 'failed' && job.code !== null ? `Exit code ${job.code}; the log says why.` : '');
  const log = $('.log', section);
  $('.logged', section).hidden = !job.log;
  write(log, `${job.command ? `$ ${job.command}\n` : ''}${job.log ?? ''}`);
  if (running || job.state === 'failed') $('.logged', section).open = true;
  if (running) log.scrollTop = log.scrollHeight;
  if (job.result && shown.get(kind) !== job.job) {
    shown.set(kind, job.job);
    if (kind === 'export' || job.state === 'done') $('.logged', section).open = false;
    put($('.result', section), ...[RENDER[kind](job.result)].flat());
    if (kind === 'export') showExports();
  }
}

const poll = every(1000, async () => {
  let all;
  try { all = (await get('/api/jobs', { run })).jobs; } catch (error) {
    if (!error.gone) complain($('#alert'), error);
    throw error;
  }
  for (const kind of sections.keys()) {
    const job = all.filter((one) => one.kind === kind).reduce((newest, one) => ((newest?.started ?? -1) < (one.started ?? 0) ? one : newest), null);
    const before = jobs.get(kind);
    // The log of one that runs grows, and the result of one that ended is read once.
    if (!job || (before?.job === job.job && before.state === job.state && job.state !== 'running')) continue;
    jobs.set(kind, await get('/api/job', { job: job.job }));
    show(kind);
  }
});

for (const [kind, section] of sections) {
  const [form, wrong] = [$('form', section), $('.alert', section)];
  form.addEventListener('submit', (event) => {
    event.preventDefault();
    acting($('[type=submit]', form), wrong, async () => {
      const options = Object.fromEntries([...new FormData(form)].filter(([name, text]) => text.trim() && !form.elements[name].closest('[hidden]')));
      const { job } = await post('/api/job', { kind, run, options });
      jobs.set(kind, await get('/api/job', { job }));
      show(kind);
      poll();
    });
  });
  $('.stop', section).addEventListener('click', (event) => acting(event.currentTarget, wrong, async () => {
    await post('/api/stop_job', { job: jobs.get(kind).job });
    poll();
  }));
}
const format = $('#export-format');
const quantized = () => { $('#quantized').hidden = format.value !== 'gguf'; $('#quantized').title = format.selectedOptions[0]?.title ?? ''; };
format.addEventListener('change', quantized);
quantized();

// --- evaluation ---------------------------------------------------------------------------------

const SVG = 'http://www.w3.org/2000/svg';
function svg(tag, given, ...children) {
  const element = document.createElementNS(SVG, tag);
  Object.entries(given).forEach(([name, value]) => element.setAttribute(name, value));
  element.append(...children);
  return element;
}
/** The interval of a difference around nothing (the dashed line). */
function intervalBar({ difference, interval, reading }) {
  if (!interval || interval.includes(null)) return '-';
  const most = Math.max(...interval.map(Math.abs), Math.abs(difference), 1e-12) * 1.08;
  const at = (value) => 72 + (70 * value) / most;
  const line = (x1, x2, y1, y2, kind) => svg('line', { x1, x2, y1, y2, class: kind });
  return svg('svg', { class: `interval ${['better', 'worse'].includes(reading) ? reading : ''}`, viewBox: '0 0 144 20', role: 'img', 'aria-label': `from ${number(interval[0])} to ${number(interval[1])}` },
    line(2, 142, 10, 10, ''), line(72, 72, 1, 19, 'zero'), line(at(interval[0]), at(interval[1]), 10, 10, 'span'), svg('circle', { cx: at(difference), cy: 10, r: 4 }));
}
const signed = (value) => (value === null ? '-' : (value > 0 ? '+' : '') + number(value));
const reading = (words) => el('span', { class: words.split(' ')[0] }, words);

function evaluation(found) {
  const measures = { ...found.measures };
  const general = found.general_text;
  if (general) measures['general text, loss'] = general;
  const rows = Object.entries(measures).map(([name, one]) => [name.replaceAll('_', ' '), number(one.base), number(one.tuned), signed(one.difference),
    one.interval ? `${signed(one.interval[0])} to ${signed(one.interval[1])}` : '-', intervalBar(one), reading(one.reading), count(one.rows)]);
  const right = found.right_answers;
  const tally = ({ right: good, wrong, undecided }) => `${count(good)} right, ${count(wrong)} wrong${undecided ? `, ${count(undecided)} undecided` : ''}`;
  return [
    el('p', {}, own(found.adapter), ' beside ', own(found.base_model), found.data ? ', on ' : '', own(found.data ?? ''), '.'),
    right && el('dl', {}, [['Base', tally(right.base)], ['Tuned', tally(right.tuned)], ['Right is', right.means]].flatMap(([name, words]) => [el('dt', {}, name), el('dd', {}, words)])),
    scrolling('Measures of base and tuned model', table(['measure', '>base', '>tuned', '>difference', '>95 % interval', 'around nothing', 'reading', '>rows'], rows, { caption: 'Measures of base and tuned model, with 95 % intervals of the difference' })),
    general && el('p', {}, `General text (${general.text}, ${plural(general.tokens, 'token')}): ${general.verdict}. `, el('span.pale', {}, general.thresholds)),
    ...(found.notes ?? []).map((note) => el('p.note', {}, note)),
    found.answers?.length > 0 && el('details', {}, el('summary', {}, `All ${plural(found.answers.length, 'answer')}`),
      scrolling('Answers of base and tuned model', answersTable(found.answers))),
  ].filter(Boolean);
}
function answersTable(answers) {
  const judged = (answer, right) => el('div', {}, right === null ? null : el('span', { class: right ? 'better' : 'worse' }, right ? 'right: ' : 'wrong: '), own(answer.text), answer.stopped ? null : el('small', {}, ' (cut)'));
  return table(['question', 'expected', 'base', 'tuned'], answers.map((one) => [own(one.question), own(one.expected), judged(one.base, one.right.base), judged(one.tuned, one.right.tuned)]), { kind: 'table.answers' });
}

// --- comparison -----------------------------------------------------------------------------------

function comparison(found) {
  const names = found.columns.map(({ name }) => name);
  const cell = (one) => el('div', {}, one.right === null ? null : el('span', { class: one.right ? 'better' : 'worse' }, one.right ? 'right: ' : 'wrong: '),
    own(one.answer), one.stopped ? null : el('small', {}, ' (cut)'), one.differs ? el('small', {}, '\nnot the base\u2019s answer') : null);
  const rows = found.questions.map((one) => [el('div', {}, own(one.turns.at(-1)?.content ?? one.turns.at(-1)?.text ?? ''), one.expected === null ? null : el('small', {}, '\nexpected: ', own(one.expected))), ...one.answers.map(cell)]);
  const summary = found.summary.map((one) => [own(one.name), count(one.questions), count(one.right), count(one.wrong), count(one.undecided), number(one.mean_tokens, 3), count(one.differs.length)]);
  return [
    el('p', {}, own(found.model_name), ', questions from ', own(found.questions_from), '.'),
    scrolling('Summary of the answers', table(['model', '>questions', '>right', '>wrong', '>undecided', '>tokens', '>not the base\u2019s'], summary)),
    scrolling('Answers side by side', table(['question', ...names], rows, { kind: 'table.answers', caption: 'Answers side by side' })),
    ...(found.notes ?? []).map((note) => el('p.note', {}, note)),
  ];
}

// --- layers: modules beside each other, a row for each layer ---------------------------------------

function heat(found) {
  if (!found.modules) return el('p.note', {}, 'The guide alone came, without a measurement: the run names no data.');
  const cells = found.modules.map((one) => ({ ...one, layer: Number(/\.layers\.(\d+)\./.exec(one.module)?.[1] ?? NaN), name: one.module.split('.').at(-1) }));
  const inside = cells.filter(({ layer }) => !Number.isNaN(layer));
  const names = [...new Set(inside.map(({ name }) => name))];
  const layers = [...new Set(inside.map(({ layer }) => layer))].sort((a, b) => a - b);
  const proposed = new Set(found.proposal.modules);
  const place = el('div');
  const draw = (of) => {
    const most = Math.max(...inside.map((one) => one[of] ?? 0)) || 1;
    const grid = table(['layer', ...names.map((name) => `>${name}`)], layers.map((layer) => [String(layer), ...names.map((name) => inside.find((one) => one.layer === layer && one.name === name)?.[of])]
      .map((value, index) => (index ? number(value, 3) : value))), { kind: 'table.heat', caption: 'Gradient by layer and module; the darker, the stronger' });
    $$('tbody tr', grid).forEach((tr, row) => $$('td', tr).forEach((td, column) => {
      const one = inside.find(({ layer, name }) => layer === layers[row] && name === names[column]);
      if (!one) return;
      td.style.background = `color-mix(in srgb, var(--c0) ${Math.round((42 * (one[of] ?? 0)) / most)}%, var(--card))`;
      td.title = `${one.module}: norm ${number(one.norm)}, spread ${number(one.spread)}, relative ${number(one.relative)}`;
      if (proposed.has(one.module)) { td.className = 'r proposed'; td.append(el('span.hidden', {}, ' proposed')); }
    }));
    put(place, scrolling('Heat map of the layers', grid));
  };
  const choice = el('select', { onchange: (event) => draw(event.target.value) }, el('option', { value: 'norm' }, 'the gradient\u2019s norm'), el('option', { value: 'relative' }, 'relative to the weight\u2019s norm'));
  draw('norm');
  const { proposal } = found;
  const button = el('button.small', { type: 'button', onclick: () => copy(button, proposal.command) }, 'Copy');
  return [
    el('p', {}, `${plural(found.rows, 'row')} of ${count(found.of_rows)}, ${plural(found.batches, 'batch').replace('batchs', 'batches')}, loss ${fixed(found.loss)}, on ${found.device} in ${found.precision}.`),
    el('div.tools', {}, el('label.inline', {}, 'Show', choice), el('span.pale', {}, 'Framed: proposed.')), place,
    el('p', {}, `Proposed: ${proposal.target_modules.join(' ')}${proposal.layers ? ` in layers ${proposal.layers}` : ' in all layers'} holds ${Math.round(100 * proposal.held)} % of the squared gradient with ${Math.round(100 * proposal.cost)} % of the parameters; ${bytes(proposal.price.file_bytes)} as a file.`),
    el('div.command', {}, el('pre', { tabindex: '0', role: 'region', 'aria-label': 'Command of the proposal' }, proposal.command), button),
    el('p.pale', {}, found.caveat),
  ];
}

// --- exports ----------------------------------------------------------------------------------------

const PROVEN = [['prompts', 'prompts', count], ['tokens', 'tokens compared', count], ['tokens_differing', 'tokens that differ', count], ['ties_excused', 'ties excused', count],
  ['largest_logit_difference', 'largest logit difference', number], ['tolerance', 'tolerance', number], ['typical_logit_difference', 'typical logit difference', number],
  ['perplexity_rise', 'rise of the perplexity', (value) => `${(100 * value).toFixed(2)} %`], ['perplexity_tolerance', 'tolerance of that', (value) => `${(100 * value).toFixed(0)} %`]];

function exported(found) {
  return [proofOf({ path: found.output, proof: { ...found, passed: true }, sentence: found.sentence }), found.next?.length > 0 && el('div', {}, el('h3', {}, 'Next'), el('pre', { tabindex: '0', role: 'region', 'aria-label': 'What to do next' }, found.next.join('\n')))].filter(Boolean);
}
/** What was proven, in a sentence; a proof that lies beside a run has only its figures. */
function sentenceOf({ prompts, tokens, tokens_differing: differing, ties_excused: ties }) {
  return `${count(tokens - differing - ties)} of ${count(tokens)} greedy tokens equal on ${plural(prompts, 'prompt')}${ties ? `, ${plural(ties, 'tie')} excused` : ''}`;
}
function proofOf({ path, proof, format: kind = proof.format, compared = proof.compared, sentence = sentenceOf(proof) }) {
  const figures = PROVEN.filter(([name]) => (proof[name] ?? null) !== null).map(([name, words, form]) => el('div', {}, el('dt', {}, words), el('dd', {}, form(proof[name]))));
  const files = Object.entries(proof.files ?? {});
  const passed = proof.passed;
  return el('article', {}, el('h3', {}, kind, ' ', el('code', { dir: 'auto' }, path)),
    el('p', {}, passed === undefined ? null : el('strong', { class: passed ? 'better' : 'worse' }, passed ? 'Proven. ' : 'Not proven. '), own(sentence)),
    compared && el('p.pale', {}, 'Compared: ', own(compared)), figures.length > 0 && el('dl.facts', {}, figures),
    files.length > 0 && el('details', {}, el('summary', {}, plural(files.length, 'file')), scrolling('Files of the export', table(['file', '>size', ...(proof.sha256 ? ['SHA-256'] : [])], files.map(([name, size]) => [own(name), bytes(size), ...(proof.sha256 ? [el('code', {}, proof.sha256[name] ?? '-')] : [])])))));
}
async function showExports() {
  try {
    const { exports } = await get('/api/exports', { run });
    put($('#exports'), ...(exports.length ? exports.map(proofOf) : [el('p.pale', {}, 'Nothing is exported yet.')]));
  } catch (error) { put($('#exports'), el('p.alert', { role: 'alert' }, error.message)); }
}
showExports();
