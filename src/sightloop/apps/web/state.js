// What the rooms share: the folder, its image rows, the current query, messages.
import { batch, computed, signal } from "./html.js";
import { get, post, query } from "./api.js";

export const info = signal(null);
export const route = signal(parseRoute());
export const message = signal(""); // read out by screen readers
export const selected = signal(new Set());
export const filters = signal({ text: "", not: "", state: "all", sort: "path" });
export const version = signal(0); // raised when rows may have changed
export const preferred = signal(""); // id of the model that the rooms begin with; "": the server's default
export const searchAsked = signal(0); // raised when the field of the search is to have the keyboard
export const opened = { rows: null, index: 0 }; // where the image that is shown was opened

export const canEdit = computed(() => info.value?.editable ?? false);

const PAGE = 200; // rows of one request
const MAX_PAGES = 60; // kept; 12,000 rows

/** "#/image/ID/12.5" -> {room: "image", id: "ID", at: 12.5}: a video at a second. */
function parseRoute() {
  const [, room = "library", id = "", at = ""] = location.hash.split("/");
  return { room: room || "library", id, at: Math.max(0, parseFloat(at) || 0) };
}

addEventListener("hashchange", () => {
  route.value = parseRoute();
});

/** Shows a room; at: second of a video, which its address keeps. */
export function go(room, id = "", at = 0) {
  location.hash = `#/${[room, id, at ? Math.ceil(1000 * at) / 1000 : ""].filter(Boolean).join("/")}`;
  route.value = parseRoute(); // before the next key can come
}

export function say(words) {
  message.value = "";
  requestAnimationFrame(() => (message.value = words));
}

export async function loadInfo() {
  info.value = await get("api/info");
}

const lengths = signal(new Map()); // id -> seconds of a video; null while it is asked for, or where it is unknown

/** Seconds of a video, once the server has said it; undefined before, and for an image. */
export function lengthOf(row) {
  if (!row?.video) return undefined;
  const known = lengths.value.get(row.id);
  if (known === undefined) {
    lengths.value.set(row.id, null); // draws nothing: nobody is to see that it is being asked for
    get(`api/images/${row.id}/info`).then(
      ({ duration }) => (lengths.value = new Map(lengths.value).set(row.id, duration)),
      () => {},
    );
  }
  return known ?? undefined;
}

/** Models that have a capability. */
export function modelsFor(capability) {
  const able = (info.value?.models ?? []).filter((model) => model.capabilities.includes(capability));
  return able.sort((a, b) => (b.id === preferred.value) - (a.id === preferred.value));
}

/** Rows of a listing, fetched in pages as they come into view. */
export class Rows {
  constructor(filter) {
    this.filter = filter;
    this.total = signal(null);
    this.videos = 0; // of the total
    this.changed = signal(0);
    this.pages = new Map();
    this.waiting = new Map();
  }

  /** The row at an index; undefined while it is fetched. */
  at(index) {
    const page = Math.floor(index / PAGE);
    const rows = this.pages.get(page);
    if (rows === undefined) this.fetch(page);
    return rows?.[index - page * PAGE];
  }

  fetch(page) {
    if (!this.waiting.has(page)) this.waiting.set(page, this.load(page).finally(() => this.waiting.delete(page)));
    return this.waiting.get(page);
  }

  async load(page) {
    const { state, ...rest } = this.filter;
    const parameters = { ...rest, state: state === "all" ? "" : state, offset: page * PAGE, limit: PAGE };
    const answer = await get("api/images" + query(parameters));
    this.pages.set(page, answer.images);
    if (this.pages.size > MAX_PAGES) this.pages.delete(this.pages.keys().next().value);
    batch(() => {
      this.videos = answer.videos;
      this.total.value = answer.total;
      this.changed.value += 1;
    });
  }

  async row(index) {
    const known = this.at(index);
    if (known) return known;
    await this.fetch(Math.floor(index / PAGE));
    return this.at(index);
  }

  /** Puts changed fields into the row of an image, wherever it is shown. */
  update(id, fields) {
    for (const rows of this.pages.values()) {
      for (const row of rows) if (row.id === id) Object.assign(row, fields);
    }
    this.changed.value += 1;
  }
}

/** Rows that are there already, such as the hits of a search. */
export class FixedRows {
  constructor(rows) {
    this.rows = rows;
    this.total = signal(rows.length);
    this.changed = signal(0);
  }

  at(index) {
    return this.rows[index];
  }

  async row(index) {
    return this.rows[index];
  }

  update(id, fields) {
    for (const row of this.rows) if (row.id === id) Object.assign(row, fields);
    this.changed.value += 1;
  }
}

export function toggleSelected(id) {
  const next = new Set(selected.value);
  if (!next.delete(id)) next.add(id);
  selected.value = next;
}

export async function startJob(kind, options = {}) {
  const job = await post("api/jobs", { kind, options });
  say(job.title);
  return job;
}

/** Whether a key is typed into a field, and not meant for the page. */
export function isTyping(event) {
  return event.target.closest?.("input, textarea, select, dialog") !== null || event.ctrlKey || event.metaKey || event.altKey;
}
