/**
 * What a browser keeps of a turn that is running, so that a page that was reloaded goes on where it was.
 */
import { textOf, type Part } from "./parts";
import { newTurn, type TurnState } from "./turn";

/** What had arrived of the answer. */
export interface Seen {
  itemId: string | null;
  lastSequence: number;
  parts: readonly Part[];
}

/** A turn that was running when last seen; `responseId` is null until the server confirmed it. */
export interface Pending {
  question: string;
  responseId: string | null;
  seen: Seen | null;
}

/** Browsers give a page about 5 MB. A longer answer is read again from its first event. */
const MAX_SEEN_CHARS = 200_000;

export function pendingOf(question: string, state: TurnState): Pending {
  const { responseId, lastSequence, itemId, parts, hole } = state;
  // With a hole, what the server still has is worth more than what was seen.
  if (lastSequence === null || hole) return { question, responseId, seen: null };
  const chars = parts.reduce((sum, part) => sum + (part.kind === "call" ? part.arguments.length + (part.output ?? "").length : part.text.length), 0);
  return { question, responseId, seen: chars > MAX_SEEN_CHARS ? null : { itemId, lastSequence, parts } };
}

/** Takes what storage held, whatever it is; null where it is of no use. */
export function readPending(stored: unknown): Pending | null {
  const { question, responseId, seen } = (stored ?? {}) as Partial<Pending>;
  if (typeof question !== "string") return null;
  const id = typeof responseId === "string" ? responseId : null;
  return { question, responseId: id, seen: id !== null && isSeen(seen) ? seen : null };
}

/** The state to go on from. */
export function restored(pending: Pending): TurnState {
  const state = newTurn(null, pending.responseId);
  if (pending.seen === null) return state;
  return { ...state, ...pending.seen, text: textOf(pending.seen.parts) };
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
