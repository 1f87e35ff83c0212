"""Style sheet of the reports: light and dark by the reader's preference, for wide and narrow screens and for paper."""

from __future__ import annotations

STYLE = """
:root{color-scheme:light dark;--paper:#fff;--ink:#1b1f24;--soft:#5f6872;--rule:#e0e4e8;--card:#f5f6f8;
--line:#2563c9;--good:#1a7f4b;--bad:#b3261e;--alarm:#fdf0ee;--track:#e0e4e8}
@media(prefers-color-scheme:dark){:root{--paper:#14171b;--ink:#e4e7eb;--soft:#9aa2ab;--rule:#2d3339;--card:#1c2126;
--line:#6ea8ff;--good:#57c58a;--bad:#ff8a80;--alarm:#33201e;--track:#343b43}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:15px/1.5 system-ui,sans-serif}
main{max-width:1160px;margin:0 auto;padding:28px 20px 60px;overflow-wrap:anywhere}
h1{font-size:24px;line-height:1.25;margin:0}h2{font-size:18px;line-height:1.3;margin:34px 0 8px}
h3{font-size:15px;margin:22px 0 6px}
p{margin:8px 0;max-width:80ch}small,.status,.note,figcaption{color:var(--soft);font-size:13px}
.status{margin:3px 0 0}.note{margin:4px 0 8px}
.warning,.fine{border-left:4px solid var(--bad);background:var(--alarm);border-radius:4px;padding:8px 12px}
.fine{border-color:var(--good);background:var(--card)}
.tiles{display:flex;flex-wrap:wrap;gap:10px;margin:18px 0}
.tiles>div{background:var(--card);border-radius:8px;padding:9px 14px;min-width:92px}
.tiles b{display:block;font-size:20px;line-height:1.3;font-variant-numeric:tabular-nums}
.tiles span{display:block;color:var(--soft);font-size:12.5px}.tiles small{display:block;font-size:12px}
.wide{overflow-x:auto;margin:8px 0}
table{border-collapse:collapse;font-size:14px}
th,td{overflow-wrap:break-word;padding:5px 14px 5px 0;text-align:left;vertical-align:top;
border-bottom:1px solid var(--rule)}
th{color:var(--soft);font-weight:500;font-size:13px;vertical-align:bottom}
.n{text-align:right;white-space:nowrap;font-variant-numeric:tabular-nums}
td:not(.n){min-width:7em}
ul{margin:8px 0;padding-left:20px}
details{margin:10px 0;border-top:1px solid var(--rule);padding-top:8px}
summary{cursor:pointer;color:var(--soft)}
pre{background:var(--card);padding:12px;border-radius:8px;white-space:pre-wrap;overflow-wrap:anywhere;font-size:12.5px}
figure{margin:0}img{display:block;max-width:100%;border-radius:6px}figcaption{margin-top:5px}
.gallery img{width:100%}figcaption p{margin:3px 0}figcaption b{color:var(--ink);font-weight:600}
.gallery{display:grid;grid-template-columns:repeat(auto-fill,minmax(190px,1fr));gap:18px;margin:10px 0}
.plots{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(310px,100%),1fr));gap:14px;margin:10px 0}
.plots figure{background:var(--card);border-radius:8px;padding:10px 12px 6px}
.plots figcaption{display:flex;justify-content:space-between;gap:10px;margin:0 0 2px;font-size:14px;color:var(--ink)}
svg{width:100%;height:auto;display:block;font:11.5px system-ui,sans-serif}
svg text{fill:var(--soft)}svg .axis{fill:none;stroke:var(--soft)}svg .grid{stroke:var(--rule)}
svg .line{fill:none;stroke:var(--line);stroke-width:1.8;stroke-linejoin:round}svg .dot{fill:var(--line)}
svg .hit{fill:transparent}svg .hit:hover{fill:var(--track);fill-opacity:.5}
svg .chance{stroke:var(--bad);stroke-dasharray:5 4;fill:none}svg text.chance{stroke:none;fill:var(--bad)}
svg .good{fill:var(--good)}svg .bad{fill:var(--bad)}
.good{color:var(--good)}.bad{color:var(--bad)}
.bar{display:grid;grid-template-columns:1fr auto;column-gap:10px;font-size:14px;line-height:1.35;margin:6px 0;
color:inherit}
.bar b{font-weight:500;font-variant-numeric:tabular-nums}
.bar>div{grid-column:1/3;height:6px;border-radius:3px;background:var(--track);overflow:hidden;margin-top:3px}
.bar>div>div{height:100%;border-radius:3px;background:var(--line)}
.bar.good>div>div{background:var(--good)}.bar.bad>div>div{background:var(--bad)}
@media(max-width:560px){main{padding:18px 14px 40px}h1{font-size:21px}.tiles{gap:8px}
.tiles>div{flex:1 1 42%}.gallery{grid-template-columns:repeat(2,1fr);gap:12px}}
@media print{details{display:block}figure,tr{break-inside:avoid}}
"""
