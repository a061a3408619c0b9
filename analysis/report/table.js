/* Sortable tables, a page at a time. */

const PAGE_ROWS = 50;

/**
 * A table whose columns sort by a click on their head.
 * @param {Array<{name: string, value: Function, show?: Function, text?: boolean, title?: string, mark?: Function}>} columns
 *     value: what sorts; show: what is displayed (a string or a node); text: words rather than numbers; mark: a class
 * @param {Array} rows
 * @param {{selected?: Function, name?: string}} options
 */
function sortable(columns, rows, options = {}) {
  const state = { by: -1, down: false, page: 0 };
  let ordered = rows;
  const body = el('tbody');
  const pages = el('div', { class: 'pages' });
  const heads = columns.map((column, index) =>
    el(
      'th',
      { class: column.text ? 'text' : null, title: column.title, scope: 'col' },
      el('button', { type: 'button', click: () => sort(index) }, column.name),
    ),
  );

  function sort(index) {
    if (state.by === index) state.down = !state.down;
    else [state.by, state.down] = [index, !columns[index].text];
    const { value, text } = columns[index];
    const missing = (found) => found === null || found === undefined || Number.isNaN(found);
    const keyed = rows.map((row) => [value(row), row]);
    keyed.sort(([a], [b]) => {
      if (missing(a) || missing(b)) return missing(a) - missing(b);
      const order = text ? String(a).localeCompare(String(b), 'en', { numeric: true }) : a - b;
      return state.down ? -order : order;
    });
    ordered = keyed.map(([, row]) => row);
    state.page = 0;
    fill();
  }

  function fill() {
    heads.forEach((head, index) => {
      if (index === state.by) head.setAttribute('aria-sort', state.down ? 'descending' : 'ascending');
      else head.removeAttribute('aria-sort');
    });
    const start = state.page * PAGE_ROWS;
    body.replaceChildren(
      ...ordered.slice(start, start + PAGE_ROWS).map((row) =>
        el(
          'tr',
          { class: options.selected && options.selected(row) ? 'selected' : null },
          ...columns.map((column) => {
            const mark = column.mark ? column.mark(row) : '';
            const shown = column.show ? column.show(row) : column.value(row);
            return el('td', { class: [column.text ? 'text' : '', mark].filter(Boolean).join(' ') || null }, shown ?? NONE);
          }),
        ),
      ),
    );
    const last = Math.max(0, Math.ceil(ordered.length / PAGE_ROWS) - 1);
    const turn = (by) => {
      state.page += by;
      fill();
    };
    pages.replaceChildren(
      ...(last
        ? [
            el('button', { disabled: state.page === 0, click: () => turn(-1) }, 'previous'),
            el('button', { disabled: state.page === last, click: () => turn(1) }, 'next'),
            el('span', { class: 'muted' }, `${start + 1} to ${Math.min(start + PAGE_ROWS, ordered.length)} of ${ordered.length}`),
          ]
        : []),
    );
  }

  fill();
  const table = el('table', { 'data-table': options.name }, el('thead', {}, el('tr', {}, ...heads)), body);
  return el('div', {}, el('div', { class: 'scroll' }, table), pages);
}

function runLink(run, text = run.label) {
  return el('button', { class: 'link', type: 'button', click: () => go({ view: 'run', run: run.id, against: null }) }, text);
}

const LABEL = { name: 'method', value: (run) => run.label, show: (run) => runLink(run), text: true };
const COMMIT = { name: 'commit', value: (run) => run.commit, text: true, title: '+: its files differed from the commit' };

function measured(name, title) {
  return { name: title, value: (run) => first(run.times && run.times[name]), show: (run) => ranged(run.times && run.times[name], significant) };
}

/** Columns of the scores of one group. */
function scoreColumns(described) {
  const half = described.sets.length;
  const difference = (run) => run.difference;
  return [
    LABEL,
    { name: described.unit === 'perplexity' ? 'perplexity' : 'score', value: (run) => first(run.score), show: (run) => ranged(run.score), title: 'mean over the data sets [95 % interval]' },
    {
      name: described.unit === 'perplexity' ? 'nats, vs full' : 'vs full',
      value: (run) => first(difference(run)),
      show: (run) => (run.difference ? ranged(run.difference, (x) => signed(x, described.fewer ? 4 : 2)) + (direction(run) ? ' \u2020' : '') : NONE),
      mark: (run) => ({ '-1': 'worse', 1: 'better', 0: '' })[direction(run)],
      title: "paired difference to the full cache on the same examples [95 % interval]; \u2020: p below 0.05 after Holm's rule over the group",
    },
    { name: 'p', value: (run) => first(run.test), show: (run) => (run.test ? fixed(run.test[0], 3) : NONE), title: "of a sign-flip test against the full cache, after Holm's rule over the group" },
    { name: 'won, tied, lost', value: (run) => (run.test ? run.test[1] - run.test[3] : null), show: (run) => (run.test ? run.test.slice(1).join(', ') : NONE), title: 'examples with a better, the same and a worse score than with the full cache' },
    { name: 'KV, MiB', value: (run) => run.bytes && run.bytes.kv_bytes_stored, show: (run) => mib(run.bytes && run.bytes.kv_bytes_stored), title: 'stored after the prompt, per sequence' },
    { name: 'of full', value: (run) => run.bytes && run.bytes.kv_ratio, show: (run) => percent(run.bytes && run.bytes.kv_ratio) },
    ...(half > 1
      ? described.sets.map((name, index) => ({ name, value: (run) => first(run.sets && run.sets[index]), show: (run) => fixed(first(run.sets && run.sets[index])) }))
      : []),
    COMMIT,
  ];
}

const SPEED_COLUMNS = [
  LABEL,
  measured('tpot_ms', 'TPOT, ms'),
  measured('ttft_ms', 'TTFT, ms'),
  measured('decode_tokens_per_s', 'decode, tokens/s'),
  measured('output_tokens_per_s', 'output, tokens/s'),
  { name: 'speed-up', value: (run) => run.speed_up, show: (run) => significant(run.speed_up, 3), title: 'TPOT of the full cache / TPOT' },
  { name: 'roofline', value: (run) => run.roofline, show: (run) => significant(run.roofline, 3), title: 'the speed-up if a step took as long as reading its bytes' },
  { name: 'MBU', value: (run) => first(run.mbu), show: (run) => percent(first(run.mbu)), title: 'memory bandwidth utilisation: bytes that a step must read / (bandwidth of a copy x TPOT)' },
  { name: 'KV, MiB', value: (run) => run.bytes && run.bytes.kv_bytes_stored, show: (run) => mib(run.bytes && run.bytes.kv_bytes_stored) },
  { name: 'peak prefill, MiB', value: (run) => run.peak_prefill, show: (run) => mib(run.peak_prefill) },
  { name: 'peak decode, MiB', value: (run) => run.peak_decode, show: (run) => mib(run.peak_decode) },
  { name: 'load', value: (run) => run.load, show: (run) => fixed(run.load), title: 'load average of the machine before the run' },
  { name: 'device', value: (run) => run.device, text: true },
  COMMIT,
];

const TRAINING_COLUMNS = [
  LABEL,
  { name: 'perplexity', value: (run) => run.validation && run.validation.perplexity, show: (run) => significant(run.validation && run.validation.perplexity) },
  { name: 'loss', value: (run) => run.validation && run.validation.loss, show: (run) => significant(run.validation && run.validation.loss) },
  { name: 'accuracy', value: (run) => run.validation && run.validation.accuracy, show: (run) => percent(run.validation && run.validation.accuracy) },
  { name: 'KV bytes/token', value: (run) => run.bytes && run.bytes.kv_bytes_per_token },
  { name: 'KV bytes, fixed', value: (run) => run.bytes && run.bytes.kv_bytes_fixed, title: 'windows and states, at any length' },
  { name: 'parameters', value: (run) => run.training && run.training.parameters, show: (run) => significant(run.training && run.training.parameters, 3) },
  { name: 'learning rate', value: (run) => run.training && run.training.lr },
  { name: 'seed', value: (run) => run.seed },
  { name: 'training, s', value: (run) => run.training && run.training.seconds, show: (run) => significant(run.training && run.training.seconds) },
  COMMIT,
];

const ALL_COLUMNS = [
  LABEL,
  { name: 'kind', value: (run) => group(run).kind, text: true },
  { name: 'task', value: (run) => group(run).task, text: true },
  { name: 'model', value: (run) => group(run).model, text: true },
  { name: 'budget', value: (run) => run.budget },
  { name: 'score', value: (run) => first(run.score), show: (run) => fixed(first(run.score)) },
  { name: 'vs full', value: (run) => first(run.difference), show: (run) => signed(first(run.difference)) },
  { name: 'KV, MiB', value: (run) => run.bytes && run.bytes.kv_bytes_stored, show: (run) => mib(run.bytes && run.bytes.kv_bytes_stored) },
  { name: 'of full', value: (run) => run.bytes && run.bytes.kv_ratio, show: (run) => percent(run.bytes && run.bytes.kv_ratio) },
  { name: 'TPOT, ms', value: (run) => first(run.times && run.times.tpot_ms), show: (run) => significant(first(run.times && run.times.tpot_ms)) },
  { name: 'status', value: (run) => run.status, text: true },
  { name: 'dtype', value: (run) => run.dtype, text: true },
  { name: 'device', value: (run) => run.device, text: true },
  COMMIT,
  { name: 'finished', value: (run) => run.finished, text: true },
  { name: 'hash', value: (run) => run.id, text: true },
];
