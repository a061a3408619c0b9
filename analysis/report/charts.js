/* Figures by Plotly. Hover boxes are ours, so that every text is a text node; a click opens the run. */

const LAYOUT = {
  font: { family: 'system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif', size: 12, color: '#1b1f24' },
  margin: { l: 66, r: 16, t: 30, b: 52 },
  paper_bgcolor: '#fff',
  plot_bgcolor: '#fff',
  hovermode: 'closest',
};
const AXIS = { gridcolor: '#e8ebf0', zeroline: false, linecolor: '#98a2b3', ticks: 'outside' };
const MOST_CURVES = 60;
const MOST_BARS = 400;

const hover = el('div', { id: 'hover', hidden: true });

function showHover(lines, event) {
  hover.textContent = lines.join('\n');
  hover.hidden = false;
  const box = hover.getBoundingClientRect();
  const x = event ? event.clientX : 0;
  const y = event ? event.clientY : 0;
  hover.style.left = `${Math.max(4, Math.min(x + 14, innerWidth - box.width - 8))}px`;
  hover.style.top = `${Math.max(4, Math.min(y + 14, innerHeight - box.height - 8))}px`;
}

/**
 * A chart whose points know their run (``customdata``).
 * @param {Function} lines of the hover box, of one of Plotly's points
 */
function chart(traces, layout, name, lines, height = 520) {
  const node = el('div', { class: 'chart', 'data-chart': name });
  const config = {
    displaylogo: false,
    responsive: true,
    modeBarButtons: [['toImage'], ['zoom2d', 'pan2d', 'zoomIn2d', 'zoomOut2d', 'resetScale2d']], // none that sends data
    toImageButtonOptions: { format: 'svg', filename: `kvbench-${name}` },
  };
  node.style.height = `${height}px`;
  requestAnimationFrame(() => {
    if (!node.isConnected) return;
    Plotly.newPlot(node, traces, { ...LAYOUT, height, ...layout }, config).then(() => {
      node.setAttribute('data-ready', '');
      node.on('plotly_hover', (event) => showHover(lines(event.points[0]), event.event));
      node.on('plotly_unhover', () => { hover.hidden = true; });
      node.on('plotly_click', (event) => {
        const run = RUNS.get([event.points[0].customdata].flat()[0]);
        hover.hidden = true;
        if (run) go({ view: 'run', run: run.id, against: null });
      });
    });
  });
  return node;
}

function described(run) {
  return [run.label, `${group(run).task}, ${group(run).model}`];
}

/* score against bytes or speed ------------------------------------------------------------------------------------ */

const X_AXES = {
  bytes: { text: 'KV cache stored after the prompt, MiB per sequence', log: true, value: (run) => run.bytes && run.bytes.kv_bytes_stored / MIB },
  share: { text: 'KV cache, share of the full cache', log: true, value: (run) => run.bytes && run.bytes.kv_ratio },
  mean: { text: 'KV cache, mean over the steps, MiB per sequence', log: true, value: (run) => run.bytes && run.bytes.kv_bytes_mean / MIB },
  budget: { text: 'budget, as typed', log: true, value: (run) => run.budget },
};

/** Axes that these runs have a number for; decode throughput where the same methods were timed on the same device. */
function xAxes(runs) {
  const found = Object.entries(X_AXES).filter(([, axis]) => runs.some((run) => axis.value(run) > 0));
  const [sample] = runs;
  DATA.groups.forEach((timed, number) => {
    if (timed.kind !== 'efficiency' || timed.model !== group(sample).model) return;
    const speeds = new Map();
    for (const run of DATA.runs) {
      if (run.group === number && run.times && run.times.decode_tokens_per_s && run.dtype === sample.dtype) speeds.set(run.identity, run);
    }
    const value = (run) => (speeds.has(run.identity) ? speeds.get(run.identity).times.decode_tokens_per_s[0] : null);
    if (runs.filter((run) => value(run) !== null).length > 1) {
      found.push([`speed-${number}`, { text: `decode throughput, tokens/s: ${timed.task}, ${timed.setting}`, log: false, more: true, value }]);
    }
  });
  return found;
}

function yAxes(about) {
  const found = [['score', { text: about.unit === 'perplexity' ? 'perplexity' : 'mean score over the data sets', value: (run) => run.score }]];
  found.push(['difference', { text: about.fewer ? 'loss beyond the full cache, nats per token' : 'score, difference to the full cache', value: (run) => (run.full ? [0, null, null, null] : run.difference) }]);
  if (about.sets.length > 1) {
    about.sets.forEach((name, index) => found.push([`set-${index}`, { text: `score on ${name}`, value: (run) => run.sets && run.sets[index] }]));
  }
  return found;
}

/** A logarithmic axis with the numbers 1, 2 and 5 of each decade written out. */
function logAxis(text, values) {
  const found = values.filter((value) => value > 0);
  const ticks = [];
  for (let power = Math.floor(Math.log10(Math.min(...found))); power <= Math.ceil(Math.log10(Math.max(...found))); power += 1) {
    for (const digit of [1, 2, 5]) ticks.push(digit * 10 ** power);
  }
  return { ...AXIS, title: { text: plotText(text) }, type: 'log', tickmode: 'array', tickvals: ticks, ticktext: ticks.map((tick) => significant(tick)) };
}

/** Runs that no other run equals or beats in both. */
function frontier(points, moreX, fewerY) {
  const better = (a, b) => (fewerY ? a < b : a > b);
  const ordered = [...points].sort((a, b) => (moreX ? b.x - a.x : a.x - b.x) || (better(a.y, b.y) ? -1 : 1));
  const found = [];
  for (const point of ordered) if (!found.length || better(point.y, found[found.length - 1].y)) found.push(point);
  return found;
}

function pareto(runs, about, x, y) {
  const points = runs
    .filter((run) => run.status === 'done' && first(y.value(run)) !== null && x.value(run) > 0)
    .map((run) => ({ run, x: x.value(run), y: y.value(run)[0], low: y.value(run)[1], high: y.value(run)[2] }));
  const curves = new Map();
  const many = new Set(points.map((point) => point.run.curve)).size > MOST_CURVES;
  for (const point of points) {
    const key = many ? point.run.method : point.run.curve;
    if (!curves.has(key)) curves.set(key, []);
    curves.get(key).push(point);
  }
  const bars = points.length <= MOST_BARS;
  const front = frontier(points, Boolean(x.more), about.fewer);
  const traces = [
    { x: front.map((p) => p.x), y: front.map((p) => p.y), mode: 'lines', name: 'not beaten in both', line: { color: '#98a2b3', width: 6 }, opacity: 0.35, hoverinfo: 'skip' },
  ];
  for (const [name, curve] of curves) {
    curve.sort((a, b) => a.x - b.x);
    const { color, symbol, dash } = DATA.looks[curve[0].run.curve];
    const known = curve.map((p) => p.low !== null && p.high !== null);
    traces.push({
      x: curve.map((p) => p.x),
      y: curve.map((p) => p.y),
      customdata: curve.map((p) => p.run.id),
      name: plotText(name),
      mode: many || curve.length === 1 ? 'markers' : 'lines+markers',
      marker: { color, symbol, size: 9, ...(symbol.includes('open') ? {} : { line: { color: '#fff', width: 1 } }) },
      line: { color, width: 1.5, dash },
      hoverinfo: 'none',
      error_y: bars && known.some(Boolean)
        ? { type: 'data', symmetric: false, thickness: 1, width: 3, color, array: curve.map((p, i) => (known[i] ? p.high - p.y : 0)), arrayminus: curve.map((p, i) => (known[i] ? p.y - p.low : 0)) }
        : undefined,
    });
  }
  const lines = (point) => {
    const run = RUNS.get(point.customdata);
    if (!run) return [];
    const shown = y.value(run);
    return [
      ...described(run),
      `${y.text}: ${ranged(shown)}${shown[3] ? `, n = ${shown[3]}` : ''}`,
      run.difference ? `vs ${run.baseline}: ${ranged(run.difference, signed)}` : null,
      `${x.text}: ${significant(x.value(run))}`,
      run.bytes && run.bytes.kv_ratio ? `${percent(run.bytes.kv_ratio)} of the full cache` : null,
      `${run.id}, commit ${run.commit}`,
    ].filter(Boolean);
  };
  const layout = {
    xaxis: x.log && points.length ? logAxis(x.text, points.map((p) => p.x)) : { ...AXIS, title: { text: plotText(x.text) } },
    yaxis: { ...AXIS, title: { text: plotText(y.text) } },
    showlegend: true,
    legend: { font: { size: 11 } },
  };
  return chart(traces, layout, 'pareto', lines, 560);
}

/* speed ----------------------------------------------------------------------------------------------------------- */

const SPEEDS = {
  tpot_ms: { text: 'time per output token, ms', value: (run) => run.times && run.times.tpot_ms },
  ttft_ms: { text: 'time to the first token, ms', value: (run) => run.times && run.times.ttft_ms },
  decode_tokens_per_s: { text: 'decode throughput, tokens/s', value: (run) => run.times && run.times.decode_tokens_per_s },
  output_tokens_per_s: { text: 'output throughput, tokens/s', value: (run) => run.times && run.times.output_tokens_per_s },
  speed_up: { text: 'speed-up of decoding over the full cache', value: (run) => (run.full ? [1, null, null] : run.speed_up && [run.speed_up, null, null]) },
  peak_prefill: { text: 'peak memory of the prefill, MiB', value: (run) => run.peak_prefill && [run.peak_prefill / MIB, null, null] },
  peak_decode: { text: 'peak memory of decoding, MiB', value: (run) => run.peak_decode && [run.peak_decode / MIB, null, null] },
  largest: { text: 'largest that fits', value: (run) => run.largest && [run.largest, null, null] },
};

function speeds(runs, metric) {
  const { text, value } = SPEEDS[metric];
  const found = runs.filter((run) => value(run)).sort((a, b) => value(b)[0] - value(a)[0]).slice(0, 80);
  const look = found.map((run) => DATA.looks[run.curve]);
  const at = found.map((run) => value(run));
  const trace = {
    x: at.map((v) => v[0]),
    y: found.map((run, index) => index),
    customdata: found.map((run) => run.id),
    mode: 'markers',
    hoverinfo: 'none',
    marker: { size: 10, color: look.map((l) => l.color), symbol: look.map((l) => l.symbol) },
    error_x: { type: 'data', symmetric: false, thickness: 1.5, color: '#5b6572', array: at.map((v) => (v[2] === null ? 0 : v[2] - v[0])), arrayminus: at.map((v) => (v[1] === null ? 0 : v[0] - v[1])) },
  };
  const layout = {
    margin: { ...LAYOUT.margin, l: 240 },
    xaxis: { ...AXIS, title: { text: `${text} (median; bars: min to max)` }, rangemode: 'tozero' },
    yaxis: { ...AXIS, tickmode: 'array', tickvals: found.map((run, index) => index), ticktext: found.map((run) => plotText(run.label)), range: [-0.6, found.length - 0.4] },
    showlegend: false,
  };
  const lines = (point) => {
    const run = RUNS.get(point.customdata);
    return [...described(run), `${text}: ${ranged(value(run), significant)}`, run.device, `${run.id}, commit ${run.commit}`];
  };
  return chart([trace], layout, 'speed', lines, 120 + 24 * found.length);
}

/* trained architectures ------------------------------------------------------------------------------------------- */

function trained(runs) {
  const curves = new Map();
  for (const run of runs.filter((one) => one.validation && one.validation.perplexity !== null)) {
    if (!curves.has(run.label)) curves.set(run.label, []);
    curves.get(run.label).push(run);
  }
  const traces = [...curves].map(([label, found]) => {
    const { color, symbol } = DATA.looks[found[0].curve];
    return {
      x: found.map((run) => run.bytes.kv_bytes_per_token),
      y: found.map((run) => run.validation.perplexity),
      customdata: found.map((run) => run.id),
      name: plotText(label),
      mode: 'markers',
      hoverinfo: 'none',
      marker: { size: 9, color, symbol },
    };
  });
  const lines = (point) => {
    const run = RUNS.get(point.customdata);
    return [
      ...described(run),
      `perplexity ${significant(run.validation.perplexity)}, loss ${significant(run.validation.loss)}`,
      `learning rate ${run.training.lr}, seed ${run.seed}`,
      `${run.bytes.kv_bytes_per_token} bytes per token + ${run.bytes.kv_bytes_fixed} at any length`,
      `${run.id}, commit ${run.commit}`,
    ];
  };
  const layout = {
    xaxis: logAxis('KV cache, bytes per token (without what is fixed)', [...curves.values()].flat().map((run) => run.bytes.kv_bytes_per_token)),
    yaxis: { ...AXIS, title: { text: 'perplexity on held-out data, each run' }, type: 'log' },
    showlegend: true,
  };
  return chart(traces, layout, 'training', lines);
}

/* needles: score over length and depth, a panel a method ----------------------------------------------------------- */

const MAPS_A_PAGE = 12;

function needleMap(run, about) {
  const tokens = about.lengths.map((length) => (length >= 1024 ? `${Number((length / 1024).toPrecision(3))}k` : String(length)));
  const depths = about.depths.map((depth) => `${Math.round(100 * depth)} %`);
  const z = depths.map(() => tokens.map(() => null));
  const customdata = depths.map(() => tokens.map(() => [run.id, 0]));
  for (const [depth, length, score, n] of run.map) {
    const at = [about.depths.indexOf(depth), about.lengths.indexOf(length)];
    z[at[0]][at[1]] = score;
    customdata[at[0]][at[1]] = [run.id, n];
  }
  const cells = { type: 'heatmap', x: tokens.map((_, i) => i), y: depths.map((_, i) => i), z, customdata, zmin: 0, zmax: 100, colorscale: 'Viridis', showscale: false, hoverinfo: 'none', xgap: 1, ygap: 1 };
  const axis = (text, names) => ({ title: { text, font: { size: 11 } }, tickmode: 'array', tickvals: names.map((_, i) => i), ticktext: names, tickfont: { size: 10 }, showgrid: false, zeroline: false });
  const layout = { margin: { l: 58, r: 4, t: 4, b: 38 }, xaxis: axis('prompt, tokens', tokens), yaxis: { ...axis('depth', depths), autorange: 'reversed' } };
  const lines = (point) => {
    const n = point.customdata[1];
    return [...described(run), `prompt of ${tokens[point.x]} tokens, depth ${depths[point.y]}`, n ? `score ${fixed(point.z, 0)}, n = ${n}` : 'no example'];
  };
  return el('figure', {}, el('figcaption', {}, runLink(run), ` ${ranged(run.score, (value) => fixed(value, 0))}`), chart([cells], layout, 'needle', lines, 220));
}

function needleMaps(runs, about) {
  const scale = el('div', { class: 'scale' }, el('span', {}, 'score 0'), el('span'), el('span', {}, '100'));
  return el('div', {}, scale, el('div', { class: 'maps' }, ...runs.map((run) => needleMap(run, about))));
}

/** Loss by distance from the compressed context, of a run and of the full cache. */
function distances(run, baseline) {
  const traces = [run, baseline].filter((one) => one && one.distance).map((one) => ({
    x: one.distance[0], y: one.distance[1], customdata: one.distance[0].map(() => one.id), name: plotText(one.label), mode: 'lines+markers', hoverinfo: 'none',
    line: { color: DATA.looks[one.curve].color, dash: DATA.looks[one.curve].dash }, marker: { color: DATA.looks[one.curve].color, symbol: DATA.looks[one.curve].symbol },
  }));
  const layout = { xaxis: { ...AXIS, title: { text: 'tokens behind the compressed context, up to' }, type: 'log' }, yaxis: { ...AXIS, title: { text: 'loss, nats per token' } }, showlegend: true };
  return chart(traces, layout, 'distance', (point) => [RUNS.get(point.customdata).label, `up to ${point.x} tokens: ${fixed(point.y, 4)} nats per token`], 380);
}
