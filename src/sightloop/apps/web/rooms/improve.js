// Improve: fine-tune on the captions on disk, or bootstrap; watch the curves; compare before and after; use the result.
import { html, signal, useEffect, useState } from "../html.js";
import { get } from "../api.js";
import { info, loadInfo, modelsFor, preferred, startJob } from "../state.js";
import { text } from "../strings.js";
import { Curves, isActive, Job, jobs, refreshJobs, watchJob } from "./jobs.js";

const KINDS = ["train", "bootstrap", "compare", "use"];
const runs = signal([]); // trainings that ended well, on disk

async function loadRuns() {
  runs.value = await get("api/runs");
}

function Comparison({ metrics }) {
  const columns = ["metric", "before", "after", "difference", "verdict"];
  return html`<table class="comparison"><thead><tr>${columns.map((name) => html`<th scope="col">${text(`improve.${name}`)}</th>`)}</tr></thead>
    <tbody>${metrics.map((row) => html`<tr><th scope="row">${row.name}</th><td>${row.before.toFixed(3)}</td><td>${row.after.toFixed(3)}</td>
      <td>${row.difference >= 0 ? "+" : ""}${row.difference.toFixed(3)} [${row.low.toFixed(3)}, ${row.high.toFixed(3)}]</td>
      <td class=${row.verdict}>${row.verdict && text(`improve.${row.verdict}`)}</td></tr>`)}</tbody></table>`;
}

/** A finished training with its curve, if it was trained since the server started, and its last comparison. */
function Run({ run, start }) {
  const curves = jobs.value.find((job) => job.kind === "train" && job.result?.name === run.name)?.curves ?? [];
  const isServed = info.value.models.some((model) => model.id === run.name);
  return html`<article class="job run"><h2>${run.name} ${isServed && html`<span class="tag done">${text("improve.inuse")}</span>`}</h2>
    <p class="note">${text("improve.run", run)}</p>
    <${Curves} curves=${curves} />
    ${run.metrics && html`<div class="scroll" tabindex="0" role="region" aria-label=${text("improve.compare")}><${Comparison} metrics=${run.metrics} /></div>`}
    <p class="buttons"><button name="compare" onClick=${() => start("compare", { run: run.name })}>${text("improve.compare")}</button>
      ${!isServed && html`<button name="use" onClick=${() => start("use", { run: run.name })}>${text("improve.use")}</button>`}</p></article>`;
}

export function Improve() {
  const [form, setForm] = useState({ steps: 100, heldout: 20, model: "" });
  const [error, setError] = useState("");
  useEffect(() => {
    refreshJobs();
    loadRuns();
    loadInfo();
  }, []);
  const set = (fields) => setForm({ ...form, ...fields });
  const models = modelsFor("caption");
  const model = form.model || models[0]?.id;
  async function start(kind, options) {
    setError("");
    try {
      const job = await startJob(kind, options);
      watchJob(job.id, async (ended) => {
        if (kind === "use" && ended.state === "done") preferred.value = ended.result.model;
        await Promise.all([loadInfo(), loadRuns()]);
      });
    } catch (problem) {
      setError(problem.message);
    }
  }
  const shown = jobs.value.filter((job) => KINDS.includes(job.kind) && (isActive(job) || job.state === "failed" || job.kind === "bootstrap")).reverse();
  return html`<section class="improve" aria-label=${text("room.improve")}><h1>${text("room.improve")}</h1>
    <form onSubmit=${(event) => {
      event.preventDefault();
      start("train", { model, steps: form.steps, held_out: form.heldout / 100 });
    }}><h2>${text("improve.train")}</h2>
      <p>${text("improve.train.hint", { n: info.value.captioned.toLocaleString("en") })}
        ${info.value.rejected > 0 && text("improve.train.rejected", { n: info.value.rejected })}</p>
      ${models.length > 1 && html`<label>${text("image.model")}<select value=${model} onChange=${(event) => set({ model: event.target.value })}>${models.map((each) => html`<option value=${each.id}>${each.id}</option>`)}</select></label>`}
      <label>${text("improve.steps")}<input type="number" min="1" max="100000" value=${form.steps} onInput=${(event) => set({ steps: Number(event.target.value) })} /></label>
      <label>${text("improve.heldout")}<input type="number" min="5" max="50" value=${form.heldout} onInput=${(event) => set({ heldout: Number(event.target.value) })} /></label>
      <button class="primary">${text("improve.start")}</button></form>
    <form onSubmit=${(event) => {
      event.preventDefault();
      start("bootstrap", { model });
    }}><h2>${text("improve.bootstrap")}</h2><p>${text("improve.bootstrap.hint")}</p><button>${text("improve.start")}</button></form>
    <p class="error" role="alert">${error}</p>
    ${shown.length > 0 && html`<h2>${text("improve.working")}</h2>`}
    ${shown.map((job) => html`<${Job} key=${job.id} job=${job} />`)}
    <h2>${text("improve.runs")}</h2>
    ${runs.value.length === 0 && html`<p class="empty">${text("improve.norun")}</p>`}
    ${runs.value.map((run) => html`<${Run} key=${run.name} run=${run} start=${start} />`)}
  </section>`;
}
