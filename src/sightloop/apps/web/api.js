// Requests to the server that sent the page.
import { signal } from "./html.js";
import { text } from "./strings.js";

export const needsKey = signal(false);
export const isLost = signal(false);

export class ApiError extends Error {
  constructor(status, body) {
    super(body?.error?.message ?? `the server answered ${status}`);
    this.status = status;
    this.body = body ?? {};
  }
}

/** Sends a request; body: an object, sent as JSON. Returns the parsed answer, throws ApiError. */
export async function call(method, path, body, headers = {}) {
  const options = { method, headers: { "X-Sightloop": "1", ...headers }, signal: headers.signal };
  delete options.headers.signal;
  if (body !== undefined) {
    options.body = JSON.stringify(body);
    options.headers["Content-Type"] = "application/json";
  }
  let answer;
  try {
    answer = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    isLost.value = true;
    throw new ApiError(undefined, { error: { message: text("app.lost") } });
  }
  isLost.value = false;
  let parsed = null;
  try {
    parsed = await answer.json();
  } catch {
    // an answer without a body
  }
  if (answer.status === 401) needsKey.value = true;
  if (!answer.ok) throw new ApiError(answer.status, parsed);
  return parsed;
}

export const get = (path, headers) => call("GET", path, undefined, headers);
export const post = (path, body, headers) => call("POST", path, body, headers);

/** Query string of an object; null, "" and false are left out, lists repeat their name. */
export function query(values) {
  const parameters = new URLSearchParams();
  for (const [name, value] of Object.entries(values)) {
    for (const each of Array.isArray(value) ? value : [value]) {
      if (each !== null && each !== undefined && each !== "" && each !== false) parameters.append(name, each);
    }
  }
  const text = parameters.toString();
  return text ? `?${text}` : "";
}

export const thumb = (id, size = 256, at) => `api/images/${id}/thumb?size=${size}${at ? `&at=${at}` : ""}`;
/** Second of a video that stands for a hit: the middle of its scene. */
export const middle = (row) => (row.start === undefined ? undefined : ((row.start + row.end) / 2).toFixed(2));
/** A time or a length in seconds as players show it: 0:42, 1:02:05. */
export function clock(seconds) {
  const [hours, minutes, rest] = [Math.floor(seconds / 3600), Math.floor((seconds % 3600) / 60), Math.floor(seconds % 60)];
  const pad = (number) => String(number).padStart(2, "0");
  return hours ? `${hours}:${pad(minutes)}:${pad(rest)}` : `${minutes}:${pad(rest)}`;
}
/** A length, which is a second at least. */
export const lengthText = (seconds) => clock(Math.max(1, seconds));
export const original = (id) => `api/images/${id}`;

/** Answer of /v1/chat/completions piece by piece: calls onText(whole text so far). */
export async function streamChat(body, onText, abort) {
  const answer = await fetch("v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json", "X-Sightloop": "1" },
    body: JSON.stringify({ ...body, stream: true }),
    signal: abort,
  });
  if (!answer.ok) throw new ApiError(answer.status, await answer.json().catch(() => null));
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let whole = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return whole;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data: ") || line === "data: [DONE]") continue;
      const event = JSON.parse(line.slice(6));
      if (event.error) throw new ApiError(500, event);
      whole += event.choices?.[0]?.delta?.content ?? "";
      onText(whole);
    }
  }
}
