// Library: the grid, search by text, image, blend and words, filters, similar images.
import { html, useEffect, useLayoutEffect, useMemo, useRef, useState } from "../html.js";
import { post } from "../api.js";
import { Grid } from "../grid.js";
import { FixedRows, filters, go, info, loadInfo, Rows, say, searchAsked, selected, startJob, version } from "../state.js";
import { text } from "../strings.js";
import { signal } from "../html.js";
import { watchJob } from "./jobs.js";

const EMPTY = { text: "", words: "", without: "", where: "", image: null, like: null, alpha: 0.5, rerank: 0, cut: 0 };
const draft = signal({ ...EMPTY });
const result = signal(null); // {rows, note, searched} of the last search
const isRunning = signal(false);
let kept = null;
let searchSeen = 0;

/** Shows what looks like an image of the folder. */
export function searchLike(id) {
  draft.value = { ...EMPTY, like: id };
  go("library");
  search();
}

async function search() {
  const { text: words, words: exact, without, where, image, like, alpha, rerank, cut } = draft.value;
  const body = { k: 200 };
  if (words.trim()) body.text = words.trim();
  if (exact.trim()) body.words = exact.trim();
  if (without.trim()) body.without = without.trim();
  if (where.trim()) body.where = where.split("\n").map((line) => line.trim()).filter(Boolean);
  if (image) body.image = image;
  if (like) body.like = like;
  if ((image || like) && body.text) body.alpha = alpha;
  if (rerank) body.rerank = rerank;
  if (cut) body.cut = cut / 100;
  isRunning.value = true;
  try {
    if (rerank) await run({ ...body, rerank: undefined }); // the first answer at once, the refined order after it
    await run(body);
  } catch (error) {
    result.value = { rows: new FixedRows([]), error: error.message };
  } finally {
    isRunning.value = false;
  }
}

async function run(body) {
  const answer = await post("api/search", body);
  result.value = { rows: new FixedRows(answer.hits), note: answer.note, searched: answer.searched };
  say(text("search.found", { n: answer.hits.length }));
}

function clear() {
  draft.value = { ...EMPTY };
  result.value = null;
}

function Searching() {
  const [more, setMore] = useState(false);
  const q = draft.value;
  const set = (fields) => (draft.value = { ...draft.value, ...fields });
  const field = useRef(null);

  const input = useRef(null);
  useLayoutEffect(() => {
    if (searchAsked.value === searchSeen) return;
    searchSeen = searchAsked.value;
    input.current.focus();
  }, [searchAsked.value]);

  async function takeImage(file) {
    if (!file?.type.startsWith("image/")) return;
    const reader = new FileReader();
    reader.onload = () => {
      set({ image: reader.result, like: null });
      search();
    };
    reader.readAsDataURL(file);
  }
  return html`<form class="search" role="search" onSubmit=${(event) => {
    event.preventDefault();
    search();
  }}
    onDragOver=${(event) => event.preventDefault()}
    onDrop=${(event) => {
      event.preventDefault();
      takeImage(event.dataTransfer.files[0]);
    }}>
    <label class="wide">${text("search.label")}
      <input id="search-text" ref=${input} type="search" placeholder=${text("search.placeholder")} value=${q.text}
        onInput=${(event) => set({ text: event.target.value })} /></label>
    <button class="primary">${text("search.go")}</button>
    <button type="button" onClick=${() => setMore(!more)} aria-expanded=${more ? "true" : "false"}>
      ${text(more ? "search.less" : "search.more")}</button>
    ${result.value && html`<button type="button" onClick=${clear}>${text("search.clear")}</button>`}
    ${more && html`<div class="more">
      <label>${text("search.words")}<input value=${q.words} onInput=${(event) => set({ words: event.target.value })} /></label>
      <label>${text("search.without")}<input value=${q.without} onInput=${(event) => set({ without: event.target.value })} /></label>
      <label>${text("search.where")}<textarea rows="2" value=${q.where} onInput=${(event) => set({ where: event.target.value })} /></label>
      <label>${text("search.image")}<input ref=${field} type="file" accept="image/*" onChange=${(event) => takeImage(event.target.files[0])} /></label>
      ${(q.image || q.like) && html`<label>${text("search.alpha", { image: Math.round(100 * (1 - q.alpha)), text: Math.round(100 * q.alpha) })}
        <input type="range" min="0" max="1" step="0.05" value=${q.alpha} onInput=${(event) => set({ alpha: Number(event.target.value) })} /></label>`}
      <label>${q.rerank ? text("search.rerank", { n: q.rerank }) : text("search.rerank.off")}
        <input type="range" min="0" max="64" step="8" value=${q.rerank} onInput=${(event) => set({ rerank: Number(event.target.value) })} /></label>
      <label>${q.cut ? text("search.cut", { n: q.cut }) : text("search.cut.off")}
        <input type="range" min="0" max="30" step="5" value=${q.cut} onInput=${(event) => set({ cut: Number(event.target.value) })} /></label>
    </div>`}
    ${(q.image || q.like) && html`<p class="asked">
      <img src=${q.image ?? `api/images/${q.like}/thumb?size=256`} alt=${text("room.image")} />
      <button type="button" onClick=${() => set({ image: null, like: null })}>${text("search.image.clear")}</button></p>`}
  </form>`;
}

function IndexOffer() {
  const [error, setError] = useState("");
  async function build() {
    try {
      const job = await startJob("index");
      go("jobs");
      watchJob(job.id, loadInfo);
    } catch (problem) {
      setError(problem.message);
    }
  }
  return html`<p class="offer">${text("search.noindex")} <button onClick=${build}>${text("search.build")}</button>
    <span class="error" role="alert">${error}</span></p>`;
}

/** Fields that narrow the listing; used by Captions too. */
export function ListFilter({ states }) {
  const f = filters.value;
  const set = (fields) => (filters.value = { ...filters.value, ...fields });
  return html`<div class="filter">
    <label>${text("filter.text")}<input value=${f.text} onInput=${(event) => set({ text: event.target.value })} /></label>
    <label>${text("filter.not")}<input value=${f.not} onInput=${(event) => set({ not: event.target.value })} /></label>
    <label>${text("filter.state")}<select value=${f.state} onChange=${(event) => set({ state: event.target.value })}>
      ${states.map((state) => html`<option value=${state}>${text(`state.${state}`)}</option>`)}</select></label>
    <label>${text("sort.label")}<select value=${f.sort} onChange=${(event) => set({ sort: event.target.value })}>
      ${["path", "fit", "changed"].map((name) => html`<option value=${name}>${text(`sort.${name}`)}</option>`)}</select></label>
  </div>`;
}

function Selection() {
  const ids = [...selected.value];
  if (!ids.length) return null;
  async function copy() {
    const rows = await Promise.all(ids.map((id) => fetch(`api/images/${id}/info`).then((answer) => answer.json())));
    await navigator.clipboard.writeText(rows.map((row) => row.path).join("\n"));
    say(text("images.copied", { n: rows.length }));
  }
  return html`<div class="selection">${text("images.selected", { n: ids.length })}
    ${ids.length === 1 && info.value.index && html`<button onClick=${() => searchLike(ids[0])}>${text("hit.similar")}</button>`}
    <button onClick=${copy}>${text("images.copy")}</button>
    <button onClick=${() => (selected.value = new Set())}>${text("images.clear")}</button></div>`;
}

function describeHit(row) {
  const { itm, itc } = row.scores ?? {};
  const score = itm !== undefined && itm !== null ? `ITM ${itm.toFixed(2)}` : itc !== undefined && itc !== null ? `${itc.toFixed(3)}` : "";
  const words = row.scores?.keyword_rank ? row.why : "";
  return html`<span class="score" title=${text("hit.why", { why: row.why ?? "" })}>${score}</span> ${words || row.caption?.text || row.path}`;
}

/** "6 images, 2 videos". */
function countOf(images, videos) {
  const ofImages = text(images === 1 ? "images.one" : "images.count", { n: images.toLocaleString("en") });
  const ofVideos = text(videos === 1 ? "videos.one" : "videos.count", { n: videos.toLocaleString("en") });
  if (!videos) return ofImages;
  return images ? `${ofImages}, ${ofVideos}` : ofVideos;
}

/** Rows of a filter; those of before, with the place in them, when one comes back from an image. */
function listingOf(filter, at) {
  const key = JSON.stringify([filter, at]);
  if (kept?.key !== key) kept = { key, rows: new Rows(filter) };
  return kept.rows;
}

export function Library() {
  const { text: words, not, state, sort } = filters.value;
  const listing = useMemo(() => listingOf({ text: words, not, state, sort }, version.value), [words, not, state, sort, version.value]);
  useEffect(() => {
    listing.fetch(0);
  }, [listing]);
  const found = result.value;
  const rows = found?.rows ?? listing;
  const total = rows.total.value;
  return html`<section class="library" aria-label=${text("room.library")}>
    <h1 class="hidden">${text("room.library")}</h1>
    ${info.value.index ? html`<${Searching} />` : html`<${IndexOffer} />`}
    ${!found && html`<${ListFilter} states=${["all", "captioned", "uncaptioned", "open", "accepted", "rejected"]} />`}
    <p class="count">${isRunning.value ? text("search.running") : found?.error ? html`<span class="error" role="alert">${found.error}</span>`
      : found && total === 0 ? text("search.nothing")
      : found ? text(total < found.searched ? "search.best" : "search.all", { n: total.toLocaleString("en"), all: found.searched.toLocaleString("en") })
      : total === null ? "" : countOf(total - rows.videos, rows.videos)}
      ${found?.note && html` <span class="note">${found.note}</span>`}</p>
    ${!found && info.value.left_out > 0 && html`<p class="note">${text("images.leftout", { n: info.value.left_out.toLocaleString("en"), name: info.value.name })}</p>`}
    <${Selection} />
    ${!(found && total === 0) && html`<${Grid} rows=${rows} describe=${found ? describeHit : (row) => row.caption?.text ?? row.path} />`}
  </section>`;
}
