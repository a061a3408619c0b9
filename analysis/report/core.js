/* The data of the page, and the helpers by which every text gets into it: as a text node, never as HTML. */

const DATA = JSON.parse(document.getElementById('report-data').textContent);
const MIB = 2 ** 20;
const NONE = '\u2013';
const RUNS = new Map(DATA.runs.map((run) => [run.id, run]));

/**
 * An element. Attributes are set as values and strings become text nodes.
 * @param {string} tag
 * @param {Object} attributes functions are event listeners by the event's name
 * @param {...(Node|string|null)} children
 */
function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === 'function') node.addEventListener(name, value);
    else if (value === true) node.setAttribute(name, '');
    else if (value !== false && value !== null && value !== undefined) node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

/** Plotly reads a few tags in its texts: this shows a text as it is. */
function plotText(text) {
  return String(text).replace(/&/g, '&amp;').replace(/</g, '&lt;').replace(/>/g, '&gt;');
}

function group(run) {
  return DATA.groups[run.group];
}

function mean(values) {
  return values.reduce((sum, value) => sum + value, 0) / values.length;
}

/* numbers as text ------------------------------------------------------------------------------------------------ */

function fixed(value, digits = 2) {
  return value === null || value === undefined ? NONE : value.toFixed(digits);
}

function signed(value, digits = 2) {
  if (value === null || value === undefined) return NONE;
  return (value > 0 ? '+' : value < 0 ? '\u2212' : '') + Math.abs(value).toFixed(digits);
}

function significant(value, digits = 4) {
  if (value === null || value === undefined) return NONE;
  return Math.abs(value) >= 10 ** digits ? Math.round(value).toLocaleString('en') : String(Number(value.toPrecision(digits)));
}

function mib(bytes) {
  return bytes === null || bytes === undefined ? NONE : significant(bytes / MIB);
}

function percent(share, digits = 1) {
  return share === null || share === undefined ? NONE : `${(100 * share).toFixed(digits)} %`;
}

/** ``[mean, low, high, n]`` or ``[median, min, max]`` with its range. */
function ranged(found, format = fixed) {
  if (!found || found[0] === null) return NONE;
  const [middle, low, high] = found;
  if (low === null || high === null) return format(middle);
  return `${format(middle)} [${format(low)}, ${format(high)}]`;
}

/** What sorts: the first number of an estimate. */
function first(found) {
  return found ? found[0] : null;
}

const SIGNIFICANT = 0.05;

/** -1: worse than the full cache after Holm's rule, 1: better, 0: it cannot be told, or was not tested. */
function direction(run) {
  if (!run.test || !run.difference || run.test[0] >= SIGNIFICANT) return 0;
  return run.difference[0] > 0 === group(run).fewer ? -1 : 1;
}

/* the state of the page is its address: the back button and links work ------------------------------------------- */

function params() {
  return new URLSearchParams(location.hash.slice(1));
}

/** The address with these parameters changed; null removes one, a list repeats one. */
function go(changes) {
  const found = params();
  for (const [name, value] of Object.entries(changes)) {
    found.delete(name);
    for (const one of Array.isArray(value) ? value : [value]) if (one !== null) found.append(name, one);
  }
  location.hash = found.toString();
}

/** A select element for a parameter of the address. */
function chooser(name, label, options, value, changes = {}) {
  const select = el('select', { id: `choose-${name}`, change: (event) => go({ ...changes, [name]: event.target.value }) });
  for (const [key, text] of options) select.append(el('option', { value: key, selected: String(key) === String(value) }, text));
  return [el('label', { for: `choose-${name}` }, label), select];
}

/* files for the user --------------------------------------------------------------------------------------------- */

function save(name, type, text) {
  const address = URL.createObjectURL(new Blob([text], { type }));
  el('a', { href: address, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(address), 10000);
}

/** CSV by RFC 4180. A text that a spreadsheet would run as a formula gets an apostrophe in front. */
function csv(rows) {
  const cell = (value) => {
    if (value === null || value === undefined) return '';
    let text = String(value);
    if (typeof value === 'string' && /^[=+\-@\t\r]/.test(text)) text = `'${text}`;
    return /[",\r\n]/.test(text) ? `"${text.replace(/"/g, '""')}"` : text;
  };
  return `${rows.map((row) => row.map(cell).join(',')).join('\r\n')}\r\n`;
}

/* examples ------------------------------------------------------------------------------------------------------- */

const unpacked = new Map();

/** The examples of a group, decompressed when they are first looked at; null where there are none. */
function examplesOf(number) {
  const block = document.getElementById(`examples-${number}`);
  if (!block) return Promise.resolve(null);
  if (!unpacked.has(number)) {
    const bytes = Uint8Array.from(atob(block.textContent), (letter) => letter.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream('deflate'));
    unpacked.set(number, new Response(stream).json());
  }
  return unpacked.get(number);
}
