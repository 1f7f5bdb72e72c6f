"""Colours and the style sheet of every display.

Bars and curves use the Okabe-Ito palette, which people with any common colour vision can tell
apart; where a colour means something, a sign, a word or a shape says the same. Words are always in
the plain foreground colour or in `muted`, both at 4.5:1 or better on every background here.

The surrounding page decides between light and dark: JupyterLab and nbconvert through
`data-jp-theme-light`, VS Code through its body class, any other page through the reader's system
setting. A display paints its own background, so it stays legible on a page it knows nothing about.
"""

from __future__ import annotations

_COLOURS = {
    "fg": ("#1f2328", "#e6e9ed"),
    "bg": ("#ffffff", "#14171b"),
    "muted": ("#575e67", "#a3abb5"),
    "line": ("#d0d7de", "#3d444d"),
    "soft": ("#f3f5f8", "#1f242b"),
    "good": ("#009e73", "#2bc79a"),
    "warn": ("#e69f00", "#f0b429"),
    "bad": ("#d55e00", "#f0803c"),
    "up": ("#0072b2", "#56b4e9"),
    "down": ("#d55e00", "#f0803c"),
    "track": ("#e4e8ed", "#2c323a"),
    "shade": ("#aab2bb", "#5a626c"),
    "curve": ("#0072b2", "#56b4e9"),
    "point": ("#d55e00", "#f0803c"),
    "p1": ("#fdf0d3", "#33290f"),
    "p2": ("#fbe0a3", "#4c3a0c"),
    "p3": ("#f3c155", "#664b05"),
    "p4": ("#e69f00", "#855f00"),
    "u1": ("#e3f0fa", "#12283a"),
    "u2": ("#b9dbf3", "#143f5f"),
    "u3": ("#7fbde6", "#0f5a8c"),
    "d1": ("#fdece0", "#36200f"),
    "d2": ("#fbcfae", "#5a3009"),
    "d3": ("#f5a26b", "#8a4306"),
    "s1": ("#0072b2", "#56b4e9"),
    "s2": ("#d55e00", "#f0803c"),
    "s3": ("#00805e", "#2bc79a"),
    "s4": ("#a8437e", "#e08fc0"),
    "s5": ("#8a6a00", "#e8cf4a"),
    "s6": ("#5b5fc7", "#a5a9f5"),
    "s7": ("#575e67", "#c3cad2"),
}
"""By name: on a light page, on a dark one."""
LIGHT = {name: light for name, (light, _) in _COLOURS.items()}
DARK = {name: dark for name, (_, dark) in _COLOURS.items()}
PHASES = ("#0072b2", "#e69f00", "#009e73", "#999999")
"""Generate, train, hand over, everything else: told apart by their order and their words too."""


# Only these follow the notebook's own theme; the rest is made to go with either.
_FROM_NOTEBOOK = {
    "fg": "--jp-content-font-color1",
    "bg": "--jp-layout-color0",
    "line": "--jp-border-color2",
}
_RULES = """
@ {background:var(--kv-bg);color:var(--kv-fg);padding:10px 12px;max-width:1100px;
 font-family:var(--jp-content-font-family,system-ui,-apple-system,"Segoe UI",sans-serif);
 font-size:var(--jp-content-font-size1,14px);line-height:1.45;print-color-adjust:exact;
 -webkit-print-color-adjust:exact;color-scheme:inherit;overflow-wrap:break-word}
@ .kv-title{font-weight:600;font-size:1.08em;margin:0 0 4px}
@ .kv-muted{color:var(--kv-muted)}
@ .kv-note{color:var(--kv-muted);margin:6px 0 0;font-size:.93em}
@ .kv-facts{display:flex;flex-wrap:wrap;gap:4px 22px;margin:4px 0 8px}
@ .kv-fact{display:flex;flex-direction:column;max-width:100%}
@ .kv-fact b{font-size:1.15em;font-weight:600;font-variant-numeric:tabular-nums}
@ .kv-fact span{color:var(--kv-muted);font-size:.86em}
@ table.kv-table{border-collapse:collapse;width:100%;margin:6px 0;font-size:1em;
 table-layout:auto;color:inherit;border:0}
@ table.kv-table th,@ table.kv-table td{text-align:left;vertical-align:top;padding:4px 10px 4px 0;
 border:0;border-bottom:1px solid var(--kv-line);background:none;color:inherit;max-width:none;
 white-space:normal}
@ table.kv-table tr,@ table.kv-table tr:hover,@ table.kv-table tr:nth-child(even){background:none}
@ table.kv-table thead th{color:var(--kv-muted);font-weight:500;font-size:.88em;
 white-space:nowrap}
@ table.kv-table tbody th{font-weight:500}
@ table.kv-table thead .kv-words{min-width:7em}@ table.kv-table thead .kv-hint{min-width:15em}
@ .kv-wide,@ .kv-drawing{overflow-x:auto;background:
 linear-gradient(to right,var(--kv-bg) 40%,transparent) 0 0/26px 100%,
 linear-gradient(to left,var(--kv-bg) 40%,transparent) 100% 0/26px 100%,
 linear-gradient(to right,var(--kv-shade),transparent) 0 0/9px 100%,
 linear-gradient(to left,var(--kv-shade),transparent) 100% 0/9px 100%;
 background-repeat:no-repeat;background-attachment:local,local,scroll,scroll}
@ .kv-inner{overflow-x:auto}@ .kv-line{white-space:nowrap}
@ .kv-group>.kv-wide,.kit-viz.kit-viz>.kv-wide{container-type:inline-size}
@ table.kv-table .kv-num{text-align:right;width:1%;padding-left:10px;padding-right:16px;
 font-variant-numeric:tabular-nums;white-space:nowrap}
@ table.kv-table .kv-fit,@ table.kv-table .kv-name{width:1%;white-space:nowrap}
@ table.kv-table .kv-mid{min-width:10em}
@ .kv-text{font-family:var(--jp-code-font-family,ui-monospace,Menlo,Consolas,monospace);
 font-size:.92em;white-space:pre-wrap;overflow-wrap:anywhere;unicode-bidi:isolate;
 overflow-y:clip;color:inherit;background:none}
@ .kv-prompt{border-left:3px solid var(--kv-line);padding:1px 0 1px 9px;margin:3px 0 5px}
@ .kv-role{color:var(--kv-muted);font-size:.84em;display:block}
@ .kv-group{margin:12px 0 0;break-inside:avoid-page}
@ .kv-head{display:flex;flex-wrap:wrap;gap:2px 14px;align-items:baseline}
@ details{margin:4px 0}
@ td details{margin:0}
@ td .kv-prompt{margin:0 0 3px}@ td .kv-note{overflow-wrap:anywhere}
@ td.kv-fit .kv-text,@ td.kv-name .kv-text{white-space:nowrap;overflow-wrap:normal}
@ details>summary{cursor:pointer;display:list-item}
@ summary:focus-visible{outline:2px solid var(--kv-curve);outline-offset:2px}
@ td summary:focus-visible{outline-offset:-2px}
@ .kv-badge{display:inline-block;border:1px solid var(--kv-muted);border-left-width:5px;
 border-radius:4px;padding:0 8px;margin:2px 0;font-weight:600;max-width:100%;
 box-sizing:border-box}
@ .kv-good{border-color:var(--kv-good)}@ .kv-warn{border-color:var(--kv-warn)}
@ .kv-bad{border-color:var(--kv-bad)}
@ .kv-tag{display:inline-block;background:var(--kv-soft);border:1px solid var(--kv-line);
 border-radius:4px;padding:0 7px;font-size:.88em;max-width:100%;box-sizing:border-box}
@ .kv-value{display:inline-block;min-width:3.2em}
@ .kv-bar{display:inline-block;position:relative;width:64px;height:9px;background:var(--kv-track);
 border-radius:2px;vertical-align:middle;overflow:hidden;margin-left:8px}
@ .kv-bar i{position:absolute;top:0;bottom:0;background:var(--kv-up)}
@ .kv-bar i.kv-minus{background:var(--kv-down)}
@ .kv-bar u{position:absolute;top:0;bottom:0;left:50%;width:1px;background:var(--kv-muted)}
@ .kv-strip{margin:6px 0 17px;line-height:2.3;overflow-wrap:anywhere}
@ .kv-strip i,@ .kv-legend i{font-style:normal;line-height:1.4;display:inline-block;
 font-family:var(--jp-code-font-family,ui-monospace,Menlo,Consolas,monospace);font-size:.92em;
 padding:0 3px;margin:0 2px 0 0;max-width:100%;min-height:1.4em;box-sizing:border-box;
 border:1px solid var(--kv-line);border-radius:3px;white-space:pre-wrap;overflow-wrap:anywhere;
 unicode-bidi:isolate;color:var(--kv-fg)}
@ i.p1{background:var(--kv-p1)}
@ i.p2{background:var(--kv-p2);border-bottom-width:2px}
@ i.p3{background:var(--kv-p3);border-bottom-width:3px}
@ i.p4{background:var(--kv-p4);border-bottom:4px double var(--kv-fg)}
@ i.u1{background:var(--kv-u1);border-top:2px solid var(--kv-up)}
@ i.u2{background:var(--kv-u2);border-top:3px solid var(--kv-up)}
@ i.u3{background:var(--kv-u3);border-top:4px double var(--kv-fg)}
@ i.d1{background:var(--kv-d1);border-bottom:2px solid var(--kv-down)}
@ i.d2{background:var(--kv-d2);border-bottom:3px solid var(--kv-down)}
@ i.d3{background:var(--kv-d3);border-bottom:4px double var(--kv-fg)}
@ .kv-strip .kv-layer{display:inline-block;min-width:5em;color:var(--kv-muted)}
@ .kv-strip i.kv-none{border-color:transparent;color:inherit}
@ i.q{border-style:dotted;border-color:var(--kv-fg)}
@ i.m{border-style:dashed;border-color:var(--kv-muted);text-decoration:line-through}
@ .kv-strip i.w{position:relative;outline:2px solid var(--kv-fg);outline-offset:1px;
 margin-bottom:1em}
@ .kv-strip i.w b{position:absolute;left:0;right:0;top:100%;text-align:center;line-height:1;
 padding-top:7px;font-size:1.15em}
@ table.kv-grid{border-collapse:collapse;font-size:.86em;border:0}
@ table.kv-grid th,@ table.kv-grid td{padding:2px 8px 2px 0;border:0;text-align:left;
 border-bottom:1px solid var(--kv-line);background:none;color:inherit;white-space:nowrap}
@ table.kv-grid td{font-variant-numeric:tabular-nums}
@ table.kv-grid th{color:var(--kv-muted);font-weight:500}
@ .kv-legend{display:flex;flex-wrap:wrap;gap:4px 14px;margin:3px 0 5px;font-size:.88em;
 color:var(--kv-fg);align-items:baseline}
@ .kv-stack{display:flex;height:16px;border-radius:3px;overflow:hidden;margin:6px 0;
 background:var(--kv-track)}
@ .kv-stack i{display:block;height:100%;border-right:2px solid var(--kv-bg);box-sizing:border-box}
@ .kv-dot{display:inline-block;width:10px;height:10px;border-radius:2px;margin-right:5px}
@ .kv-progress{height:10px;border-radius:3px;overflow:hidden;margin:6px 0;
 background:var(--kv-track)}
@ .kv-progress i{display:block;height:100%;background:var(--kv-up)}
@ .kv-panels{display:grid;gap:10px 22px;margin:8px 0;
 grid-template-columns:repeat(auto-fill,minmax(max(min(100%,16em),30%),1fr))}
@ .kv-section{margin:12px 0 0}@ .kv-title.kv-section{margin:20px 0 2px}
@ .kv-panel{break-inside:avoid}
@ .kv-panel svg{width:100%}
@ .kv-panel-head{display:flex;justify-content:space-between;gap:8px}
@ .kv-panel-head b{font-variant-numeric:tabular-nums}
@ .kv-panel-empty{color:var(--kv-muted);text-align:center;padding:1.6em 0}
@ .kv-bands{display:grid;gap:14px 22px;margin:10px 0;
 grid-template-columns:repeat(auto-fill,minmax(min(100%,28em),1fr))}
@ .kv-pen{display:inline-block;width:36px;vertical-align:middle}
@ table.kv-table .kv-side{min-width:8em;white-space:normal}
@ .kv-two{display:grid;gap:6px 18px;margin:12px 0 6px;
 grid-template-columns:repeat(auto-fill,minmax(max(min(100%,17em),40%),1fr))}
@ .kv-caption{color:var(--kv-muted);margin-top:12px}
@ .kv-drawing{display:block}@ .kv-unstyled{display:none}
@ svg{max-width:100%;height:auto;display:block;stroke-linejoin:round}
@ svg text{font-family:inherit!important}
@ pre.kv-text{margin:4px 0;padding:0;border:0;line-height:1.4}@ td>pre.kv-text{margin:0}
@ pre.kv-context{white-space:pre;overflow-wrap:normal}
@ td .kv-note,@ td pre.kv-text{overflow-wrap:anywhere}@ td pre.kv-context{overflow-wrap:normal}
@ ul{margin:4px 0 4px 1.2em;padding:0}
@container (max-width:30em){@ .kv-bar{width:34px;margin-left:4px}@ .kv-value{min-width:2.2em}
@ table.kv-table .kv-num{padding-left:4px;padding-right:8px}
@ table.kv-table thead .kv-words{min-width:6em}@ table.kv-table thead .kv-name{min-width:9em}
@ table.kv-table tbody .kv-name,@ table.kv-table .kv-name .kv-text{white-space:normal;
 overflow-wrap:anywhere}}
"""


def _variables(palette: dict[str, str], follow_notebook: bool = True) -> str:
    def value(name: str, colour: str) -> str:
        source = _FROM_NOTEBOOK.get(name) if follow_notebook else None
        return f"var({source},{colour})" if source else colour

    return ";".join(f"--kv-{name}:{value(name, colour)}" for name, colour in palette.items())


def style_sheet() -> str:
    """The CSS of one display, every rule bound to `.kit-viz`.

    The class is written twice in each rule: it then outranks what JupyterLab and nbconvert say
    about tables in outputs.
    """
    light, dark = _variables(LIGHT), _variables(DARK)
    rules = _RULES.replace("@ ", ".kit-viz.kit-viz ").replace(".kit-viz.kit-viz {", ".kit-viz{")
    return (
        f".kit-viz{{{light}}}"
        "@media screen and (prefers-color-scheme:dark){"
        f"body:not([data-jp-theme-light]):not(.vscode-light) .kit-viz{{{dark}}}}}"
        f'[data-jp-theme-light="false"] .kit-viz,body.vscode-dark .kit-viz{{{dark}}}'
        f"{rules}"
        f"@media print{{body .kit-viz.kit-viz{{{_variables(LIGHT, False)}}}}}"
    ).replace("\n", "")
