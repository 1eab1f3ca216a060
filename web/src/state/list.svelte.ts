/**
 * The conversations that the server has: the newest of them, or those that a search found.
 */
import type { Client } from "../lib/client";
import { merged, UNTITLED, type Conversation } from "../lib/conversations";
import type { Problem } from "../lib/problem";
import { Refused } from "../lib/run";
import type { BrowserStore } from "../lib/storage";
import { problemOf } from "./thread.svelte";

/** What is typed is searched for once it rests. */
const TYPING_MS = 200;

export class ConversationList {
  /** All that were read, newest first. */
  entries = $state.raw<readonly Conversation[]>([]);
  hasMore = $state(false);
  /** Whether the server has said what there is. */
  known = $state(false);
  query = $state("");
  /** What was found for `query`; null while nothing is looked for. */
  hits = $state.raw<readonly Conversation[] | null>(null);
  /** How many conversations were searched, where older ones were left out. */
  searched = $state<number | null>(null);

  readonly #client: Client;
  readonly #store: BrowserStore;
  readonly #failed: (problem: Problem, what?: string) => void;
  #typing: ReturnType<typeof setTimeout> | undefined;
  #adopting = false;

  constructor(client: Client, store: BrowserStore, failed: (problem: Problem, what?: string) => void) {
    this.#client = client;
    this.#store = store;
    this.#failed = failed;
  }

  titleOf(id: string | null): string {
    const known = this.entries.find((entry) => entry.id === id) ?? this.hits?.find((entry) => entry.id === id);
    return known?.title ?? UNTITLED;
  }

  /** Reads the newest conversations. A server that does not answer leaves what is shown. */
  async load(): Promise<void> {
    try {
      await this.#adopt();
      const { entries, hasMore } = await this.#client.conversations("");
      // What was read behind the page that was just read stays.
      const at = this.entries.findIndex(({ id }) => id === entries.at(-1)?.id);
      const older = hasMore && at >= 0 ? this.entries.slice(at + 1) : [];
      this.entries = merged(older, entries);
      if (older.length === 0) this.hasMore = hasMore;
      this.known = true;
    } catch {
      // The page's health says so.
    }
  }

  async more(): Promise<void> {
    const last = this.entries.at(-1);
    if (last === undefined) return;
    try {
      const { entries, hasMore } = await this.#client.conversations("", last.id);
      const known = new Set(this.entries.map(({ id }) => id));
      this.entries = [...this.entries, ...entries.filter(({ id }) => !known.has(id))];
      this.hasMore = hasMore;
    } catch (error) {
      this.#failed(problemOf(error), "Older conversations could not be read");
    }
  }

  /** Takes what is typed in the search field. */
  look(query: string): void {
    this.query = query;
    clearTimeout(this.#typing);
    if (query.trim() === "") this.hits = null;
    else this.#typing = setTimeout(() => void this.#search(query), TYPING_MS);
  }

  async #search(query: string): Promise<void> {
    try {
      const { entries, searched } = await this.#client.conversations(query.trim());
      if (query !== this.query) return;
      this.hits = entries;
      this.searched = searched;
    } catch (error) {
      this.#failed(problemOf(error), "The search failed");
    }
  }

  /** Puts a conversation that is new, or was changed, at its place. */
  put(conversation: Conversation): void {
    this.entries = merged(this.entries, [conversation]);
  }

  /** Something was said or changed: the order may be another, here and on other pages of this browser. */
  async changed(): Promise<void> {
    this.#store.write("changed", Date.now());
    await this.load();
  }

  async rename(id: string, title: string): Promise<void> {
    if (title === "" || title === this.titleOf(id)) return;
    try {
      const renamed = await this.#client.updateConversation(id, { title });
      this.put(renamed);
      this.hits = this.hits?.map((hit) => (hit.id === id ? { ...hit, title: renamed.title } : hit)) ?? null;
      await this.changed();
    } catch (error) {
      this.#failed(problemOf(error), "The conversation could not be renamed");
    }
  }

  /** Returns whether it is gone. */
  async remove(id: string): Promise<boolean> {
    try {
      await this.#client.deleteConversation(id);
    } catch (error) {
      this.#failed(problemOf(error), "The conversation could not be deleted");
      return false;
    }
    this.entries = this.entries.filter((entry) => entry.id !== id);
    this.hits = this.hits?.filter((entry) => entry.id !== id) ?? null;
    void this.changed();
    return true;
  }

  /** Another key has other conversations. */
  clear(): void {
    this.entries = [];
    this.hits = null;
    this.query = "";
    this.hasMore = this.known = false;
  }

  /** Gives the titles that earlier pages kept in this browser to the server, which keeps them from now on. */
  async #adopt(): Promise<void> {
    if (this.#adopting) return;
    this.#adopting = true;
    try {
      for (const { id, title } of this.#store.oldConversations()) {
        try {
          await this.#client.updateConversation(id, { title: title.slice(0, 200) || UNTITLED });
        } catch (error) {
          // It has expired, or is of another key. Whatever else is wrong may be right the next time.
          if (!(error instanceof Refused && error.problem.kind === "gone")) throw error;
        }
      }
      this.#store.write("conversations", null);
    } finally {
      this.#adopting = false;
    }
  }
}
