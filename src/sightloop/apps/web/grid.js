// A grid of images that renders only what is in view: 100,000 images are as quick as 100.
import { html, useCallback, useEffect, useLayoutEffect, useRef, useState } from "./html.js";
import { clock, lengthText, middle, thumb } from "./api.js";
import { go, lengthOf, opened, selected, toggleSelected } from "./state.js";
import { text } from "./strings.js";

const CELL = 176; // px, least width of a cell
const CAPTION = 44; // px below the image
const OVERSCAN = 3; // rows above and below the view

/** "0:42" of a video, "0:12 / 0:42" of a scene in it. */
function Badge({ row }) {
  const length = lengthOf(row);
  const times = [row.start === undefined ? "" : clock(row.start), length === undefined ? "" : lengthText(length)];
  return html`<span class="badge" aria-hidden="true">${times.filter(Boolean).join(" / ")}</span>`;
}

/** What a screen reader says of a cell. */
function nameOf(row) {
  const length = lengthOf(row);
  const parts = [row.path];
  if (row.video) parts.push(length === undefined ? text("video.name") : text("video.length", { length: lengthText(length) }));
  if (row.start !== undefined) parts.push(text("video.scene", { start: clock(row.start), end: clock(row.end) }));
  return [...parts, row.caption?.text ?? ""].join(". ");
}

/** rows: state.Rows or FixedRows; describe: row -> second line of a cell. */
export function Grid({ rows, describe, label }) {
  const box = useRef(null);
  const [view, setView] = useState({ width: 0, height: 0, top: 0 });
  const [active, setActive] = useState(rows.active ?? 0);
  const total = rows.total.value ?? 0;
  rows.changed.value; // a change draws the grid again
  const chosen = selected.value;

  const columns = Math.max(1, Math.floor(view.width / CELL));
  const size = view.width / columns;
  const rowHeight = Math.floor(size + CAPTION);
  const lines = Math.ceil(total / columns);
  const perPage = Math.max(1, Math.floor(view.height / rowHeight));
  const first = Math.max(0, Math.floor(view.top / rowHeight) - OVERSCAN);
  const last = Math.min(lines, Math.ceil((view.top + view.height) / rowHeight) + OVERSCAN);

  const measure = useCallback(() => {
    const at = box.current;
    if (at) setView({ width: at.clientWidth, height: at.clientHeight, top: at.scrollTop });
  }, []);

  useLayoutEffect(() => {
    measure();
    const observer = new ResizeObserver(measure);
    observer.observe(box.current);
    return () => observer.disconnect();
  }, [measure]);

  useEffect(() => {
    rows.at(0);
    setActive(rows.active ?? 0);
    if (box.current) box.current.scrollTop = rows.scrollTop ?? 0;
  }, [rows]);

  function open(index, row) {
    Object.assign(rows, { active: index, scrollTop: box.current.scrollTop }); // for the way back
    Object.assign(opened, { rows, index });
    go("image", row.id, row.start);
  }

  function show(index) {
    const top = Math.floor(index / columns) * rowHeight;
    const at = box.current;
    if (top < at.scrollTop) at.scrollTop = top;
    else if (top + rowHeight > at.scrollTop + at.clientHeight) at.scrollTop = top + rowHeight - at.clientHeight;
    setActive(index);
  }

  function onKey(event) {
    const steps = {
      ArrowRight: 1,
      ArrowLeft: -1,
      ArrowDown: columns,
      ArrowUp: -columns,
      PageDown: columns * perPage,
      PageUp: -columns * perPage,
      Home: -total,
      End: total,
    };
    const row = rows.at(active);
    if (event.key in steps) show(Math.min(total - 1, Math.max(0, active + steps[event.key])));
    else if (event.key === " " && row) toggleSelected(row.id);
    else if (event.key === "Enter" && row) open(active, row);
    else return;
    event.preventDefault();
  }

  if (rows.total.value === 0) return html`<p class="empty">${text("images.none")}</p>`;
  const cells = [];
  for (let index = first * columns; index < Math.min(total, last * columns); index++) {
    const row = rows.at(index);
    const left = (index % columns) * size;
    const top = Math.floor(index / columns) * rowHeight;
    const style = { transform: `translate(${left}px, ${top}px)`, width: `${size}px`, height: `${rowHeight}px` };
    const isChosen = row !== undefined && chosen.has(row.id);
    const source = row && thumb(row.id, 256, middle(row)); // its key: the image of before is gone at once
    cells.push(html`<div key=${index} id=${`cell-${index}`} role="option" style=${style}
      class=${`cell${index === active ? " active" : ""}${isChosen ? " chosen" : ""}`}
      aria-selected=${isChosen ? "true" : "false"} aria-posinset=${index + 1} aria-setsize=${total}
      aria-label=${row ? nameOf(row) : ""}
      onClick=${(event) => {
        if (!row) return;
        setActive(index);
        if (event.ctrlKey || event.metaKey || event.shiftKey) toggleSelected(row.id);
        else open(index, row);
      }}>
      ${row && html`<img key=${source} src=${source} alt="" loading="lazy" decoding="async" draggable=${false} />`}
      ${row?.video && html`<${Badge} row=${row} />`}
      <span class="line">${row ? describe(row) : ""}</span>
    </div>`);
  }
  return html`<div class="grid" ref=${box} role="listbox" aria-multiselectable="true" tabindex="0"
    aria-label=${label ?? text("images.grid")} aria-activedescendant=${`cell-${active}`}
    onScroll=${measure} onKeyDown=${onKey}>
    <div class="grid-space" style=${{ height: `${lines * rowHeight}px` }}>${cells}</div>
  </div>`;
}
