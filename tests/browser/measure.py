"""What a page looks like, in numbers: contrast, places, and whether everything can be read."""

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

# Letters of drawings are large enough and inside of it, nothing is written over something else, and
# a caret points at its token. What is scrolled out of sight counts as not there.
SMALLEST = 7.4
"""CSS pixels of the smallest letters of a drawing."""
_CROWDED = """smallest => {
    const found = [];
    const name = node => (node.className?.baseVal ?? node.className ?? '') || node.nodeName;
    const meet = (a, b) => Math.min(a.right, b.right) - Math.max(a.left, b.left) > 2
        && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 3;
    const seen = (node, box) => {
        let { left, right, top, bottom } = box;
        for (let up = node; up && !up.classList?.contains('kit-viz'); up = up.parentElement) {
            if (getComputedStyle(up).overflowX === 'visible') continue;
            const room = up.getBoundingClientRect();
            left = Math.max(left, room.left); right = Math.min(right, room.right);
            top = Math.max(top, room.top); bottom = Math.min(bottom, room.bottom);
        }
        return { left, right, top, bottom };
    };
    for (const [place, display] of document.querySelectorAll('.kit-viz').entries()) {
        const title = display.querySelector('.kv-title')?.textContent.slice(0, 30) ?? place;
        const say = words => found.push(`${title}: ${words}`);
        for (const svg of display.querySelectorAll('svg')) {
            const room = svg.getBoundingClientRect();
            if (!room.width || !svg.viewBox.baseVal?.width) continue;
            const scale = room.width / svg.viewBox.baseVal.width;
            const letters = [...svg.querySelectorAll('text')].filter(t => t.textContent.trim());
            const boxes = letters.map(text => text.getBoundingClientRect());
            letters.forEach((text, i) => {
                const size = scale * parseFloat(getComputedStyle(text).fontSize);
                const words = text.textContent.trim();
                if (size < smallest) say(`${words} is drawn ${size.toFixed(1)} pixels high`);
                if (boxes[i].left < room.left - 1 || boxes[i].right > room.right + 1)
                    say(`${words} reaches out of its drawing`);
                for (let j = i + 1; j < boxes.length; j++)
                    if (meet(boxes[i], boxes[j])) say(`${words} over ${letters[j].textContent}`);
            });
        }
        const walk = document.createTreeWalker(display, NodeFilter.SHOW_TEXT), texts = [];
        for (let text = walk.nextNode(); text; text = walk.nextNode()) {
            const node = text.parentElement;
            if (!text.data.trim() || node.closest('svg, style') || !node.getClientRects().length)
                continue;
            const range = document.createRange();
            range.selectNodeContents(text);
            for (const box of range.getClientRects())
                texts.push({ node, words: text.data.trim(), box: seen(node, box) });
        }
        const shown = texts.filter(({ box }) => box.right - box.left > 1);
        shown.sort((a, b) => a.box.top - b.box.top);
        shown.forEach(({ words, box, node }, i) => {
            for (let j = i + 1; j < shown.length && shown[j].box.top < box.bottom; j++)
                if (meet(box, shown[j].box)) say(`${words} and ${shown[j].words} overlap`);
            if (['hidden', 'clip'].includes(getComputedStyle(node).overflowX)
                    && node.scrollWidth > node.clientWidth + 1) say(`${words} is cut`);
        });
        for (const caret of display.querySelectorAll('i.w > b')) {
            const [own, at] = [caret, caret.parentElement].map(n => n.getBoundingClientRect());
            const middle = (own.left + own.right) / 2;
            if (own.width && (middle < at.left || middle > at.right || own.top < at.bottom - 8))
                say(`the caret is not under ${caret.parentElement.textContent}`);
        }
        for (const lines of display.querySelectorAll('pre.kv-context')) {
            const height = parseFloat(getComputedStyle(lines).lineHeight);
            const many = lines.textContent.replace(/^\\n/, '').split('\\n').length;
            if (lines.clientHeight > (many + 0.5) * height) say(`${name(lines)} is wrapped`);
        }
    }
    return [...new Set(found)].slice(0, 20);
}"""


def open_all(page: Page) -> None:
    """Unfold everything that is folded."""
    page.evaluate(OPEN_ALL)


def out_of_place(page: Page) -> list[str]:
    """What reaches beyond its output, in words; empty where nothing does."""
    found: list[str] = page.evaluate(_OUT_OF_PLACE, OUTPUTS)
    return found


def crowded(page: Page) -> list[str]:
    """What cannot be read for lack of room, in words; empty where all can."""
    found: list[str] = page.evaluate(_CROWDED, SMALLEST)
    return found


def too_faint(page: Page) -> dict[str, str]:
    """Text of displays with a contrast under 4.5:1, and its contrast."""
    found: dict[str, str] = page.evaluate(_CONTRAST)
    return found
