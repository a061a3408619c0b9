/* Filters over all runs: several values of one filter widen it, several filters narrow it. */

const FILTERS = {
  task: (run) => group(run).task,
  model: (run) => group(run).model,
  method: (run) => run.method,
  budget: (run) => (run.budget === null ? 'none' : String(run.budget)),
  dtype: (run) => run.dtype,
  device: (run) => run.device,
  commit: (run) => run.commit,
};

function chosen(name) {
  return new Set(params().getAll(name));
}

function matches(run, skipped = null) {
  for (const [name, value] of Object.entries(FILTERS)) {
    const wanted = name === skipped ? [] : params().getAll(name);
    if (wanted.length && !wanted.includes(String(value(run)))) return false;
  }
  const words = (params().get('q') || '').toLowerCase().split(/\s+/).filter(Boolean);
  if (!words.length) return true;
  const text = `${run.label} ${group(run).task} ${group(run).model} ${run.id} ${run.path}`.toLowerCase();
  return words.every((word) => text.includes(word));
}

function visibleRuns() {
  return DATA.runs.filter((run) => matches(run));
}

/** The values of one filter with the number of runs that the other filters leave them. */
function counts(name) {
  const found = new Map();
  for (const run of DATA.runs) found.set(String(FILTERS[name](run)), 0);
  for (const run of DATA.runs) {
    if (matches(run, name)) {
      const value = String(FILTERS[name](run));
      found.set(value, found.get(value) + 1);
    }
  }
  const byNumber = (a, b) => Number(a) - Number(b) || a.localeCompare(b);
  return [...found].sort(([a], [b]) => (Number.isNaN(Number(a)) || Number.isNaN(Number(b)) ? a.localeCompare(b) : byNumber(a, b)));
}

/** One filter as a list of boxes; it is filled when it is opened. */
function filterBox(name) {
  const list = el('div');
  const summary = el('summary');
  const fill = () => {
    const wanted = chosen(name);
    const boxes = counts(name).map(([value, count]) =>
      el(
        'label',
        {},
        el('input', {
          type: 'checkbox',
          value,
          checked: wanted.has(value),
          change: (event) => {
            const now = chosen(name);
            if (event.target.checked) now.add(value);
            else now.delete(value);
            go({ [name]: [...now] });
          },
        }),
        value,
        el('span', { class: 'count' }, String(count)),
      ),
    );
    list.replaceChildren(...boxes);
  };
  const box = el('details', { class: 'filter', 'data-filter': name, toggle: () => box.open && fill() }, summary, list);
  box.update = () => {
    const wanted = chosen(name);
    summary.textContent = wanted.size === 0 ? `${name}: all` : wanted.size === 1 ? `${name}: ${[...wanted][0]}` : `${name}: ${wanted.size} values`;
    box.toggleAttribute('data-active', wanted.size > 0);
    if (box.open) fill();
  };
  return box;
}

function filterBar() {
  const boxes = Object.keys(FILTERS).map(filterBox);
  let waiting = 0;
  const search = el('input', {
    type: 'search',
    placeholder: 'search: label, hash, path',
    'aria-label': 'search',
    input: () => {
      clearTimeout(waiting);
      waiting = setTimeout(() => go({ q: search.value || null }), 250);
    },
  });
  const reset = el('button', { id: 'reset', click: () => go({ ...Object.fromEntries(Object.keys(FILTERS).map((name) => [name, null])), q: null }) }, 'reset');
  const shown = el('span', { class: 'muted', id: 'shown' });
  const bar = el('div', { class: 'bar' }, ...boxes, search, reset, shown);
  bar.update = (runs) => {
    for (const box of boxes) box.update();
    if (document.activeElement !== search) search.value = params().get('q') || '';
    shown.textContent = `${runs.length} of ${DATA.runs.length} runs`;
  };
  document.addEventListener('click', (event) => {
    for (const box of boxes) if (box.open && !box.contains(event.target)) box.open = false;
  });
  return bar;
}
