/**
 * One answer as the page knows it: events in, state out. No I/O, no clock of its own.
 */
import { textOf, withDelta, withItem, type Part } from "./parts";
import { explain, type Problem } from "./problem";
import type { ResponseObject, TurnEvent, Usage } from "./wire";

export type Phase =
  | "sending"
  | "waiting"
  | "streaming"
  | "resuming"
  | "completed"
  | "incomplete"
  | "cancelled"
  | "failed"
  | "broken";

export interface Retry {
  readonly at: number;
  readonly tries: number;
}

export interface TurnState {
  readonly phase: Phase;
  readonly responseId: string | null;
  /** The first of the answer's items. */
  readonly itemId: string | null;
  readonly model: string | null;
  /** Sequence number of the last event that was applied. */
  readonly lastSequence: number | null;
  readonly parts: readonly Part[];
  /** The words of all parts that are text. */
  readonly text: string;
  readonly usage: Usage | null;
  readonly problem: Problem | null;
  readonly incompleteReason: string | null;
  /** Events were lost, so there is a hole in the text; the end of the answer may fill it. */
  readonly hole: boolean;
  /** How often the stream broke and was picked up again. */
  readonly resumed: number;
  /** While it is broken: when it is tried again (on the caller's clock), and how often it was. */
  readonly retry: Retry | null;
  readonly stopping: boolean;
  /** Milliseconds on the caller's clock; null where this page did not see it happen. */
  readonly sentAt: number | null;
  readonly firstTextAt: number | null;
  readonly lastTextAt: number | null;
  /** Characters that came with the first text: a server or a browser under load merges tokens. */
  readonly firstTextLength: number;
}

/** What arrives within this time of the first text counts as having come with it. */
const BURST_MS = 10;

/** What `advance` made of an event: after a `gap` or a `break` the stream must be resumed after `lastSequence`. */
export type Verdict = "applied" | "duplicate" | "gap" | "break";

const ENDED: ReadonlySet<Phase> = new Set(["completed", "incomplete", "cancelled", "failed", "broken"]);

export function isEnded(phase: Phase): boolean {
  return ENDED.has(phase);
}

/** A turn that was just sent at `now`, or (null) one that began before this page was loaded. */
export function newTurn(now: number | null, responseId: string | null = null): TurnState {
  return {
    phase: now === null ? "resuming" : "sending",
    responseId,
    itemId: null,
    model: null,
    lastSequence: null,
    parts: [],
    text: "",
    usage: null,
    problem: null,
    incompleteReason: null,
    hole: false,
    resumed: 0,
    retry: null,
    stopping: false,
    sentAt: now,
    firstTextAt: null,
    lastTextAt: null,
    firstTextLength: 0,
  };
}

/** Applies one event. The state is returned unchanged for duplicates and gaps. */
export function advance(state: TurnState, event: TurnEvent, now: number): [TurnState, Verdict] {
  if (isEnded(state.phase)) return [state, "duplicate"];
  const sequence = event.sequence_number;
  // Stands outside a turn's log: the stream ends early, the turn itself may well go on.
  if (event.type === "error") return state.responseId === null ? [fail(state, errorOf(event)), "applied"] : [state, "break"];
  if (sequence === undefined) return [state, "duplicate"];
  const expected = state.lastSequence === null ? 0 : state.lastSequence + 1;
  if (sequence < expected) return [state, "duplicate"];
  // It stands for the events that are lost, and its number is that of the last of them.
  if (event.type === "response.millrace.discontinuity") return [{ ...state, lastSequence: sequence, hole: true }, "applied"];
  // To a reader that lags the server sends several deltas of text as one, with the last one's number.
  if (sequence > expected && event.type !== "response.output_text.delta") return [state, "gap"];
  return [apply({ ...state, lastSequence: sequence }, event, now), "applied"];
}

function apply(state: TurnState, event: TurnEvent, now: number): TurnState {
  switch (event.type) {
    case "response.created":
    case "response.queued":
    case "response.in_progress":
      return {
        ...state,
        phase: state.parts.length === 0 ? "waiting" : state.phase,
        responseId: event.response?.id ?? state.responseId,
        model: event.response?.model ?? state.model,
      };
    case "response.output_item.added":
      if (event.item === undefined) return state;
      return grown({ ...state, itemId: state.itemId ?? event.item.id ?? null }, withItem(state.parts, event.item, false));
    case "response.output_text.delta":
    case "response.reasoning_text.delta":
    case "response.function_call_arguments.delta": {
      const delta = event.delta ?? "";
      const next = grown({ ...state, phase: "streaming" }, withDelta(state.parts, event.item_id ?? "", delta));
      return delta === "" || state.sentAt === null ? next : timed(next, now);
    }
    case "response.output_item.done":
      return event.item === undefined ? state : grown(state, withItem(state.parts, event.item, true));
    case "response.completed":
      return finish(state, "completed", event);
    case "response.incomplete":
      return finish(state, "incomplete", event);
    case "response.cancelled":
      return finish(state, "cancelled", event);
    case "response.failed":
      return finish({ ...state, problem: errorOf(event) }, "failed", event);
    default:
      return state;
  }
}

function grown(state: TurnState, parts: readonly Part[]): TurnState {
  return { ...state, parts, text: textOf(parts) };
}

function timed(state: TurnState, now: number): TurnState {
  const firstTextAt = state.firstTextAt ?? now;
  const first = now - firstTextAt <= BURST_MS;
  return { ...state, firstTextAt, lastTextAt: now, firstTextLength: first ? state.text.length : state.firstTextLength };
}

function finish(state: TurnState, phase: Phase, event: TurnEvent): TurnState {
  return { ...whole(state, event.response), phase, retry: null, stopping: false };
}

/** Takes over what the server says at the end; the items it gives are the answer, whatever was seen of it. */
function whole(state: TurnState, response: ResponseObject | undefined): TurnState {
  const output = response?.output ?? [];
  const parts = output.reduce((before, item) => withItem(before, item, true), state.parts);
  const place = ({ id }: Part): number => output.findIndex((item) => item.id === id);
  return {
    ...grown(state, [...parts].sort((one, other) => place(one) - place(other))),
    itemId: state.itemId ?? output[0]?.id ?? null,
    hole: state.hole && output.length === 0,
    usage: response?.usage ?? null,
    incompleteReason: response?.incomplete_details?.reason ?? null,
  };
}

/** Ends a turn by its stored response, where its events can no longer be had. Null if it has not ended. */
export function settle(state: TurnState, response: ResponseObject): TurnState | null {
  const phase = response.status;
  if (phase !== "completed" && phase !== "incomplete" && phase !== "cancelled" && phase !== "failed") return null;
  const problem = phase === "failed" ? errorOf({ type: "response.failed", response }) : null;
  return finish({ ...state, problem }, phase, { type: "", response });
}

function errorOf(event: TurnEvent): Problem {
  const nested = event.response?.error ?? event.error;
  return explain({
    status: event.status ?? null,
    code: nested?.code ?? event.code ?? null,
    message: nested?.message ?? event.message ?? "",
  });
}

/** The request was refused, or the turn could not go on. */
export function fail(state: TurnState, problem: Problem): TurnState {
  return isEnded(state.phase) ? state : { ...state, phase: "failed", problem, retry: null, stopping: false };
}

/** The page lost the stream for good; the answer may be longer than what is shown. */
export function breakOff(state: TurnState, problem: Problem): TurnState {
  return isEnded(state.phase) ? state : { ...state, phase: "broken", problem, retry: null, stopping: false };
}

/** The stream broke and is being picked up again. Times measured across the break mean nothing. */
export function resume(state: TurnState, retry: Retry | null = null): TurnState {
  if (isEnded(state.phase)) return state;
  return { ...state, phase: "resuming", retry, sentAt: null, firstTextAt: null, lastTextAt: null, firstTextLength: 0 };
}

/** The stream goes on. */
export function reconnected(state: TurnState): TurnState {
  if (isEnded(state.phase)) return state;
  return { ...resume(state), phase: state.parts.length === 0 ? "waiting" : "streaming", resumed: state.resumed + 1 };
}

export function stop(state: TurnState): TurnState {
  return isEnded(state.phase) ? state : { ...state, stopping: true };
}
