/* The frame of the page, drawn anew when the address changes. */

function problemList() {
  if (!DATA.problems.length) return null;
  const count = DATA.problems.length;
  return el(
    'details',
    { class: 'problems' },
    el('summary', {}, `${count} ${count === 1 ? 'record or example file' : 'records or example files'} with a problem`),
    el('ul', {}, ...DATA.problems.map((problem) => el('li', {}, problem))),
  );
}

const available = Object.entries(VIEWS).filter(([, view]) => DATA.runs.some((run) => view.has(run)));
const tabs = new Map(available.map(([name, view]) => [name, el('button', { type: 'button', 'data-view': name, click: () => go({ view: name, group: null, mappage: null }) }, view.title)]));
const bar = filterBar();
const main = el('main', { id: 'main' });

function render() {
  const asked = params().get('view');
  const name = tabs.has(asked) ? asked : available[0][0];
  const runs = visibleRuns();
  hover.hidden = true;
  bar.update(runs);
  for (const [one, tab] of tabs) {
    if (one === name) tab.setAttribute('aria-current', 'page');
    else tab.removeAttribute('aria-current');
  }
  for (const node of main.querySelectorAll('.chart')) Plotly.purge(node);
  main.replaceChildren(...VIEWS[name].show(runs));
  if (name === 'run' && render.last !== location.hash) scrollTo(0, 0);
  render.last = location.hash;
}

document.body.append(
  el(
    'header',
    {},
    el('h1', {}, `kvbench report: ${DATA.folder}`),
    el('div', { class: 'muted' }, `${DATA.runs.length} runs in ${DATA.groups.length} groups; only runs of one group differ in their method alone`),
    problemList(),
    bar,
    el('nav', {}, ...tabs.values()),
  ),
  main,
  el('footer', {}, `Written by kvbench ${DATA.version}. All numbers come from the runs' records, rounded to seven digits. The page loads nothing.`),
  hover,
);
addEventListener('hashchange', render);
render();
