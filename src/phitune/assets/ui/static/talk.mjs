// One question to the base and to adapters, each in a column of its own with its own conversation.
// All columns ask at once; the server answers them in one batch. A reload keeps what was said.

import { $, $$, acting, complain, el, every, get, post, Problem, put, send, write } from './api.mjs';

const KEPT = 'phitune.talk';
let models = [];
let talks = {}; // by model: [{role, content}]
let columns = new Map(); // by model: its log
let answering = null; // the AbortController of the answers that are coming

const keep = () => sessionStorage.setItem(KEPT, JSON.stringify({ models, talks }));

// --- loading ------------------------------------------------------------------------------------

let state = '';
let news = false; // whether the state was seen at least once

function show(found) {
  const words = { none: 'nothing is loaded', starting: 'loading', ready: 'ready', failed: 'failed' };
  $('#state').dataset.state = found.state;
  write($('#state'), words[found.state] ?? found.state);
  write($('#said'), found.state === 'none' ? '' : found.said ?? '');
  write($('#log'), found.log ?? '');
  $('#logged').hidden = !found.log;
  if (found.state === 'failed') $('#logged').open = true;
  $('#unload').hidden = !['starting', 'ready'].includes(found.state);
  write($('#start'), found.state === 'ready' ? 'Load these instead' : 'Load');
  $('#start').disabled = found.state === 'starting';
  $('#talking').hidden = found.state !== 'ready';
  if (found.state === 'ready' && (state !== 'ready' || String(models) !== String(found.models))) seat(found.models);
  if (found.state === 'ready' && state !== 'ready') {
    $('#setup').open = false;
    if (news) $('#prompt').focus();
  }
  if (found.state !== 'ready' && state === 'ready') $('#setup').open = true;
  state = found.state;
  news = true;
}

const poll = every(1000, async () => {
  try { show(await get('/api/talk')); } catch (error) {
    if (!error.gone) complain($('#alert'), error);
    throw error;
  }
});

$('#load').addEventListener('submit', (event) => {
  event.preventDefault();
  acting($('#start'), $('#alert'), async () => {
    const runs = $$('[name=run]:checked').map((box) => box.value);
    if (!runs.length && !$('#model').value) throw new Problem('Choose at least one adapter, or name a base model.');
    halt();
    await post('/api/talk/start', { model: $('#model').value || null, runs, ...($('#quantization').value && { quantization: $('#quantization').value }) });
    show(await get('/api/talk'));
    poll();
  });
});
$('#unload').addEventListener('click', (event) => acting(event.currentTarget, $('#alert'), async () => {
  halt();
  await post('/api/talk/stop');
  show(await get('/api/talk'));
}));

// --- columns ------------------------------------------------------------------------------------

function seat(found) {
  const kept = JSON.parse(sessionStorage.getItem(KEPT) ?? 'null');
  models = found;
  const whole = (turn) => (turn.role === 'user' || turn.ended ? turn : { ...turn, ended: true, note: 'Cut off: the page was loaded anew.' });
  talks = Object.fromEntries(models.map((model) => [model, (kept?.talks?.[model] ?? []).map(whole)]));
  columns = new Map(models.map((model) => [model, el('div.talk-log', { role: 'log', tabindex: '0', 'aria-label': `Conversation with ${model}` })]));
  put($('#columns'), ...models.map((model, index) => el('section.column', { 'aria-label': model },
    el('h2', { dir: 'auto' }, model, index ? null : el('small', {}, ' (base)')), columns.get(model))));
  models.forEach((model) => draw(model));
  keep();
}

function draw(model) {
  const said = talks[model];
  put(columns.get(model), ...said.flatMap((turn, index) => {
    const bubble = el(`p.said.${turn.role}`, { dir: 'auto' }, turn.content || (turn.error ? '' : '\u2026'));
    const parts = [bubble];
    if (turn.error) parts.push(el('p.said.error', { role: 'alert', dir: 'auto' }, turn.error));
    if (turn.role === 'assistant' && turn.ended) parts.push(under(turn, said[index - 1]));
    return parts;
  }));
  toEnd(model);
}
function under(turn, asked) {
  return el('div.row', {},
    el('button.small.plain', { type: 'button', onclick: () => openRow(asked?.content ?? '', turn) }, 'Save as a row to train on\u2026'),
    el('small', { role: 'status' }, turn.note ?? ''));
}
function toEnd(model) { const log = columns.get(model); log.scrollTop = log.scrollHeight; }

// --- asking -------------------------------------------------------------------------------------

/** The texts of a stream of server-sent events, each as soon as it is whole. */
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = '';
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split(/\r?\n\r?\n/);
    rest = parts.pop();
    for (const part of parts) {
      const text = part.split(/\r?\n/).filter((line) => line.startsWith('data:')).map((line) => line.slice(5).trim()).join('\n');
      if (text) yield text;
    }
  }
}

/** What the model is told of the conversation: questions with their answers, and the last one. */
function messagesOf(said) {
  const answered = (index) => said[index] && !said[index].error && said[index].content;
  return said.filter((turn, index) => (turn.role === 'assistant' ? answered(index) : index === said.length - 1 || answered(index + 1)))
    .map(({ role, content }) => ({ role, content }));
}

async function answer(model, signal) {
  const said = talks[model];
  const turn = { role: 'assistant', content: '' };
  const messages = messagesOf(said);
  said.push(turn);
  draw(model);
  const log = columns.get(model);
  log.setAttribute('aria-busy', 'true'); // Read aloud once it is whole.
  try {
    const response = await send('/api/talk/chat', { model, messages, temperature: Number($('#temperature').value), seed: Number($('#seed').value), max_tokens: Number($('#max_tokens').value), stream: true }, { signal });
    for await (const text of events(response)) {
      if (text === '[DONE]') break;
      const chunk = JSON.parse(text);
      if (chunk.error) throw new Problem(chunk.error.message ?? String(chunk.error));
      turn.content += chunk.choices?.[0]?.delta?.content ?? '';
      if (chunk.choices?.[0]?.finish_reason === 'length') turn.note = 'Cut at the longest answer.';
      write($$('.said', log).at(-1), turn.content || '\u2026');
      toEnd(model);
    }
  } catch (error) {
    if (error.name === 'AbortError') turn.note = 'Stopped.';
    else turn.error = error instanceof Problem ? error.message : 'The answer broke off: the server of answers ended in the middle of it. Its log says why.';
  }
  turn.ended = true;
  log.removeAttribute('aria-busy');
  draw(model);
}

async function ask() {
  const text = $('#prompt').value.trim();
  if (!text || answering) return;
  complain($('#ask-alert'), null);
  answering = new AbortController();
  $('#halt').disabled = false;
  $('#ask').disabled = true;
  $('#prompt').value = '';
  models.forEach((model) => talks[model].push({ role: 'user', content: text }));
  keep();
  await Promise.all(models.map((model) => answer(model, answering.signal)));
  answering = null;
  $('#halt').disabled = true;
  $('#ask').disabled = false;
  keep();
}
function halt() { answering?.abort(); }

$('#composer').addEventListener('submit', (event) => { event.preventDefault(); ask(); });
$('#prompt').addEventListener('keydown', (event) => {
  if (event.key !== 'Enter' || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  ask();
});
$('#halt').addEventListener('click', halt);
$('#clear').addEventListener('click', () => {
  halt();
  models.forEach((model) => { talks[model] = []; draw(model); });
  keep();
  $('#prompt').focus();
});

// --- a row to train on ----------------------------------------------------------------------------

const dialog = $('#keeping');
let saved = null;
function openRow(prompt, turn) {
  saved = turn;
  $('#row-prompt').value = prompt;
  $('#row-response').value = turn.content;
  complain($('#keep-alert'), null);
  dialog.showModal();
  $('#row-response').focus();
}
$('#leave').addEventListener('click', () => dialog.close());
$('form', dialog).addEventListener('submit', (event) => {
  event.preventDefault();
  acting($('#save'), $('#keep-alert'), async () => {
    const { path } = await post('/api/talk/keep', { prompt: $('#row-prompt').value, response: $('#row-response').value });
    saved.note = `Saved in ${path}`;
    models.filter((model) => talks[model].includes(saved)).forEach(draw);
    keep();
    dialog.close();
  });
});
