"""What a page looks like, in numbers: contrast, and whether everything stays in its place."""

from __future__ import annotations

from playwright.sync_api import Page

OUTPUTS = ".jp-OutputArea-output"
"""Where a cell's output is, in JupyterLab as in pages that nbconvert makes of notebooks."""

OPEN_ALL = "() => document.querySelectorAll('.kit-viz details').forEach(d => { d.open = true; })"

# Everything an output draws lies in the output's own rectangle, or is clipped on the way there.
_OUT_OF_PLACE = """selector => {
    const found = [];
    const clips = new Set(['auto', 'scroll', 'hidden', 'clip']);
    const name = node => (node.className?.baseVal ?? node.className ?? '') || node.nodeName;
    for (const [place, output] of document.querySelectorAll(selector).entries()) {
        const say = words => found.push(`output ${place}: ${words}`);
        if (output.scrollWidth > output.clientWidth + 1)
            say(`${output.scrollWidth} pixels wide, and has room for ${output.clientWidth}`);
        const room = output.getBoundingClientRect();
        const clipped = node => {
            for (let up = node.parentElement; up && up !== output; up = up.parentElement)
                if (clips.has(getComputedStyle(up).overflowX)) return true;
            return false;
        };
        const walk = document.createTreeWalker(output, NodeFilter.SHOW_ELEMENT);
        for (let node = walk.nextNode(); node; node = walk.nextNode()) {
            const style = getComputedStyle(node);
            if (style.position === 'fixed' || style.position === 'sticky')
                say(`${name(node)} is ${style.position}`);
            if (node.closest('svg') && node.nodeName !== 'svg') continue;
            for (const box of node.getClientRects())
                if (box.width && box.height && !clipped(node) && (
                    box.left < room.left - 1 || box.right > room.right + 1
                    || box.top < room.top - 1 || box.bottom > room.bottom + 1))
                    { say(`${name(node)} lies outside`); break; }
        }
    }
    if (document.scrollingElement.scrollWidth > window.innerWidth + 1)
        found.push('the page can be scrolled sideways');
    return [...new Set(found)].slice(0, 20);
}"""

# WCAG 2: relative luminance of the colour of each piece of text against what is painted behind it.
_CONTRAST = """() => {
    const parse = words => {
        const n = words.match(/[\\d.]+/g)?.map(Number) ?? [0, 0, 0, 0];
        if (words.startsWith('color(srgb')) n.splice(0, 3, ...n.slice(0, 3).map(x => 255 * x));
        return n.length < 4 ? [...n, 1] : n;
    };
    const over = (top, below) => top.slice(0, 3).map(
        (c, i) => c * top[3] + below[i] * (1 - top[3])).concat(1);
    const light = c => {
        const [r, g, b] = c.map(x => x / 255).map(
            x => x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const behind = node => {
        const layers = [];
        for (let up = node; up; up = up.parentElement)
            layers.push(parse(getComputedStyle(up).backgroundColor));
        return layers.reverse().reduce((below, top) => over(top, below), [255, 255, 255, 1]);
    };
    const found = new Map();
    for (const display of document.querySelectorAll('.kit-viz')) {
        const walk = document.createTreeWalker(display, NodeFilter.SHOW_TEXT);
        for (let text = walk.nextNode(); text; text = walk.nextNode()) {
            const node = text.parentElement;
            if (!text.data.trim() || node.nodeName === 'STYLE' || !node.getClientRects().length)
                continue;
            const style = getComputedStyle(node);
            const back = behind(node);
            const ink = parse(node.closest('svg') ? style.fill : style.color);
            ink[3] *= Number(style.opacity);
            const [dark, bright] = [over(ink, back), back].map(light).sort((a, b) => a - b);
            const ratio = (bright + 0.05) / (dark + 0.05);
            const words = `${node.className.baseVal ?? node.className} ${text.data.trim()}`;
            if (ratio < 4.5) found.set(words.slice(0, 60), ratio.toFixed(2));
        }
    }
    return Object.fromEntries(found);
}"""


def open_all(page: Page) -> None:
    """Unfold everything that is folded."""
    page.evaluate(OPEN_ALL)


def out_of_place(page: Page) -> list[str]:
    """What reaches beyond its output, in words; empty where nothing does."""
    found: list[str] = page.evaluate(_OUT_OF_PLACE, OUTPUTS)
    return found


def too_faint(page: Page) -> dict[str, str]:
    """Text of displays with a contrast under 4.5:1, and its contrast."""
    found: dict[str, str] = page.evaluate(_CONTRAST)
    return found
