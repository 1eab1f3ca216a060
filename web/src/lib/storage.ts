/**
 * What this browser keeps: which conversations are its own, settings, and figures of past answers.
 * Conversations' ids are unguessable, so a browser only ever sees those it began itself.
 */
import { readPending, type Pending } from "./pending";
import type { Notes } from "./thread";

export interface Conversation {
  id: string;
  title: string;
  /** Milliseconds since the epoch. */
  createdAt: number;
  updatedAt: number;
}


const PREFIX = "millrace.";
const MAX_NOTES = 200;

export class BrowserStore {
  #storage: Storage | null;

  constructor(storage: Storage | null) {
    this.#storage = storage;
  }

  read(name: string): unknown {
    try {
      return JSON.parse(this.#storage?.getItem(PREFIX + name) ?? "null");
    } catch {
      return null;
    }
  }

  /** Stores `value`, or forgets the name for null. A full or forbidden storage loses it silently. */
  write(name: string, value: unknown): void {
    try {
      if (value === null) this.#storage?.removeItem(PREFIX + name);
      else this.#storage?.setItem(PREFIX + name, JSON.stringify(value));
    } catch {
      // Private windows and full disks: the page works on, it only will not remember.
    }
  }

  conversations(): Conversation[] {
    const stored = this.read("conversations");
    return Array.isArray(stored) ? stored.filter(isConversation) : [];
  }

  saveConversations(list: readonly Conversation[]): void {
    this.write("conversations", list);
  }

  notes(conversationId: string): Notes {
    return this.#record(`notes.${conversationId}`) as Notes;
  }

  saveNote(conversationId: string, itemId: string, note: Notes[string]): void {
    const entries = Object.entries({ ...this.notes(conversationId), [itemId]: note });
    this.write(`notes.${conversationId}`, Object.fromEntries(entries.slice(-MAX_NOTES)));
  }

  pending(conversationId: string): Pending | null {
    return readPending(this.#record("pending")[conversationId]);
  }

  savePending(conversationId: string, pending: Pending | null): void {
    const { [conversationId]: _, ...others } = this.#record("pending");
    const all = pending === null ? others : { ...others, [conversationId]: pending };
    this.write("pending", Object.keys(all).length === 0 ? null : all);
  }

  forget(conversationId: string): void {
    this.write(`notes.${conversationId}`, null);
    this.savePending(conversationId, null);
    this.saveConversations(this.conversations().filter(({ id }) => id !== conversationId));
  }

  #record(name: string): Record<string, unknown> {
    const stored = this.read(name);
    return typeof stored === "object" && stored !== null && !Array.isArray(stored) ? (stored as Record<string, unknown>) : {};
  }
}

function isConversation(value: unknown): value is Conversation {
  const entry = value as Partial<Conversation> | null;
  return (
    typeof entry?.id === "string" &&
    typeof entry.title === "string" &&
    typeof entry.createdAt === "number" &&
    typeof entry.updatedAt === "number"
  );
}
