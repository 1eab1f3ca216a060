/**
 * A conversation as the page shows it: stored items, and the turn that is running.
 */
import { measure, type Stats } from "./stats";
import { textOf, withItem, type Part } from "./parts";
import { newTurn, type Phase, type TurnState } from "./turn";
import { itemText, type Item } from "./wire";

export interface UserMessage {
  role: "user";
  key: string;
  text: string;
}

export interface AnswerMessage {
  role: "assistant";
  key: string;
  turn: TurnState;
  stats: Stats;
}

export type Message = UserMessage | AnswerMessage;

/** What this browser remembers about an answer beyond what the server stores. */
export interface Note extends Stats {
  phase: Phase;
  reason: string | null;
}

export type Notes = Record<string, Note>;

const NO_STATS: Stats = { ttft_s: null, tokensPerSecond: null, outputTokens: null };

/** Turns the items of a stored conversation, oldest first, into messages. */
export function fromItems(items: readonly Item[], notes: Notes): Message[] {
  const messages: Message[] = [];
  let answer: Item[] = [];
  const close = (): void => {
    const key = answer[0]?.id;
    if (key !== undefined) messages.push(storedAnswer(key, answer, notes[key]));
    answer = [];
  };
  for (const [index, item] of items.entries()) {
    const given = item.type === "message" && item.role !== "assistant";
    // Two messages of the model in a row are two answers; with a call between them they are one.
    if (given || (item.type === "message" && answer.at(-1)?.type === "message")) close();
    const id = item.id ?? `stored-${index}`;
    if (!given) answer.push({ ...item, id });
    else if (item.role === "user") messages.push({ role: "user", key: id, text: itemText(item) });
  }
  close();
  return messages;
}

function storedAnswer(key: string, items: readonly Item[], note: Note | undefined): AnswerMessage {
  const complete = items.every(({ status }) => status === undefined || status === "completed");
  const parts = items.reduce<readonly Part[]>((before, item) => withItem(before, item, true), []);
  // What the server stored decides whether it is whole; the note only says how it ended early.
  const phase = complete ? "completed" : note !== undefined && note.phase !== "completed" ? note.phase : "incomplete";
  return {
    role: "assistant",
    key,
    turn: { ...newTurn(null), phase, itemId: key, parts, text: textOf(parts), incompleteReason: note?.reason ?? null },
    stats: note ?? NO_STATS,
  };
}

export function answerOf(key: string, turn: TurnState): AnswerMessage {
  return { role: "assistant", key, turn, stats: measure(turn) };
}

export function noteOf(turn: TurnState): Note {
  return { ...measure(turn), phase: turn.phase, reason: turn.incompleteReason };
}

/** Shows `turn` as the answer with this key. */
export function withTurn(messages: readonly Message[], key: string, turn: TurnState): Message[] {
  return messages.map((message) => (message.key === key ? answerOf(key, turn) : message));
}

/**
 * Appends a turn that began before this page was loaded. The server may already have stored its
 * question, which then is the last message, or not yet.
 */
export function withPending(messages: readonly Message[], question: string, key: string, turn: TurnState): Message[] {
  const last = messages.at(-1);
  const asked = last?.role === "user" && last.text === question;
  const user: Message[] = asked ? [] : [{ role: "user", key: `${key}-question`, text: question }];
  return [...messages, ...user, answerOf(key, turn)];
}

/** Drops from the stored messages the answer that a followed turn turned out to be, and its question. */
export function withoutStored(messages: readonly Message[], itemId: string): Message[] {
  const at = messages.findIndex((message) => message.role === "assistant" && message.key === itemId);
  if (at < 0) return [...messages];
  const from = messages[at - 1]?.role === "user" ? at - 1 : at;
  return [...messages.slice(0, from), ...messages.slice(at + 1)];
}

/**
 * Returns the ids of the stored items, newest first, that the last exchange consists of: none if the
 * server refused the question or failed, for then it stored nothing.
 */
export function lastExchange(items: readonly Item[], question: string, answerId: string | null): string[] {
  // An answer has several items where tools were called; none follows it.
  const at = answerId === null ? -1 : items.findIndex(({ id }) => id === answerId);
  const answer = at < 0 ? [] : items.slice(at);
  if (answer.some(({ role }) => role === "user")) return [];
  const asked = at < 0 ? items.at(-1) : items[at - 1];
  // Stopped before the first word, only the question was stored.
  const stored = asked?.role === "user" && (at >= 0 || (answerId === null && itemText(asked) === question));
  const ids = [...answer.map(({ id }) => id).reverse(), stored ? asked.id : undefined];
  return ids.filter((id) => id !== undefined);
}

/** A title for a conversation from its first question. */
export function titleFrom(question: string): string {
  const line = question.trim().replace(/\s+/g, " ");
  if (line.length <= 48) return line || "New chat";
  const cut = line.slice(0, 48);
  const space = cut.lastIndexOf(" ");
  return `${space > 24 ? cut.slice(0, space) : cut}…`;
}
