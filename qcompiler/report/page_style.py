"""The style and the script of the HTML page. The script sorts and filters tables; without it the page still reads."""

STYLE = """
:root { color-scheme: light dark; --line: #8884; --good: #1a7f37; --warn: #9a6700; --bad: #cf222e; }
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 1400px; padding: 0 1rem; }
h1 { font-size: 1.4rem; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin-top: 2rem; }
p { margin: .2rem 0; }
.badge { display: inline-block; border-radius: .4rem; color: #fff; font-weight: 600; padding: .1rem .7rem; }
.accepted { background: var(--good); }
.rejected { background: var(--bad); }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
td, th { border-bottom: 1px solid var(--line); padding: .2rem .6rem; text-align: left; vertical-align: top; }
#sites td:not(:last-child), .n { white-space: nowrap; }
.n { text-align: right; }
th button { all: unset; cursor: pointer; font-weight: 600; }
th button:focus-visible { outline: 2px solid; }
th[aria-sort=ascending] button::after { content: " \\2191"; }
th[aria-sort=descending] button::after { content: " \\2193"; }
tr.unfused td { color: var(--bad); }
tr.skipped td { color: var(--warn); }
.findings { list-style: none; padding: 0; }
.findings > li { border-left: .3rem solid var(--line); margin: .6rem 0; padding-left: .7rem; }
.findings > li.error { border-color: var(--bad); }
.findings > li.warning { border-color: var(--warn); }
.bars { width: 100%; }
.bars th { font-weight: 400; white-space: nowrap; width: 1%; }
.bars .n { width: 1%; }
.before, .after { height: .55rem; }
.before { background: #8888; }
.after { background: #3b82f6; }
pre { font-size: 12px; overflow-x: auto; }
summary { cursor: pointer; }
"""

SCRIPT = """
for (const table of document.querySelectorAll("table[id]")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => head.addEventListener("click", () => {
    const down = head.getAttribute("aria-sort") === "ascending";
    heads.forEach(h => h.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const key = row => row.cells[column].dataset.key ?? row.cells[column].textContent;
    const number = head.className === "n";
    const rows = [...table.tBodies[0].rows];
    rows.sort((a, b) => number ? key(a) - key(b) : key(a).localeCompare(key(b), undefined, {numeric: true}));
    if (down) rows.reverse();
    table.tBodies[0].append(...rows);
  }));
}
const find = document.getElementById("find");
if (find) find.addEventListener("input", () => {
  const wanted = find.value.toLowerCase();
  for (const row of document.getElementById("sites").tBodies[0].rows)
    row.hidden = !row.textContent.toLowerCase().includes(wanted);
});
"""
