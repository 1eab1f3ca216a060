/**
 * What can go wrong, in words for the person in front of the page.
 */

export type ProblemKind =
  | "unreachable"
  | "restarting"
  | "busy"
  | "key"
  | "context"
  | "gone"
  | "request"
  | "lost"
  | "server";

export interface Problem {
  kind: ProblemKind;
  title: string;
  /** What to do, or the server's own words. */
  detail: string;
  retryable: boolean;
}

export interface ErrorFacts {
  status: number | null;
  code: string | null;
  message: string;
}

const CONTEXT_CODES = new Set(["context_length_exceeded", "conversation_full"]);
const ENGINE_CODES = new Set(["engine_died", "engine_closed", "engine_unavailable", "not_ready"]);

export const UNREACHABLE: Problem = {
  kind: "unreachable",
  title: "The server does not answer",
  detail: "Check that it is running and that this device is on the network.",
  retryable: true,
};

export const UNCONFIRMED: Problem = {
  kind: "lost",
  title: "The connection broke before the server confirmed",
  detail: "The question may not have arrived.",
  retryable: true,
};

export const GONE: Problem = {
  kind: "gone",
  title: "The server no longer has this answer",
  detail: "It was lost while this page was cut off. What is shown is what had arrived.",
  retryable: false,
};

/** Turns an error of the API (HTTP body, `error` event, `response.failed`) into a Problem. */
export function explain(facts: ErrorFacts): Problem {
  const { status, code, message } = facts;
  const context = code !== null && CONTEXT_CODES.has(code);
  if (context || /context (length|window|size)|longer than the context/i.test(message)) {
    return {
      kind: "context",
      title: "The conversation no longer fits the model’s context",
      detail: message || "Start a new chat, or ask for a shorter answer in the settings.",
      retryable: false,
    };
  }
  if (status === 401 || status === 403) {
    return { kind: "key", title: "The server needs an API key", detail: message, retryable: false };
  }
  if (code === "conversation_busy") {
    return {
      kind: "busy",
      title: "Another answer is still being written in this conversation",
      detail: "Try again when it is done.",
      retryable: true,
    };
  }
  if (status === 429) {
    return { kind: "busy", title: "The server is busy", detail: message || "Try again in a moment.", retryable: true };
  }
  if ((code !== null && ENGINE_CODES.has(code)) || status === 503 || status === 502) {
    return {
      kind: "restarting",
      title: "The engine is restarting",
      detail: message || "It is usually back in a few seconds.",
      retryable: true,
    };
  }
  if (status === 404) {
    return { kind: "gone", title: "The server no longer has this", detail: message, retryable: false };
  }
  if (status !== null && status < 500) {
    return { kind: "request", title: "The server refused the request", detail: message, retryable: false };
  }
  return { kind: "server", title: "The server failed", detail: message || "Its log says why.", retryable: true };
}

/** Reads the error out of an HTTP response's body in OpenAI's shape. */
export function explainBody(status: number, body: string): Problem {
  try {
    const parsed = JSON.parse(body) as { error?: { message?: unknown; code?: unknown } };
    const { message, code } = parsed.error ?? {};
    return explain({
      status,
      code: typeof code === "string" ? code : null,
      message: typeof message === "string" ? message : "",
    });
  } catch {
    return explain({ status, code: null, message: "" });
  }
}
