"""The look of the report, light and dark."""

STYLE = """
:root {
  color-scheme: light dark;
  --paper: #fbfaf7; --card: #ffffff; --ink: #1d2129; --soft: #666d7a; --line: #e4e1da;
  --accent: #2f6fdd; --good: #1d8a5f; --bad: #d6453d; --quiet: #9aa2b1;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14161b; --card: #1c1f26; --ink: #e8eaee; --soft: #9ba3b2; --line: #2d323c;
    --accent: #6ea3ff; --good: #4cc796; --bad: #ff7168; --quiet: #6b7382;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif;
}
main { max-width: 920px; margin: 0 auto; padding: 40px 20px 64px; }
h1 { font-size: clamp(1.7rem, 5vw, 2.5rem); line-height: 1.15; margin: 0 0 8px; letter-spacing: -0.02em; }
h2 { font-size: 1.15rem; margin: 0 0 6px; }
header p { margin: 0; color: var(--soft); font-size: 1.08rem; }
section {
  background: var(--card); border: 1px solid var(--line); border-radius: 14px;
  padding: 22px 24px; margin-top: 20px;
}
.note { margin: 0 0 16px; color: var(--soft); font-size: 0.93rem; max-width: 75ch; }
.tiles { display: grid; grid-template-columns: repeat(4, 1fr); gap: 12px; margin-top: 24px; }
.tile { background: var(--card); border: 1px solid var(--line); border-radius: 14px; padding: 16px; }
.tile b { display: block; font-size: 1.6rem; line-height: 1.2; font-variant-numeric: tabular-nums; }
.tile span { color: var(--soft); font-size: 0.85rem; line-height: 1.35; display: block; margin-top: 4px; }
.tile.recognised b { color: var(--good); }
figure { margin: 0; min-width: 0; }
figcaption { color: var(--soft); font-size: 0.85rem; margin: 0 0 6px 22px; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 28px; }
.row { display: grid; grid-template-columns: 18px repeat(10, 1fr); gap: 3px; margin-bottom: 3px; align-items: center; }
.row span { color: var(--soft); font-size: 0.8rem; font-variant-numeric: tabular-nums; }
img { display: block; width: 100%; aspect-ratio: 1; border-radius: 3px; image-rendering: pixelated; background: #000; }
img.wrong { outline: 2px solid var(--bad); outline-offset: -1px; }
.strip { overflow-x: auto; }
.strip .row { grid-template-columns: 68px repeat(auto-fit, minmax(34px, 1fr)); grid-auto-flow: column; grid-auto-columns: minmax(34px, 1fr); grid-template-columns: 68px; }
.strip .head span:not(:first-child) { text-align: center; }
.strip .denoised { margin-bottom: 12px; }
svg { display: block; width: 100%; height: auto; }
svg .grid { stroke: var(--line); }
svg .curve { fill: none; stroke: var(--accent); stroke-width: 2.5; stroke-linejoin: round; }
svg .end { fill: var(--accent); }
svg text { font-size: 13px; fill: var(--soft); }
svg .value { fill: var(--ink); font-weight: 600; }
svg .floor { fill: var(--quiet); } svg .samples { fill: var(--good); } svg .ceiling { fill: var(--bad); opacity: 0.75; }
table { border-collapse: collapse; width: 100%; font-size: 0.93rem; }
th { text-align: left; font-weight: 500; color: var(--soft); padding: 6px 16px 6px 0; white-space: nowrap; vertical-align: top; }
td { padding: 6px 0; font-variant-numeric: tabular-nums; }
tr + tr { border-top: 1px solid var(--line); }
pre {
  margin: 4px 0 14px; padding: 10px 14px; background: var(--paper); border: 1px solid var(--line);
  border-radius: 8px; overflow-x: auto; font: 0.85rem/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace;
}
section p { margin: 0; }
@media (max-width: 720px) {
  .tiles { grid-template-columns: 1fr 1fr; }
  .pair { grid-template-columns: 1fr; gap: 18px; }
  section { padding: 18px 16px; }
  svg text { font-size: 18px; }
}
"""
