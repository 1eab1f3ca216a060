/**
 * What this browser keeps: settings, which conversation is open, turns that run, and figures of past
 * answers. The conversations themselves are the server's.
 */
import { readPending, type Pending } from "./pending";
import type { Notes } from "./thread";

/** A conversation as earlier pages kept it here. */
export interface OldConversation {
  id: string;
  title: string;
  updatedAt: number;
}

const PREFIX = "millrace.";
const MAX_NOTES = 200;
const MAX_PENDING = 8;

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

  /** The list that earlier pages kept here, oldest first. */
  oldConversations(): OldConversation[] {
    const stored = this.read("conversations");
    return Array.isArray(stored) ? stored.filter(isOldConversation).sort((a, b) => a.updatedAt - b.updatedAt) : [];
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
    // Of answers that were lost, somebody may have walked away.
    const kept = Object.entries(all).slice(-MAX_PENDING);
    this.write("pending", kept.length === 0 ? null : Object.fromEntries(kept));
  }

  forget(conversationId: string): void {
    this.write(`notes.${conversationId}`, null);
    this.savePending(conversationId, null);
  }

  #record(name: string): Record<string, unknown> {
    const stored = this.read(name);
    return typeof stored === "object" && stored !== null && !Array.isArray(stored) ? (stored as Record<string, unknown>) : {};
  }
}

function isOldConversation(value: unknown): value is OldConversation {
  const entry = value as Partial<OldConversation> | null;
  return typeof entry?.id === "string" && typeof entry.title === "string" && typeof entry.updatedAt === "number";
}
