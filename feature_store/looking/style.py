"""The style sheet of `report`: plain text of our own, nothing in it comes from a store."""

STYLE = """
:root { color-scheme: light dark; --ink: #1f2933; --soft: #5b6875; --line: #d9dee4; --paper: #ffffff;
  --panel: #f5f7f9; --accent: #2f6f9f; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ec; --soft: #a3aeb9; --line: #3a444e; --paper: #14181c; --panel: #1d2328;
    --accent: #7fb6dc; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
header, main { max-width: 72rem; margin: 0 auto; padding: 0 1.5rem; }
header { padding-top: 2rem; }
h1 { font-size: 1.9rem; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.35rem; margin: 2.5rem 0 0.75rem; padding-top: 0.75rem; border-top: 1px solid var(--line); }
h3 { font-size: 1.05rem; margin: 1.5rem 0 0.5rem; overflow-wrap: anywhere; }
p { margin: 0.4rem 0; overflow-wrap: anywhere; }
.where, figcaption { color: var(--soft); }
nav { display: flex; flex-wrap: wrap; gap: 0.25rem 1.25rem; margin: 1rem 0 0; }
a { color: var(--accent); }
code { font: 0.85em/1.4 ui-monospace, "DejaVu Sans Mono", monospace; overflow-wrap: anywhere; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr));
  gap: 0.75rem; margin: 0 0 1rem; }
.tiles div { background: var(--panel); border-radius: 6px; padding: 0.6rem 0.9rem; }
dt { color: var(--soft); font-size: 0.85rem; }
dd { margin: 0; font-size: 1.35rem; font-variant-numeric: tabular-nums; }
.wide { overflow-x: auto; margin: 0.5rem 0 1rem; }
table { border-collapse: collapse; width: 100%; font-size: 0.9rem; }
th, td { text-align: left; vertical-align: top; padding: 0.35rem 1.25rem 0.35rem 0;
  border-bottom: 1px solid var(--line); }
td { min-width: 6rem; max-width: 28rem; overflow-wrap: anywhere; }
td.num { min-width: 0; }
th { color: var(--soft); font-weight: 600; white-space: nowrap; }
td code { overflow-wrap: normal; white-space: nowrap; }
td code.sql { white-space: pre-wrap; overflow-wrap: anywhere; }
.num { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.pictures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(30rem, 100%), 1fr));
  gap: 0 1.5rem; }
figure { margin: 0.75rem 0; display: inline-block; max-width: 100%; vertical-align: top; }
img { max-width: 100%; height: auto; background: #ffffff; border: 1px solid var(--line); border-radius: 6px;
  padding: 0.5rem; }
figcaption { font-size: 0.85rem; max-width: 42rem; }
@media print { nav { display: none; } section { break-inside: auto; } img { break-inside: avoid; } }
"""
