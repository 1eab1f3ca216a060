/**
 * What a browser keeps of a turn that is running, so that a page that was reloaded goes on where it was.
 */
import { textOf, type Part } from "./parts";
import type { Live } from "./thread";
import { newTurn } from "./turn";

/** What had arrived of the answer. */
export interface Seen {
  itemId: string | null;
  lastSequence: number;
  parts: readonly Part[];
}

/** A turn that was running when last seen; `responseId` is null until the server confirmed it. */
export interface Pending {
  /** Null where it answers a question that is stored already. */
  question: string | null;
  /** The item of the conversation that it goes after. */
  after: string | null;
  responseId: string | null;
  seen: Seen | null;
}

/** Browsers give a page about 5 MB. A longer answer is read again from its first event. */
const MAX_SEEN_CHARS = 200_000;

export function pendingOf({ question, after, state }: Live): Pending {
  const { responseId, lastSequence, itemId, parts, hole } = state;
  // With a hole, what the server still has is worth more than what was seen.
  if (lastSequence === null || hole) return { question, after, responseId, seen: null };
  const chars = parts.reduce((sum, part) => sum + (part.kind === "call" ? part.arguments.length + (part.output ?? "").length : part.text.length), 0);
  return { question, after, responseId, seen: chars > MAX_SEEN_CHARS ? null : { itemId, lastSequence, parts } };
}

/** Takes what storage held, whatever it is; null where it is of no use. */
export function readPending(stored: unknown): Pending | null {
  const { question, after, responseId, seen } = (stored ?? {}) as Partial<Pending>;
  if (typeof question !== "string" && question !== null) return null;
  const id = typeof responseId === "string" ? responseId : null;
  return { question, after: typeof after === "string" ? after : null, responseId: id, seen: id !== null && isSeen(seen) ? seen : null };
}

/** The turn to go on with. */
export function restored({ question, after, responseId, seen }: Pending): Live {
  const state = newTurn(null, responseId);
  return { question, after, state: seen === null ? state : { ...state, ...seen, text: textOf(seen.parts) } };
}

function isSeen(value: unknown): value is Seen {
  const { itemId, lastSequence, parts } = (value ?? {}) as Partial<Seen>;
  return (
    (itemId === null || typeof itemId === "string") &&
    Number.isSafeInteger(lastSequence) &&
    Array.isArray(parts) &&
    parts.every(isPart)
  );
}

function isPart(value: unknown): value is Part {
  const part = (value ?? {}) as Record<string, unknown>;
  const named = typeof part["id"] === "string" && typeof part["done"] === "boolean";
  if (part["kind"] !== "call") return named && (part["kind"] === "text" || part["kind"] === "reasoning") && typeof part["text"] === "string";
  const texts = [part["callId"], part["name"], part["arguments"], part["output"] ?? ""];
  return named && texts.every((text) => typeof text === "string");
}
