// Jobs: what runs, how far, what failed and why, and the command that does the same.
import { html, signal, useEffect } from "../html.js";
import { get, post } from "../api.js";
import { say } from "../state.js";
import { text } from "../strings.js";

const PERIOD = 1000; // ms between two looks at running jobs
export const jobs = signal([]);
const watchers = new Map(); // job id -> called when it ends
let timer = null;

export const isActive = (job) => ["queued", "running", "paused"].includes(job.state);

/** Calls onEnd(job) when a job ends, in whatever room one is then. */
export function watchJob(id, onEnd) {
  watchers.set(id, onEnd);
  refreshJobs();
}

export async function refreshJobs() {
  clearTimeout(timer);
  try {
    jobs.value = await get("api/jobs");
  } catch {
    timer = setTimeout(refreshJobs, 5 * PERIOD);
    return;
  }
  for (const job of jobs.value) {
    if (isActive(job) || !watchers.has(job.id)) continue;
    const onEnd = watchers.get(job.id);
    watchers.delete(job.id);
    say(`${job.title}: ${text(`jobs.state.${job.state}`)}`);
    onEnd(job);
  }
  if (jobs.value.some(isActive)) timer = setTimeout(refreshJobs, PERIOD);
}

/** What runs, in a line. */
export function ActiveJobs() {
  useEffect(() => {
    refreshJobs();
  }, []);
  const active = jobs.value.filter(isActive);
  if (!active.length) return null;
  const { title, done, total } = active[0];
  return html`<a class="active-jobs" href="#/jobs">${title} ${total > 0 && html`<progress max=${total} value=${done}
    aria-label=${title}></progress> ${text("jobs.progress", { done, total })}`}
    ${active.length > 1 && text("jobs.waiting", { n: active.length - 1 })}</a>`;
}

/** Curves of a training: axes with numbers, one line a name. */
export function Curves({ curves }) {
  const width = 420;
  const height = 160;
  const margin = { left: 46, right: 8, top: 8, bottom: 24 };
  return html`<div class="curves">${curves.map(({ name, points }) => {
    if (points.length < 2) return null;
    const steps = points.map((point) => point[0]);
    const values = points.map((point) => point[1]);
    const [low, high] = [Math.min(...values), Math.max(...values)];
    const span = high - low || 1;
    const last = steps.at(-1) - steps[0] || 1;
    const x = (step) => margin.left + ((step - steps[0]) / last) * (width - margin.left - margin.right);
    const y = (value) => margin.top + (1 - (value - low) / span) * (height - margin.top - margin.bottom);
    const label = `${name}: ${values[0].toPrecision(3)} at step ${steps[0]}, ${values.at(-1).toPrecision(3)} at step ${steps.at(-1)}`;
    return html`<figure><figcaption>${name}</figcaption>
      <svg viewBox=${`0 0 ${width} ${height}`} role="img" aria-label=${label}>
        <path class="axis" d=${`M${margin.left} ${margin.top}V${height - margin.bottom}H${width - margin.right}`} />
        ${[low, low + span / 2, high].map((value) => html`<text x=${margin.left - 4} y=${y(value) + 4} text-anchor="end">${value.toPrecision(3)}</text>`)}
        ${[steps[0], steps.at(-1)].map((step, i) => html`<text x=${x(step)} y=${height - 6} text-anchor=${i ? "end" : "start"}>${step}</text>`)}
        <polyline class="curve" points=${points.map(([step, value]) => `${x(step)},${y(value)}`).join(" ")} />
      </svg></figure>`;
  })}</div>`;
}

async function act(job, verb) {
  await post(`api/jobs/${job.id}/${verb}`, {});
  refreshJobs();
}

export function Job({ job }) {
  return html`<article class="job">
    <h2>${job.title} <span class=${`tag ${job.state}`}>${text(`jobs.state.${job.state}`)}</span></h2>
    ${job.total > 0 && html`<progress max=${job.total} value=${job.done} aria-label=${job.title}></progress> ${text("jobs.progress", { done: job.done, total: job.total })}`}
    ${job.message && html`<p>${job.message}</p>`}
    <p class="buttons">
      ${job.state === "running" && html`<button onClick=${() => act(job, "pause")}>${text("jobs.pause")}</button>`}
      ${job.state === "paused" && html`<button onClick=${() => act(job, "resume")}>${text("jobs.resume")}</button>`}
      ${isActive(job) && html`<button onClick=${() => act(job, "cancel")}>${text("jobs.cancel")}</button>`}</p>
    ${job.curves?.length > 0 && html`<${Curves} curves=${job.curves} />`}
    ${job.failures?.length > 0 && html`<details><summary>${text("jobs.failures", { n: job.failures.length })}</summary>
      <ul>${job.failures.map((failure) => html`<li><b>${failure.name}</b>: ${failure.reason}</li>`)}</ul></details>`}
    ${job.command && html`<p class="note">${text("jobs.command")}: <code>${job.command}</code></p>`}
  </article>`;
}

export function Jobs() {
  useEffect(() => {
    refreshJobs();
  }, []);
  return html`<section aria-label=${text("room.jobs")}><h1>${text("room.jobs")}</h1>
    ${jobs.value.length === 0 && html`<p class="empty">${text("jobs.none")}</p>`}
    ${[...jobs.value].reverse().map((job) => html`<${Job} key=${job.id} job=${job} />`)}</section>`;
}
