/**
 * A conversation as the page shows it: the path of stored items to the head, and the turn that runs.
 */
import { measure, type Stats } from "./stats";
import { textOf, withItem, type Part } from "./parts";
import type { Tree, TreeItem } from "./tree";
import { newTurn, type Phase, type TurnState } from "./turn";
import { itemText } from "./wire";

/** Where a message is in the conversation's tree. */
export interface Place {
  /** Its first and its last item; null while the server has not stored it. */
  readonly first: string | null;
  readonly last: string | null;
  readonly parent: string | null;
  /** All that comes after the parent, oldest first; the message itself is number `at`, from 0. */
  readonly siblings: readonly string[];
  readonly at: number;
  readonly count: number;
}

export interface UserMessage {
  role: "user";
  text: string;
  place: Place;
}

export interface AnswerMessage {
  role: "assistant";
  turn: TurnState;
  stats: Stats;
  place: Place;
  /** Whether it can be made anew: it answers a message of the person. */
  again: boolean;
}

export type Message = UserMessage | AnswerMessage;

/** A turn of this page that is not (yet) in the tree. */
export interface Live {
  /** Null where it answers a question that is stored already. */
  readonly question: string | null;
  /** The item that it goes after. */
  readonly after: string | null;
  readonly state: TurnState;
}

/** What this browser remembers about an answer beyond what the server stores. */
export interface Note extends Stats {
  phase: Phase;
  reason: string | null;
}

export type Notes = Record<string, Note>;

const NO_STATS: Stats = { ttft_s: null, tokensPerSecond: null, outputTokens: null };

/**
 * Returns the messages of the branch that ends at `tip`, by default the head. `turns` are answers that
 * this page saw being made: it knows more of them than is stored.
 */
export function messagesOf(tree: Tree, notes: Notes, turns: ReadonlyMap<string, TurnState>, tip: string | null = tree.head): Message[] {
  const messages: Message[] = [];
  let answer: TreeItem[] = [];
  const close = (): void => {
    const [first] = answer;
    if (first !== undefined) messages.push(storedAnswer(tree, answer, notes[first.id], turns.get(first.id)));
    answer = [];
  };
  for (const item of tree.path(tip)) {
    const given = item.type === "message" && item.role !== "assistant";
    // Two messages of the model in a row are two answers; with a call between them they are one.
    if (given || (item.type === "message" && answer.at(-1)?.type === "message")) close();
    if (!given) answer.push(item);
    else if (item.role === "user") messages.push({ role: "user", text: itemText(item), place: placeOf(tree, item.id, item.id, item.parent_id) });
  }
  close();
  return messages;
}

/** Returns the messages with a turn that runs after the item it goes after. */
export function messagesWith(tree: Tree, notes: Notes, turns: ReadonlyMap<string, TurnState>, live: Live): Message[] {
  const base = tree.has(live.after) ? live.after : tree.head;
  const messages = base === null ? [] : messagesOf(tree, notes, turns, base);
  if (live.question !== null) messages.push({ role: "user", text: live.question, place: placeOf(tree, null, null, base) });
  const place = live.question === null ? placeOf(tree, null, null, base) : NOWHERE;
  return [...messages, { role: "assistant", turn: live.state, stats: measure(live.state), place, again: true }];
}

const NOWHERE: Place = { first: null, last: null, parent: null, siblings: [], at: 0, count: 1 };

function placeOf(tree: Tree, first: string | null, last: string | null, parent: string | null): Place {
  const siblings = tree.children(parent);
  const at = first === null ? siblings.length : siblings.indexOf(first);
  return { first, last, parent, siblings, at, count: Math.max(siblings.length, at + 1) };
}

function storedAnswer(tree: Tree, items: readonly TreeItem[], note: Note | undefined, seen: TurnState | undefined): AnswerMessage {
  const first = items[0] as TreeItem;
  const place = placeOf(tree, first.id, (items.at(-1) ?? first).id, first.parent_id);
  const again = first.parent_id !== null && tree.item(first.parent_id)?.role === "user";
  const complete = items.every(({ status }) => status === undefined || status === "completed");
  const parts = items.reduce<readonly Part[]>((before, item) => withItem(before, item, true), []);
  // What the server stored decides whether it is whole; the note only says how it ended early.
  const phase: Phase = complete ? "completed" : note !== undefined && note.phase !== "completed" ? note.phase : "incomplete";
  const stored = { ...newTurn(null), phase, itemId: first.id, parts, text: textOf(parts), incompleteReason: note?.reason ?? null };
  return { role: "assistant", turn: seen ?? stored, stats: note ?? NO_STATS, place, again };
}

export function noteOf(turn: TurnState): Note {
  return { ...measure(turn), phase: turn.phase, reason: turn.incompleteReason };
}

/** Shows `turn` as the last answer. */
export function withTurn(messages: readonly Message[], turn: TurnState): Message[] {
  return messages.map((message, at) =>
    message.role === "assistant" && at === messages.length - 1 ? { ...message, turn, stats: measure(turn) } : message,
  );
}

const MAX_TITLE_CHARS = 60;

/** A title for a conversation from its first question. */
export function titleFrom(question: string): string {
  const line = question.trim().replace(/\s+/g, " ");
  if (line.length <= MAX_TITLE_CHARS) return line || "New chat";
  const cut = line.slice(0, MAX_TITLE_CHARS);
  const space = cut.lastIndexOf(" ");
  return `${space > MAX_TITLE_CHARS / 2 ? cut.slice(0, space) : cut}…`;
}
