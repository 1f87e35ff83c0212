// Improve: fine-tune on the captions on disk, or bootstrap; watch the curves; compare before and after.
import { html, useEffect, useState } from "../html.js";
import { info, loadInfo, modelsFor, startJob } from "../state.js";
import { text } from "../strings.js";
import { Job, jobs, refreshJobs, watchJob } from "./jobs.js";

function Comparison({ job }) {
  const rows = job.result?.metrics;
  if (!rows) return null;
  return html`<table class="comparison"><thead><tr>${["metric", "before", "after", "difference"].map((name) => html`<th scope="col">${text(`improve.${name}`)}</th>`)}</tr></thead>
    <tbody>${rows.map((row) => html`<tr><th scope="row">${row.name}</th><td>${row.before.toFixed(3)}</td><td>${row.after.toFixed(3)}</td>
      <td class=${row.low > 0 ? "better" : row.high < 0 ? "worse" : ""}>${row.difference >= 0 ? "+" : ""}${row.difference.toFixed(3)} [${row.low.toFixed(3)}, ${row.high.toFixed(3)}]</td></tr>`)}</tbody></table>`;
}

export function Improve() {
  const [form, setForm] = useState({ steps: 100, heldout: 20, model: "" });
  const [error, setError] = useState("");
  useEffect(() => {
    refreshJobs();
  }, []);
  const set = (fields) => setForm({ ...form, ...fields });
  const models = modelsFor("caption");
  const model = form.model || models[0]?.id;
  async function start(kind, options) {
    setError("");
    try {
      const job = await startJob(kind, options);
      watchJob(job.id, loadInfo);
    } catch (problem) {
      setError(problem.message);
    }
  }
  const shown = jobs.value.filter((job) => ["train", "bootstrap", "compare"].includes(job.kind)).reverse();
  const trained = shown.filter((job) => job.kind === "train" && job.state === "done");
  return html`<section class="improve" aria-label=${text("room.improve")}><h1>${text("room.improve")}</h1>
    <form onSubmit=${(event) => {
      event.preventDefault();
      start("train", { model, steps: form.steps, held_out: form.heldout / 100 });
    }}><h2>${text("improve.train")}</h2>
      <p>${text("improve.train.hint", { n: info.value.captioned ?? "?" })}</p>
      ${models.length > 1 && html`<label>${text("image.model")}<select value=${model} onChange=${(event) => set({ model: event.target.value })}>${models.map((each) => html`<option value=${each.id}>${each.id}</option>`)}</select></label>`}
      <label>${text("improve.steps")}<input type="number" min="1" max="100000" value=${form.steps} onInput=${(event) => set({ steps: Number(event.target.value) })} /></label>
      <label>${text("improve.heldout")}<input type="number" min="5" max="50" value=${form.heldout} onInput=${(event) => set({ heldout: Number(event.target.value) })} /></label>
      <button class="primary">${text("improve.start")}</button></form>
    <form onSubmit=${(event) => {
      event.preventDefault();
      start("bootstrap", { model });
    }}><h2>${text("improve.bootstrap")}</h2><p>${text("improve.bootstrap.hint")}</p><button>${text("improve.start")}</button></form>
    <p class="error" role="alert">${error}</p>
    <h2>${text("improve.runs")}</h2>
    ${shown.length === 0 && html`<p class="empty">${text("improve.norun")}</p>`}
    ${shown.map((job) => html`<div key=${job.id}><${Job} job=${job} /><${Comparison} job=${job} />
      ${trained.includes(job) && html`<p class="buttons">
        <button onClick=${() => start("compare", { train_job: job.id })}>${text("improve.compare")}</button>
        <button onClick=${() => start("use", { train_job: job.id })}>${text("improve.use")}</button></p>`}</div>`)}
  </section>`;
}
