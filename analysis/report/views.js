/* The views of the page: each gets the runs that the filters leave and returns its nodes. */

/** Groups of comparable runs of one sort, those with most runs first: ``[number, runs]``. */
function groupsOf(runs, wanted) {
  const found = new Map();
  for (const run of runs.filter(wanted)) {
    if (!found.has(run.group)) found.set(run.group, []);
    found.get(run.group).push(run);
  }
  return [...found].sort((a, b) => b[1].length - a[1].length || a[0] - b[0]);
}

function groupTitle(number, runs) {
  const about = DATA.groups[number];
  return `${about.task}, ${about.model}, ${about.setting} (${runs.length} runs)`;
}

/** The group of a view with its chooser: ``[runs, description, nodes]``; null where the filters leave none. */
function pickGroup(runs, wanted) {
  const groups = groupsOf(runs, wanted);
  if (!groups.length) return null;
  const asked = Number(params().get('group') ?? NaN);
  const [number, found] = groups.find(([one]) => one === asked) || groups[0];
  const options = groups.map(([one, its]) => [one, groupTitle(one, its)]);
  const nodes = [el('div', { class: 'bar' }, ...chooser('group', 'comparable runs', options, number, { mappage: null }))];
  if (DATA.groups[number].note) nodes.push(el('p', { class: 'muted' }, DATA.groups[number].note));
  return [found, DATA.groups[number], nodes];
}

function nothing(what) {
  return [el('p', { class: 'muted' }, `The filters leave no ${what}.`)];
}

function option(options, name) {
  const asked = params().get(name);
  return options.find(([key]) => key === asked) || options[0];
}

const VIEWS = {
  quality: {
    title: 'Quality and memory',
    has: (run) => group(run).kind === 'accuracy',
    show(runs) {
      const picked = pickGroup(runs, this.has);
      if (!picked) return nothing('scored run');
      const [found, about, nodes] = picked;
      const xs = xAxes(found);
      const ys = yAxes(about);
      if (xs.length) {
        const [xKey, x] = option(xs, 'x');
        const [yKey, y] = option(ys, 'y');
        nodes.push(el('div', { class: 'bar' }, ...chooser('y', 'up', ys.map(([key, axis]) => [key, axis.text]), yKey), ...chooser('x', 'across', xs.map(([key, axis]) => [key, axis.text]), xKey)));
        nodes.push(pareto(found, about, x, y));
        nodes.push(el('p', { class: 'muted' }, 'Bars are 95 % intervals of each mean, so they overlap even where a paired difference is clear: the column "vs full" tells (\u2020: significant after Holm\u2019s rule over the group). The grey line joins runs that no other beats in both numbers as measured. A click on a point opens the run.'));
      }
      nodes.push(sortable(scoreColumns(about), found, { name: 'quality' }));
      return nodes;
    },
  },
  speed: {
    title: 'Speed and peak memory',
    has: (run) => group(run).kind === 'efficiency',
    show(runs) {
      const picked = pickGroup(runs, this.has);
      if (!picked) return nothing('timed run');
      const [found, , nodes] = picked;
      const metrics = Object.entries(SPEEDS).filter(([, metric]) => found.some((run) => metric.value(run)));
      if (metrics.length) {
        const [key] = option(metrics, 'metric');
        nodes.push(el('div', { class: 'bar' }, ...chooser('metric', 'show', metrics.map(([name, metric]) => [name, metric.text]), key)));
        nodes.push(speeds(found, key));
      }
      nodes.push(sortable(SPEED_COLUMNS, found, { name: 'speed' }));
      return nodes;
    },
  },
  needle: {
    title: 'Needle maps',
    has: (run) => Boolean(run.map),
    show(runs) {
      const picked = pickGroup(runs, this.has);
      if (!picked) return nothing('needle run');
      const [found, about, nodes] = picked;
      const last = Math.ceil(found.length / MAPS_A_PAGE) - 1;
      const at = Math.min(last, Math.max(0, Number(params().get('mappage')) || 0));
      const shown = found.slice(at * MAPS_A_PAGE, (at + 1) * MAPS_A_PAGE);
      if (last > 0) {
        nodes.push(
          el(
            'div',
            { class: 'pages' },
            el('button', { disabled: at === 0, click: () => go({ mappage: at - 1 }) }, 'previous'),
            el('button', { disabled: at === last, click: () => go({ mappage: at + 1 }) }, 'next'),
            el('span', { class: 'muted' }, `${at * MAPS_A_PAGE + 1} to ${at * MAPS_A_PAGE + shown.length} of ${found.length} maps`),
          ),
        );
      }
      nodes.push(needleMaps(shown, about));
      nodes.push(el('p', { class: 'muted' }, 'Mean score of the examples of each cell; the hover box says how many there are. Titles: mean [95 % interval].'));
      return nodes;
    },
  },
  training: {
    title: 'Trained architectures',
    has: (run) => group(run).kind === 'train',
    show(runs) {
      const picked = pickGroup(runs, this.has);
      if (!picked) return nothing('training');
      const [found, , nodes] = picked;
      return [...nodes, trained(found), sortable(TRAINING_COLUMNS, found, { name: 'training' })];
    },
  },
  all: {
    title: 'All runs',
    has: () => true,
    show: (runs) => [
      el(
        'div',
        { class: 'bar' },
        el('button', { id: 'runs-csv', click: () => saveRuns(runs) }, `CSV of these ${runs.length} runs`),
        el('button', { id: 'runs-json', click: () => save('kvbench-runs.json', 'application/json', JSON.stringify(runs.map((run) => ({ ...run, group: group(run), provenance: DATA.provenance[run.provenance], identity: DATA.methods[run.identity] })), null, 1)) }, 'JSON'),
      ),
      sortable(ALL_COLUMNS, runs, { name: 'all' }),
    ],
  },
  run: { title: 'One run', has: () => true, show: () => oneRun() },
  provenance: { title: 'Provenance', has: () => true, show: (runs) => provenance(runs) },
};

/* one run --------------------------------------------------------------------------------------------------------- */

function pairsList(values) {
  return el('dl', {}, ...values.filter(([, value]) => value !== null && value !== undefined && value !== '').flatMap(([name, value]) => [el('dt', {}, name), el('dd', {}, String(value))]));
}

function entries(flat) {
  return Object.entries(flat).map(([name, value]) => [name, Array.isArray(value) ? value.join(', ') : value]);
}

function oneRun() {
  const run = RUNS.get(params().get('run'));
  if (!run) return [el('p', { class: 'muted' }, 'Choose a run in a table or a figure.')];
  const about = group(run);
  const same = DATA.runs.filter((one) => one.group === run.group && one.id !== run.id && one.examples);
  const baseline = same.find((one) => one.id === params().get('against')) || same.find((one) => one.full) || null;
  const nodes = [
    el('h2', {}, run.label),
    el('p', { class: 'muted' }, `${about.task}, ${about.model}, ${about.setting}`),
    about.note ? el('p', { class: 'muted' }, about.note) : null,
    el(
      'div',
      { class: 'columns' },
      el('section', {}, el('h3', {}, 'Result'), pairsList(results(run, about))),
      el('section', {}, el('h3', {}, 'Method'), pairsList(entries(DATA.methods[run.identity]))),
      provenanceOf(run),
    ),
    el('details', {}, el('summary', {}, 'Settings that it shares with the runs that it may be compared with'), pairsList(entries(about.identity))),
  ];
  if (run.sets && run.sets.length > 1) nodes.push(el('h3', {}, 'Data sets'), setTable(run, baseline, about));
  if (run.distance) nodes.push(el('h3', {}, 'Loss by distance'), distances(run, baseline || DATA.runs.find((one) => one.group === run.group && one.full)));
  if (run.examples) nodes.push(el('h3', {}, 'Predictions'), predictions(run, baseline, same));
  return nodes.filter(Boolean);
}

/** Where a run comes from; the versions of its packages are folded. */
function provenanceOf(run) {
  const all = entries(DATA.provenance[run.provenance]);
  const isPackage = ([name]) => name.startsWith('packages.');
  return el(
    'section',
    {},
    el('h3', {}, 'Provenance'),
    pairsList([['run', run.id], ['folder', run.path], ['finished', run.finished], ['status', run.status], ...all.filter((one) => !isPackage(one))]),
    el('details', {}, el('summary', {}, 'Packages'), pairsList(all.filter(isPackage).map(([name, value]) => [name.slice('packages.'.length), value]))),
  );
}

function results(run, about) {
  const { bytes = {}, times = {}, validation = {}, training = {} } = run;
  return [
    [about.unit === 'perplexity' ? 'perplexity' : 'score', run.score && `${ranged(run.score)}, n = ${run.score[3]}`],
    [`difference to ${run.baseline}`, run.difference && ranged(run.difference, (x) => signed(x, about.fewer ? 4 : 2))],
    ["p, after Holm's rule over the group", run.test && fixed(run.test[0], 4)],
    ['examples won, tied, lost', run.test && run.test.slice(1).join(', ')],
    ['KV cache after the prompt', bytes.kv_bytes_stored && `${mib(bytes.kv_bytes_stored)} MiB`],
    ['KV cache, mean over the steps', bytes.kv_bytes_mean && `${mib(bytes.kv_bytes_mean)} MiB`],
    ['KV cache at the end', bytes.kv_bytes_stored_end && `${mib(bytes.kv_bytes_stored_end)} MiB`],
    ['of the full cache', bytes.kv_ratio && percent(bytes.kv_ratio)],
    ['prompt, tokens', run.prompt_tokens && significant(run.prompt_tokens)],
    ['TPOT, ms', times.tpot_ms && ranged(times.tpot_ms, significant)],
    ['TTFT, ms', times.ttft_ms && ranged(times.ttft_ms, significant)],
    ['decode, tokens/s', times.decode_tokens_per_s && ranged(times.decode_tokens_per_s, significant)],
    ['speed-up', run.speed_up && `${significant(run.speed_up, 3)} (roofline ${significant(run.roofline, 3)})`],
    ['peak of the prefill, MiB', run.peak_prefill && mib(run.peak_prefill)],
    ['peak of decoding, MiB', run.peak_decode && mib(run.peak_decode)],
    ['perplexity on held-out data', validation.perplexity && significant(validation.perplexity)],
    ['accuracy on held-out data', validation.accuracy && percent(validation.accuracy)],
    ['learning rate', training.lr],
    ['KV bytes per token', bytes.kv_bytes_per_token && `${bytes.kv_bytes_per_token} + ${bytes.kv_bytes_fixed} at any length`],
  ];
}

function setTable(run, baseline, about) {
  const rows = about.sets.map((name, index) => ({ name, mine: run.sets[index], other: baseline && baseline.sets ? baseline.sets[index] : null }));
  const delta = (row) => (row.mine && row.other ? row.mine[0] - row.other[0] : null);
  return sortable(
    [
      { name: 'data set', value: (row) => row.name, text: true },
      { name: run.label, value: (row) => first(row.mine), show: (row) => ranged(row.mine) },
      ...(baseline ? [{ name: baseline.label, value: (row) => first(row.other), show: (row) => ranged(row.other) }, { name: 'difference', value: delta, show: (row) => signed(delta(row)) }] : []),
      { name: 'n', value: (row) => row.mine && row.mine[3] },
    ],
    rows,
    { name: 'sets' },
  );
}

function predictions(run, baseline, same) {
  const place = el('div', {}, el('p', { class: 'muted' }, 'reading the examples ...'));
  examplesOf(run.group)
    .then((chunk) => place.replaceChildren(exampleList(chunk, run, baseline)))
    .catch(() => place.replaceChildren(el('p', { class: 'worse' }, 'The examples cannot be read: this needs a browser with DecompressionStream (2023 or later).')));
  const options = same.map((one) => [one.id, one.label]);
  return el('div', {}, options.length ? el('div', { class: 'bar' }, ...chooser('against', 'beside', options, baseline ? baseline.id : options[0][0])) : null, place);
}

/* provenance ------------------------------------------------------------------------------------------------------- */

function provenance(runs) {
  const found = new Map();
  for (const run of runs) found.set(run.provenance, [...(found.get(run.provenance) || []), run]);
  const rows = [...found].map(([number, its]) => ({ about: DATA.provenance[number], runs: its }));
  const about = (name) => ({ name: name.replace(/^(git|hardware|packages)\./, ''), value: (row) => row.about[name] ?? null, show: (row) => (row.about[name] === undefined || row.about[name] === null ? NONE : String(row.about[name])), text: true });
  const last = (row) => row.runs.map((run) => run.finished || '').reduce((a, b) => (a > b ? a : b));
  return [
    el('p', {}, `The ${runs.length} runs were made by ${rows.length} combinations of code, packages and machine.`),
    sortable(
      [
        { name: 'commit', value: (row) => row.runs[0].commit, text: true, title: '+: its files differed from the commit' },
        { name: 'runs', value: (row) => row.runs.length },
        { name: 'last finished', value: last, text: true },
        ...['packages.torch', 'packages.transformers', 'packages.kvbench', 'python', 'hardware.gpu', 'hardware.cpu', 'hardware.torch_threads', 'hardware.memory_gib', 'hardware.system'].map(about),
      ],
      rows,
      { name: 'provenance' },
    ),
  ];
}

/* all numbers of some runs as CSV, in long names ------------------------------------------------------------------- */

function saveRuns(runs) {
  const flatRow = (run) => {
    const about = group(run);
    const row = { hash: run.id, folder: run.path, kind: about.kind, task: about.task, model: about.model, setting: about.setting, method: run.method, label: run.label };
    for (const name of ['budget', 'status', 'dtype', 'device', 'commit', 'finished', 'speed_up', 'roofline', 'peak_prefill', 'peak_decode', 'seed']) row[name] = run[name];
    const put = (name, found, parts) => parts.forEach((part, index) => { row[`${name} ${part}`.trim()] = found ? found[index] : null; });
    if (run.score) put(about.unit, run.score, ['mean', 'low95', 'high95', 'n']);
    if (run.difference) put('difference to full', run.difference, ['mean', 'low95', 'high95', 'n']);
    if (run.test) put('against full', run.test, ['p (Holm)', 'won', 'tied', 'lost']);
    (run.sets || []).forEach((found, index) => put(`set ${about.sets[index]}`, found, ['mean', 'low95', 'high95', 'n']));
    for (const [name, found] of Object.entries(run.times || {})) put(name, found, ['median', 'min', 'max']);
    for (const [name, value] of Object.entries({ ...run.bytes, ...run.validation, ...run.training })) row[name] = value;
    return row;
  };
  const rows = runs.map(flatRow);
  const names = [...new Set(rows.flatMap((row) => Object.keys(row)))];
  save('kvbench-runs.csv', 'text/csv', csv([names, ...rows.map((row) => names.map((name) => row[name]))]));
}
