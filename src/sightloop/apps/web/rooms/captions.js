// Captions: proposed, edited and on-disk text apart; review by keyboard; find and replace with preview and undo.
import { html, useCallback, useEffect, useLayoutEffect, useMemo, useRef, useState } from "../html.js";
import { call, get, post, thumb } from "../api.js";
import { canEdit, filters, info, isTyping, modelsFor, Rows, say, startJob, version } from "../state.js";
import { text } from "../strings.js";
import { ListFilter } from "./library.js";
import { ActiveJobs, watchJob } from "./jobs.js";

const LINE = 84; // px, height of a list entry
const OVERSCAN = 6;
const STATES = ["all", "open", "accepted", "rejected", "captioned", "uncaptioned"];
const unsaved = new Map(); // id -> text that was typed and not saved; kept while one moves about

function List({ rows, active, onPick }) {
  const box = useRef(null);
  const [view, setView] = useState({ top: 0, height: 0 });
  const total = rows.total.value ?? 0;
  rows.changed.value;
  const measure = useCallback(() => {
    if (box.current) setView({ top: box.current.scrollTop, height: box.current.clientHeight });
  }, []);
  useEffect(() => {
    measure();
    const observer = new ResizeObserver(measure);
    observer.observe(box.current);
    return () => observer.disconnect();
  }, []);
  useEffect(() => {
    const at = box.current;
    if (active * LINE < at.scrollTop) at.scrollTop = active * LINE;
    else if ((active + 1) * LINE > at.scrollTop + at.clientHeight) at.scrollTop = (active + 1) * LINE - at.clientHeight;
  }, [active]);
  function onKey(event) {
    const page = Math.max(1, Math.floor(view.height / LINE));
    const steps = { ArrowDown: 1, ArrowUp: -1, PageDown: page, PageUp: -page, Home: -total, End: total };
    if (!(event.key in steps)) return;
    onPick(Math.min(total - 1, Math.max(0, active + steps[event.key])));
    event.preventDefault();
  }
  const first = Math.max(0, Math.floor(view.top / LINE) - OVERSCAN);
  const last = Math.min(total, Math.ceil((view.top + view.height) / LINE) + OVERSCAN);
  const lines = [];
  for (let index = first; index < last; index++) {
    const row = rows.at(index);
    lines.push(html`<div key=${index} id=${`line-${index}`} role="option" class=${`entry${index === active ? " active" : ""}`}
      aria-selected=${index === active ? "true" : "false"} aria-posinset=${index + 1} aria-setsize=${total}
      style=${{ transform: `translateY(${index * LINE}px)`, height: `${LINE}px` }} onClick=${() => onPick(index)}>
      ${row && html`<img src=${thumb(row.id, 96)} alt="" loading="lazy" />
        <span class="texts"><span class="path">${row.path}</span>
          <span class=${row.caption.text === null ? "absent" : ""}>${unsaved.get(row.id) ?? row.caption.text ?? text("caption.none")}</span>
          ${row.rejected && html`<span class="tag failed">${text("caption.isrejected")}</span>`}
          ${row.state === "open" && html`<span class="proposed">${row.proposal.text}</span>`}</span>
        <${Fit} value=${row.fit} />`}
    </div>`);
  }
  return html`<div class="list" role="listbox" tabindex="0" ref=${box} aria-label=${text("caption.list")}
    aria-activedescendant=${`line-${active}`} onScroll=${measure} onKeyDown=${onKey}>
    <div class="list-space" style=${{ height: `${total * LINE}px` }}>${lines}</div></div>`;
}

function Fit({ value }) {
  if (value === null || value === undefined) return html`<span class="fit none">${text("caption.fit.none")}</span>`;
  const level = value < 0.2 ? "low" : value < 0.6 ? "middle" : "high";
  return html`<span class=${`fit ${level}`}>${text("caption.fit", { fit: value.toFixed(2) })}</span>`;
}

function Editor({ row, rows, onNext, onStep }) {
  const [typed, setTyped] = useState(unsaved.get(row.id) ?? row.caption.text ?? "");
  const [error, setError] = useState("");
  const [history, setHistory] = useState(null);
  const area = useRef(null);

  function type(value) {
    setTyped(value);
    if (value === (row.caption.text ?? "")) unsaved.delete(row.id);
    else unsaved.set(row.id, value);
  }

  async function put(value, origin, words) {
    setError("");
    try {
      const answer = await call("PUT", `api/images/${row.id}/caption`, { text: value, origin }, { "If-Match": `"${row.caption.etag}"` });
      unsaved.delete(row.id);
      rows.update(row.id, { caption: answer.caption, state: answer.state, rejected: false, fit: null });
      setTyped(answer.caption.text ?? "");
      setHistory(null);
      say(words);
      return true;
    } catch (problem) {
      if (problem.status === 412) {
        const current = problem.body.current;
        rows.update(row.id, { caption: current, rejected: false, fit: null });
        if (value !== null) unsaved.set(row.id, value);
        setError(text("caption.conflict", { text: current.text ?? text("caption.none") }));
      } else setError(problem.message);
      return false;
    }
  }

  const save = () => put(typed, "typed", text("caption.saved"));
  const accept = async () => row.proposal && (await put(row.proposal.text, "accepted", text("caption.accepted"))) && onNext();
  /** Rejects the open proposal; without one, the caption on disk, or takes that back. */
  async function reject() {
    const isProposal = row.state === "open";
    if (!isProposal && row.caption.text === null) return;
    setError("");
    try {
      const rejected = !row.rejected;
      const answer = await post(`api/images/${row.id}/reject`, isProposal ? {} : { caption: row.caption.etag, rejected });
      rows.update(row.id, answer);
      say(text(isProposal || rejected ? "caption.rejected" : "caption.readmitted"));
      if (isProposal) onNext();
      else if (rejected) onStep(1);
    } catch (problem) {
      if (problem.status === 412) rows.update(row.id, { caption: problem.body.current, rejected: false, fit: null });
      setError(problem.message);
    }
  }
  async function undo() {
    const details = await get(`api/images/${row.id}/info`);
    const last = details.history.at(-1);
    if (!last || last.after !== row.caption.text) return say(text("caption.nothingtoundo"));
    await put(last.before, "undone", text("caption.undone"));
  }

  // Before the next key can come: a late listener would act on the image that was shown before.
  useLayoutEffect(() => {
    function onKey(event) {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && event.target === area.current) {
        save();
        event.target.blur();
        event.preventDefault();
      }
      if (isTyping(event)) return;
      const moves = { n: onNext, j: () => onStep(1), k: () => onStep(-1) };
      const acts = { a: accept, r: reject, u: undo, e: () => area.current.focus() };
      if (!(event.key in acts || event.key in moves)) return;
      event.preventDefault();
      if (event.key in moves) moves[event.key]();
      else if (canEdit.value) acts[event.key]();
    }
    addEventListener("keydown", onKey);
    return () => removeEventListener("keydown", onKey);
  });

  const words = typed.split(/\s+/).filter(Boolean).length;
  const isOpen = row.state === "open";
  const isChanged = typed !== (row.caption.text ?? "");
  return html`<article class="editor" aria-label=${row.path}>
    <div class="look">
      <a href=${`#/image/${row.id}`}><img class="large" src=${thumb(row.id, 640)} alt=${row.caption.text ?? row.path} /></a>
      <div><h2>${row.path}</h2>
        <dl>
          <dt>${text("caption.disk")} <${Fit} value=${row.fit} />
            ${row.rejected && html` <span class="tag failed">${text("caption.isrejected")}</span>`}</dt>
          <dd class="disk">${row.caption.text ?? html`<em>${text("caption.none")}</em>`}</dd>
          <dt>${row.proposal ? text("caption.proposed", { model: row.proposal.model }) : text("caption.noproposal")}
            ${row.proposal && html` <span class="tag">${text(`state.${row.state}`)}</span>`}</dt>
          ${row.proposal && html`<dd class="proposed">${row.proposal.text}</dd>`}
        </dl></div></div>
    ${canEdit.value && html`<p class="buttons">
      ${isOpen && html`<button class="primary" onClick=${accept}>${text("caption.accept")} <kbd>a</kbd></button>`}
      ${(isOpen || row.caption.text !== null) && html`<button onClick=${reject}>
        ${text(isOpen ? "caption.reject" : row.rejected ? "caption.readmit" : "caption.refuse")} <kbd>r</kbd></button>`}
      <button onClick=${undo}>${text("caption.undo")} <kbd>u</kbd></button></p>`}
    <label><span>${text("caption.edit")} <kbd>e</kbd></span>
      <textarea ref=${area} rows="3" value=${typed} readonly=${!canEdit.value} onInput=${(event) => type(event.target.value)} /></label>
    <p class="buttons">
      ${canEdit.value && html`<button class=${isChanged ? "primary" : ""} onClick=${save} disabled=${!isChanged}>${text("caption.save")} <kbd>Ctrl+Enter</kbd></button>
      <button onClick=${() => type(row.caption.text ?? "")} disabled=${!isChanged}>${text("caption.cancel")}</button>`}
      <button onClick=${() => onStep(-1)}>${text("caption.previous")} <kbd>k</kbd></button>
      <button onClick=${() => onStep(1)}>${text("caption.following")} <kbd>j</kbd></button>
      <button onClick=${onNext}>${text("caption.next")} <kbd>n</kbd></button>
      <span class="note">${text("caption.length", { words, letters: typed.length })}</span></p>
    <p class="error" role="alert">${error}</p>
    <details onToggle=${async (event) => {
      if (event.target.open) setHistory((await get(`api/images/${row.id}/info`)).history);
    }}><summary>${text("caption.history")}</summary>
      <ol>${(history ?? []).map((edit) => html`<li><time>${new Date(1000 * edit.time).toLocaleString()}</time> ${edit.origin}:
        <del>${edit.before ?? ""}</del> <ins>${edit.after ?? ""}</ins></li>`)}</ol></details>
  </article>`;
}

function Replace({ onDone }) {
  const [form, setForm] = useState({ find: "", replace: "", whole_words: false, ignore_case: false });
  const [changes, setChanges] = useState(null);
  const [done, setDone] = useState(null);
  const [note, setNote] = useState("");
  const set = (fields) => {
    setForm({ ...form, ...fields });
    setChanges(null);
  };
  const { text: words, not, state } = filters.value;
  const filter = { text: words, not, state: state === "all" ? "" : state };
  async function preview(event) {
    event.preventDefault();
    setDone(null);
    try {
      setChanges(await post("api/captions/replace", { ...form, filter, preview: true }));
      setNote("");
    } catch (problem) {
      setNote(problem.message);
    }
  }
  async function apply() {
    const expect = Object.fromEntries(changes.changes.map((change) => [change.id, change.etag]));
    const answer = await post("api/captions/replace", { ...form, filter, preview: false, expect });
    setDone(answer);
    setChanges(null);
    setNote(text("replace.done", { n: answer.changed, conflicts: answer.conflicts.length }));
    onDone();
  }
  async function undo() {
    const answer = await post("api/captions/undo", { batch: done.batch });
    setDone(null);
    setNote(text("replace.undone", { n: answer.undone, changed: answer.changed_since.length }));
    onDone();
  }
  return html`<details class="replace"><summary>${text("replace.title")}</summary>
    <form onSubmit=${preview}>
      <label>${text("replace.find")}<input required value=${form.find} onInput=${(event) => set({ find: event.target.value })} /></label>
      <label>${text("replace.with")}<input value=${form.replace} onInput=${(event) => set({ replace: event.target.value })} /></label>
      <label class="check"><input type="checkbox" checked=${form.whole_words} onChange=${(event) => set({ whole_words: event.target.checked })} />${text("replace.words")}</label>
      <label class="check"><input type="checkbox" checked=${form.ignore_case} onChange=${(event) => set({ ignore_case: event.target.checked })} />${text("replace.case")}</label>
      <button>${text("replace.preview")}</button>
      ${changes?.total > 0 && html`<button type="button" class="primary" onClick=${apply}>${text("replace.apply", { n: changes.total })}</button>`}
      ${done && html`<button type="button" onClick=${undo}>${text("replace.undo")}</button>`}
    </form>
    <p role="status">${note}${changes?.total === 0 ? text("replace.none") : ""}</p>
    ${changes?.total > 0 && html`<div class="scroll" tabindex="0" role="region" aria-label=${text("replace.preview")}><table>
      <thead><tr><th>${text("room.image")}</th><th>${text("replace.before")}</th><th>${text("replace.after")}</th></tr></thead>
      <tbody>${changes.changes.map((change) => html`<tr key=${change.id}><td>${change.path}</td><td>${change.before}</td><td>${change.after}</td></tr>`)}</tbody>
    </table></div>`}
  </details>`;
}

/** Buttons that start the jobs of this room, with a model that can; what runs is shown beside them. */
function Work() {
  const [error, setError] = useState("");
  const [chosen, setChosen] = useState("");
  const able = { caption: modelsFor("caption"), rank: modelsFor("match") };
  const models = modelsFor("caption").concat(modelsFor("match").filter((each) => !able.caption.includes(each)));
  async function start(kind) {
    setError("");
    const model = able[kind].find((each) => each.id === chosen) ?? able[kind][0];
    try {
      const job = await startJob(kind, { model: model.id });
      watchJob(job.id, () => {
        if (kind === "rank") filters.value = { ...filters.value, sort: "fit" };
        version.value += 1;
      });
    } catch (problem) {
      setError(problem.message);
    }
  }
  return html`<div class="buttons">
    ${models.length > 1 && html`<label>${text("image.model")}<select value=${chosen || models[0].id} onChange=${(event) => setChosen(event.target.value)}>
      ${models.map((each) => html`<option value=${each.id}>${each.id}</option>`)}</select></label>`}
    ${able.caption.length > 0 && html`<button name="caption" onClick=${() => start("caption")}>${text("caption.all")}</button>`}
    ${able.rank.length > 0 && html`<button name="rank" onClick=${() => start("rank")}>${text("caption.rank")}</button>`}
    <${ActiveJobs} /><span class="error" role="alert">${error}</span></div>`;
}

export function Captions() {
  const { text: words, not, state, sort } = filters.value;
  const rows = useMemo(() => new Rows({ text: words, not, state, sort }), [words, not, state, sort, version.value]);
  const [active, setActive] = useState(0);
  useEffect(() => {
    setActive(0);
    rows.fetch(0);
  }, [rows]);
  rows.changed.value;
  const total = rows.total.value;
  const row = total ? rows.at(active) : undefined;
  async function next() {
    for (let index = active + 1; index < total; index++) {
      const candidate = await rows.row(index);
      if (candidate?.state === "open" || candidate?.caption.text === null) return setActive(index);
    }
    say(text("caption.allseen"));
  }
  const step = (by) => setActive((at) => Math.min(Math.max(0, total - 1), Math.max(0, at + by)));
  return html`<section class="captions" aria-label=${text("room.captions")}>
    <h1 class="hidden">${text("room.captions")}</h1>
    <div class="bar"><${ListFilter} states=${STATES} />${canEdit.value && html`<${Work} />`}</div>
    ${!canEdit.value && html`<p class="note">${text("caption.readonly", { why: info.value.obstacle ?? "" })}</p>`}
    ${canEdit.value && info.value.given && html`<p class="note">${text("caption.given", { name: info.value.name })}</p>`}
    ${canEdit.value && html`<${Replace} onDone=${() => (version.value += 1)} />`}
    <p class="count">${total === null ? "" : text(total === 1 ? "images.one" : "images.count", { n: total.toLocaleString("en") })}</p>
    <div class="split"><${List} rows=${rows} active=${active} onPick=${setActive} />
      ${row && html`<${Editor} key=${row.id} row=${row} rows=${rows} onNext=${next} onStep=${step} />`}</div>
  </section>`;
}
