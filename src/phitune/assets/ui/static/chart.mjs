// Curves by uPlot: smoothing, log scale, a band from the least to the greatest, incidents marked,
// one cursor for several charts, and the same values for who reads or listens instead of looking.

import { el, moment, number, put } from './api.mjs';

const uPlot = globalThis.uPlot;
const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const dark = matchMedia('(prefers-color-scheme: dark)');

/** A running mean that forgets: weight 0 changes nothing. Nulls stay. */
export function smooth(values, weight) {
  if (!weight) return values;
  let sum = 0;
  let total = 0;
  return values.map((value) => {
    if (value === null) return null;
    sum = sum * weight + value * (1 - weight);
    total = total * weight + (1 - weight);
    return sum / total;
  });
}

/** Columns of the server as points of one curve by step, tokens or time; without what is not known. */
export function curve(columns, name, axis) {
  const [values, places] = [columns[name] ?? [], columns[axis] ?? []];
  const kept = values.map((_, index) => index).filter((index) => values[index] !== null && (places[index] ?? null) !== null);
  const low = columns[`${name}_min`];
  const high = columns[`${name}_max`];
  const take = (from) => from && kept.map((index) => from[index] ?? values[index]);
  return { x: take(places), y: take(values), low: take(low), high: take(high) };
}

/** The place on an axis at which a step stands. */
export function placeOf(columns, step, axis) {
  const index = (columns.step ?? []).findIndex((one) => one >= step);
  return index < 0 ? null : (columns[axis]?.[index] ?? null);
}

/** Adds what is new behind what is there; a name that only one side has is filled with nulls. */
export function append(columns, more) {
  const before = columns.step?.length ?? 0;
  const added = more.step?.length ?? 0;
  if (!added) return;
  for (const name of new Set([...Object.keys(columns), ...Object.keys(more)])) {
    columns[name] ??= Array(before).fill(null);
    columns[name].push(...(more[name] ?? Array(added).fill(null)));
  }
}

export class Chart {
  /**
   * host: an empty element. what: the name of the figure. lines of draw(): {label, color, dash,
   * points: {x, y, low, high}}; marks: [{x, label}].
   */
  constructor(host, what, { height = 260, group = null } = {}) {
    Object.assign(this, { what, height, group, key: '', plot: null, zoomed: false, lines: [] });
    this.place = el('div.plot', { tabindex: '0', role: 'img' });
    this.readout = el('p.readout', {}, '\u00a0');
    put(host, this.readout, this.place);
    new ResizeObserver(() => this.plot?.setSize({ width: this.width(), height })).observe(this.place);
    dark.addEventListener('change', () => { this.key = ''; this.again?.(); });
    this.place.addEventListener('keydown', (event) => this.walk(event));
    this.place.addEventListener('dblclick', () => { this.zoomed = false; });
  }

  width() { return Math.max(200, this.place.clientWidth); }

  draw(lines, { axis = 'step', log = false, smoothing = 0, marks = [] } = {}) {
    this.again = () => this.draw(lines, { axis, log, smoothing, marks });
    this.marks = marks;
    this.lines = lines.filter((line) => line.points.x?.length);
    const tables = [];
    const series = [{}];
    const bands = [];
    const positive = (values) => (log ? values.map((value) => (value > 0 ? value : null)) : values);
    const paint = (line, alpha) => colour(line.color) + alpha;
    for (const { points, ...line } of this.lines) {
      const columns = [points.x];
      if (points.low && !smoothing) {
        columns.push(positive(points.high), positive(points.low));
        bands.push({ series: [series.length, series.length + 1], fill: paint(line, '2e') });
        series.push({ points: { show: false } }, { points: { show: false } });
      }
      if (smoothing) {
        columns.push(positive(points.y));
        series.push({ stroke: paint(line, '45'), width: 1, spanGaps: true, points: { show: false } });
      }
      columns.push(positive(smooth(points.y, smoothing)));
      series.push({
        label: line.label, stroke: colour(line.color), width: 1.75, dash: line.dash, spanGaps: true,
        points: { show: points.x.length < 40, size: 5, fill: colour(line.color) },
      });
      tables.push(columns);
    }
    this.shown = series.map((one, index) => (one.label ? index : 0)).filter(Boolean);
    this.axis = axis;
    this.describe();
    if (!tables.length) {
      this.plot?.destroy();
      Object.assign(this, { plot: null, key: '' });
      put(this.place, el('p.empty', {}, 'Nothing is recorded yet.'));
      return;
    }
    const data = tables.length > 1 ? uPlot.join(tables) : tables[0];
    const key = JSON.stringify([axis, log, smoothing > 0, dark.matches, series, this.lines.map((line) => line.points.x.length < 40)]);
    if (key === this.key) {
      this.plot.setData(data, !this.zoomed);
      if (this.zoomed) this.plot.redraw();
      return;
    }
    Object.assign(this, { key, zoomed: false });
    this.plot?.destroy();
    put(this.place);
    this.plot = new uPlot(this.options(series, bands, log), data, this.place);
  }

  options(series, bands, log) {
    const grid = { stroke: colour('--line'), width: 1 };
    const common = { stroke: colour('--pale'), grid, ticks: grid, font: '12px system-ui, sans-serif' };
    const short = (value) => (Math.abs(value) >= 1e9 ? `${value / 1e9}B` : Math.abs(value) >= 1e6 ? `${value / 1e6}M` : Math.abs(value) >= 1e4 ? `${value / 1e3}k` : number(value, 3));
    const words = (plot, values) => values.map((value) => (value === null ? '' : short(value)));
    const clock = (plot, values, axis, space, step) => values.map((value) => (step < 86400 ? moment(value * 1000).slice(11) : moment(value * 1000).slice(5, 10)));
    return {
      width: this.width(), height: this.height, series, bands,
      legend: { show: false },
      cursor: { sync: this.group ? { key: this.group, setSeries: false } : undefined, y: false, points: { size: 7 } },
      scales: { x: { time: this.axis === 'time' }, y: { distr: log ? 3 : 1 } },
      axes: [
        this.axis === 'time' ? { ...common, space: 70, size: 32, values: clock } : { ...common, space: 60, size: 32, values: words },
        { ...common, size: 58, space: 34, values: words },
      ],
      hooks: {
        setCursor: [(plot) => this.tell(plot)],
        setSelect: [(plot) => { if (plot.select.width > 0) this.zoomed = true; }],
        draw: [(plot) => this.mark(plot)],
      },
    };
  }

  mark(plot) {
    const { ctx, bbox } = plot;
    const size = devicePixelRatio;
    ctx.save();
    ctx.strokeStyle = ctx.fillStyle = colour('--error');
    ctx.font = `600 ${11 * size}px system-ui, sans-serif`;
    Object.assign(ctx, { textAlign: 'left', textBaseline: 'top' });
    ctx.setLineDash([4 * size, 3 * size]);
    for (const { x, label } of this.marks) {
      const at = plot.valToPos(x, 'x', true);
      if (x === null || at < bbox.left || at > bbox.left + bbox.width) continue;
      ctx.beginPath();
      ctx.moveTo(at, bbox.top);
      ctx.lineTo(at, bbox.top + bbox.height);
      ctx.stroke();
      ctx.fillText(label, at + 4 * size, bbox.top + 2 * size);
    }
    ctx.restore();
  }

  where(value) {
    return this.axis === 'time' ? moment(value * 1000) : `${this.axis} ${Math.round(value).toLocaleString('en')}`;
  }

  tell(plot) {
    const index = plot.cursor.idx;
    if (index === null || index === undefined) { this.readout.textContent = this.summary || '\u00a0'; return; }
    const parts = this.shown.map((one) => {
      // Of curves with other steps the value before is told.
      let at = index;
      while (at > 0 && (plot.data[one][at] ?? null) === null) at -= 1;
      const value = plot.data[one][at] ?? null;
      return value === null ? null : `${plot.series[one].label} ${number(value)}`;
    });
    this.readout.textContent = [this.where(plot.data[0][index]), ...parts.filter(Boolean)].join('  ·  ');
  }

  /** What the curves show, in a sentence, for who does not see them. */
  describe() {
    const parts = this.lines.slice(0, 4).map(({ label, points: { x, y } }) => {
      const least = y.reduce((best, value, index) => (value < y[best] ? index : best), 0);
      return `${label} from ${number(y[0])} to ${number(y[y.length - 1])}, lowest ${number(y[least])} at ${this.where(x[least])}`;
    });
    const named = this.lines[0]?.label === this.what.toLowerCase(); // Its heading says it already.
    this.summary = named ? parts[0].slice(this.what.length + 1) : parts.join('; ');
    this.place.setAttribute('aria-label', `${this.what}: ${parts.join('; ') || 'nothing is recorded yet'}. Arrow keys read values.`);
    if (!this.plot || (this.plot.cursor.idx ?? null) === null) this.readout.textContent = this.summary || '\u00a0';
  }

  /** Arrow keys move the cursor; what it is at is read aloud. */
  walk(event) {
    const move = { ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity }[event.key];
    if (!move || !this.plot) return;
    event.preventDefault();
    this.readout.setAttribute('aria-live', 'polite');
    const last = this.plot.data[0].length - 1;
    const index = Math.min(last, Math.max(0, (this.plot.cursor.idx ?? (move > 0 ? -1 : last + 1)) + move));
    this.plot.setCursor({ left: this.plot.valToPos(this.plot.data[0][index], 'x'), top: 10 }, true, true);
  }
}

/** The controls of charts: {axis, log, smoothing}; `changed` is called with each change. */
export function controls(place, changed, { metric = false } = {}) {
  const kept = JSON.parse(sessionStorage.getItem('phitune.chart') ?? '{}');
  const view = { axis: 'step', log: false, smoothing: 0, metric: 'train', ...kept };
  const keep = () => { sessionStorage.setItem('phitune.chart', JSON.stringify(view)); changed(view); };
  const select = (name, label, choices) => el('label.inline', {}, label, el('select', { onchange: (event) => { view[name] = event.target.value; keep(); } },
    choices.map(([value, words]) => el('option', { value, selected: view[name] === value }, words))));
  put(place,
    metric && select('metric', 'Loss of', [['train', 'training'], ['validation', 'validation']]),
    select('axis', 'Over', [['step', 'steps'], ['tokens', 'tokens'], ['time', 'time']]),
    el('label.inline', {}, 'Smoothing', el('input', { type: 'range', min: '0', max: '0.99', step: '0.01', value: String(view.smoothing),
      oninput: (event) => { view.smoothing = Number(event.target.value); keep(); } })),
    el('label.inline', {}, el('input', { type: 'checkbox', checked: view.log, onchange: (event) => { view.log = event.target.checked; keep(); } }), 'Log scale'),
    el('small', {}, 'Drag to zoom, double-click to see all.'));
  return view;
}

/** Names and colours of curves. */
export function legend(place, lines) {
  put(place, lines.map((line) => {
    const swatch = el('span.swatch');
    swatch.style.color = `var(${line.color})`;
    return el('li', {}, swatch, el('span', { dir: 'auto' }, line.label));
  }));
}
export const colours = Array.from({ length: 12 }, (_, index) => `--c${index}`);
