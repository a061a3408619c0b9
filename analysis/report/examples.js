/* The examples of one run beside those of another: what was lost, and what was written instead. */

const EXAMPLES_A_PAGE = 10;
const ORDERS = { losses: 'largest losses first', gains: 'largest gains first', data: 'in the order of the data' };

/** Rows of both runs, paired by example; ``delta`` is positive where the run is better. */
function pairs(chunk, run, baseline, fewer) {
  const mine = chunk.runs[run.id];
  const other = baseline ? chunk.runs[baseline.id] : null;
  const rows = [];
  chunk.examples.forEach(([set, id, tokens], index) => {
    const score = mine[0][index];
    const text = mine[1][index];
    if (score === null && text < 0) return;
    const compared = other ? other[0][index] : null;
    const known = score !== null && compared !== null;
    rows.push({
      set, id, tokens, score, compared,
      delta: known ? (fewer ? compared - score : score - compared) : null,
      text: text < 0 ? null : chunk.texts[text],
      comparedText: other && other[1][index] >= 0 ? chunk.texts[other[1][index]] : null,
      written: mine[2][index],
      comparedWritten: other ? other[2][index] : null,
    });
  });
  return rows;
}

/** Mean over the data sets of the mean difference in each, and how many examples are better, equal, worse. */
function comparison(rows) {
  const sets = new Map();
  const found = { better: 0, equal: 0, worse: 0 };
  for (const row of rows.filter((one) => one.delta !== null)) {
    if (!sets.has(row.set)) sets.set(row.set, []);
    sets.get(row.set).push(row.delta);
    found[row.delta > 0 ? 'better' : row.delta < 0 ? 'worse' : 'equal'] += 1;
  }
  return { ...found, difference: sets.size ? mean([...sets.values()].map(mean)) : null };
}

function exampleCard(row, run, baseline, about) {
  const digits = about.fewer ? 4 : 1;
  const mark = row.delta === null || row.delta === 0 ? '' : row.delta < 0 ? 'worse' : 'better';
  const side = (label, score, text, written) =>
    el(
      'div',
      {},
      el('strong', {}, label),
      el('span', { class: 'muted' }, ` ${fixed(score, digits)}${written === null ? '' : `, ${written} tokens`}`),
      el('pre', {}, text === null ? '(no text in this page)' : text === '' ? '(empty)' : text),
    );
  return el(
    'div',
    { class: 'example' },
    el(
      'div',
      {},
      el('strong', {}, row.set),
      el('span', {}, row.id),
      row.tokens === null ? null : el('span', { class: 'muted' }, `prompt of ${row.tokens.toLocaleString('en')} tokens`),
      row.delta === null ? null : el('span', { class: mark }, `${signed(about.fewer ? -row.delta : row.delta, digits)}`),
    ),
    el(
      'div',
      { class: 'pair' },
      side(run.label, row.score, row.text, row.written),
      baseline ? side(baseline.label, row.compared, row.comparedText, row.comparedWritten) : null,
    ),
  );
}

/** Examples with their order, a choice of data set, a search, and pages. */
function exampleList(chunk, run, baseline) {
  const about = group(run);
  const all = pairs(chunk, run, baseline, about.fewer);
  const state = { order: baseline ? 'losses' : 'data', set: '', words: '', changed: false, page: 0 };
  const list = el('div', { id: 'examples' });
  const pages = el('div', { class: 'pages' });
  const rank = (row) => (row.delta === null ? 0 : row.delta);

  function fill() {
    const words = state.words.toLowerCase();
    let rows = all.filter(
      (row) =>
        (!state.set || row.set === state.set) &&
        (!state.changed || row.delta) &&
        (!words || `${row.id}\n${row.text ?? ''}\n${row.comparedText ?? ''}`.toLowerCase().includes(words)),
    );
    if (state.order === 'losses') rows = [...rows].sort((a, b) => rank(a) - rank(b));
    if (state.order === 'gains') rows = [...rows].sort((a, b) => rank(b) - rank(a));
    const last = Math.max(0, Math.ceil(rows.length / EXAMPLES_A_PAGE) - 1);
    state.page = Math.min(state.page, last);
    const start = state.page * EXAMPLES_A_PAGE;
    list.replaceChildren(...rows.slice(start, start + EXAMPLES_A_PAGE).map((row) => exampleCard(row, run, baseline, about)));
    const turn = (by) => {
      state.page += by;
      fill();
    };
    pages.replaceChildren(
      el('button', { disabled: state.page === 0, click: () => turn(-1) }, 'previous'),
      el('button', { disabled: state.page === last, click: () => turn(1) }, 'next'),
      el('span', { class: 'muted' }, rows.length ? `${start + 1} to ${Math.min(start + EXAMPLES_A_PAGE, rows.length)} of ${rows.length} examples` : 'no example'),
    );
  }
  const set = (name, value) => {
    state[name] = value;
    state.page = 0;
    fill();
  };
  const sets = [...new Set(all.map((row) => row.set))];
  const found = comparison(all);
  const controls = el(
    'div',
    { class: 'bar' },
    el('label', { for: 'example-order' }, 'examples'),
    el('select', { id: 'example-order', change: (event) => set('order', event.target.value) }, ...Object.entries(ORDERS).map(([key, text]) => el('option', { value: key, selected: key === state.order }, text))),
    el('select', { 'aria-label': 'data set', change: (event) => set('set', event.target.value) }, el('option', { value: '' }, 'all data sets'), ...sets.map((name) => el('option', { value: name }, name))),
    el('input', { type: 'search', placeholder: 'search the texts', 'aria-label': 'search the texts', input: (event) => set('words', event.target.value) }),
    el('label', {}, el('input', { type: 'checkbox', change: (event) => set('changed', event.target.checked) }), ' only other scores'),
    el('button', { id: 'examples-csv', click: () => saveExamples(all, run, baseline) }, `CSV of the ${all.length} examples`),
  );
  fill();
  const summary = baseline
    ? `Of ${all.length} examples ${found.worse} have a worse score than with ${baseline.label}, ${found.better} a better one, ${found.equal} the same. ` +
      `Mean difference over the data sets: ${signed(about.fewer && found.difference !== null ? -found.difference : found.difference, about.fewer ? 4 : 2)}.`
    : `${all.length} examples.`;
  return el('div', {}, el('p', {}, summary), controls, list, pages);
}

function saveExamples(rows, run, baseline) {
  const name = baseline ? baseline.label : '';
  const head = ['data set', 'id', 'prompt tokens', `score: ${run.label}`, `score: ${name}`, `tokens: ${run.label}`, `tokens: ${name}`, `prediction: ${run.label}`, `prediction: ${name}`];
  const body = rows.map((row) => [row.set, row.id, row.tokens, row.score, row.compared, row.written, row.comparedWritten, row.text, row.comparedText]);
  save(`examples-${run.id}.csv`, 'text/csv', csv([head, ...body]));
}
