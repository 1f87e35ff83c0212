// Duplicates: clusters side by side with their evidence. Nothing is deleted here.
import { html, useEffect, useState } from "../html.js";
import { get, thumb } from "../api.js";
import { info, say } from "../state.js";
import { text } from "../strings.js";

export function Duplicates() {
  const [clusters, setClusters] = useState(null);
  const [error, setError] = useState("");
  useEffect(() => {
    get("api/duplicates").then((answer) => setClusters(answer.clusters), (problem) => setError(problem.message));
  }, []);
  async function copy() {
    const paths = clusters.flatMap((cluster) => cluster.members.filter((row) => row.id !== cluster.keep).map((row) => row.path));
    await navigator.clipboard.writeText(paths.join("\n"));
    say(text("images.copied", { n: paths.length }));
  }
  return html`<section class="duplicates" aria-label=${text("room.duplicates")}><h1>${text("room.duplicates")}</h1>
    <p class="error" role="alert">${info.value.index ? error : error || text("search.noindex")}</p>
    ${clusters?.length === 0 && html`<p class="empty">${text("duplicates.none")}</p>`}
    ${clusters?.length > 0 && html`<p><button onClick=${copy}>${text("duplicates.list")}</button> <span class="note">${text("duplicates.hint")}</span></p>`}
    ${(clusters ?? []).map((cluster) => html`<article key=${cluster.members[0].id}>
      <h2>${text(`duplicates.${cluster.kind}`)} <span class="note">${cluster.evidence.join("; ")}</span></h2>
      <div class="pair">${cluster.members.map((row) => html`<a href=${`#/image/${row.id}`}><img src=${thumb(row.id)} alt="" loading="lazy" />
        <span>${row.path}${row.id === cluster.keep ? ` (${text("duplicates.keep")})` : ""}</span></a>`)}</div></article>`)}
  </section>`;
}
