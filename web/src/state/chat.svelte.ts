/**
 * The page's state: which conversations there are, which one is open, settings, the server's health.
 */
import { Client } from "../lib/client";
import type { Problem } from "../lib/problem";
import { readSettings, type Settings } from "../lib/settings";
import { BrowserStore } from "../lib/storage";
import type { Message, UserMessage } from "../lib/thread";
import { onWake } from "../lib/wake";
import { ConversationList } from "./list.svelte";
import { problemOf, Thread, type ThreadEvents } from "./thread.svelte";

export type Health = "checking" | "ready" | "restarting" | "away";

const HEALTHY_POLL_MS = 20_000;
const AWAY_POLL_MS = 2000;
const MAX_TITLE_CHARS = 200;

export class Chat {
  thread = $state.raw<Thread>() as Thread;
  settings = $state.raw<Settings>(readSettings(null));
  apiKey = $state<string | null>(null);
  needsKey = $state(false);
  models = $state.raw<string[]>([]);
  health = $state<Health>("checking");
  /** A problem of the page as a whole, such as a conversation that could not be deleted. */
  notice = $state.raw<Problem | null>(null);

  readonly list: ConversationList;
  readonly #client: Client;
  readonly #store: BrowserStore;
  readonly #threads = new Map<string, Thread>();
  #timer: ReturnType<typeof setTimeout> | undefined;

  constructor(client: Client, store: BrowserStore) {
    this.#client = client;
    this.#store = store;
    this.list = new ConversationList(client, store, (problem, what) => this.#events.failed(problem, what));
    this.settings = readSettings(store.read("settings"));
    const key = store.read("key");
    this.#useKey(typeof key === "string" ? key : null);
    const open = store.read("open");
    this.thread = this.#threadOf(typeof open === "string" ? open : null);
  }

  /** The model that answers: the chosen one while the server has it. */
  get model(): string | null {
    const chosen = this.settings.model;
    return chosen !== null && this.models.includes(chosen) ? chosen : (this.models[0] ?? null);
  }

  get title(): string {
    return this.list.titleOf(this.thread.id);
  }

  /** Starts watching the server. Returns what ends it. */
  start(): () => void {
    const look = (): void => void this.check();
    const save = (): void => {
      for (const thread of this.#open()) thread.save();
    };
    const other = (event: StorageEvent): void => {
      if (event.key !== "millrace.changed") return;
      void this.list.load();
      void this.thread.refresh();
    };
    const asleep = onWake(() => this.#wake());
    window.addEventListener("offline", look);
    window.addEventListener("pagehide", save);
    document.addEventListener("visibilitychange", save);
    window.addEventListener("storage", other);
    look();
    void this.thread.load();
    return () => {
      clearTimeout(this.#timer);
      asleep();
      window.removeEventListener("offline", look);
      window.removeEventListener("pagehide", save);
      document.removeEventListener("visibilitychange", save);
      window.removeEventListener("storage", other);
    };
  }

  /** Nothing that was true before a sleep or without a network need be true now. */
  #wake(): void {
    this.#client.wake();
    for (const thread of this.#open()) thread.nudge();
    void this.thread.refresh();
    void this.check();
    void this.list.load();
  }

  #open(): Set<Thread> {
    return new Set([this.thread, ...this.#threads.values()]);
  }

  async check(): Promise<void> {
    clearTimeout(this.#timer);
    if (document.hidden) return;
    const before = this.health;
    const health = await this.#client.ready();
    this.health = health;
    if (health === "ready" && before === "away") {
      for (const thread of this.#open()) thread.nudge();
      void this.thread.refresh();
    }
    if (health === "ready" && (before !== "ready" || this.models.length === 0)) await this.#loadModels();
    clearTimeout(this.#timer);
    this.#timer = setTimeout(() => void this.check(), health === "ready" ? HEALTHY_POLL_MS : AWAY_POLL_MS);
  }

  async #loadModels(): Promise<void> {
    try {
      this.models = await this.#client.models();
      this.needsKey = false;
      const { loadProblem } = this.thread;
      if (loadProblem?.retryable === true || loadProblem?.kind === "key") await this.thread.load();
      await this.list.load();
    } catch (error) {
      this.#events.failed(problemOf(error));
    }
  }

  readonly #events: ThreadEvents = {
    created: (thread, conversation) => {
      this.#threads.set(conversation.id, thread);
      this.list.put(conversation);
      if (this.thread === thread) this.#store.write("open", conversation.id);
    },
    touched: () => void this.list.changed(),
    gone: (thread, problem) => {
      if (thread.id !== null) this.#forget(thread.id);
      this.notice = problem;
    },
    shaken: () => void this.check(),
    failed: (problem, what) => {
      if (what !== undefined) this.notice = named(problem, what);
      if (problem.kind === "key") this.needsKey = true;
      if (problem.kind === "unreachable" || problem.kind === "restarting" || problem.kind === "lost") void this.check();
    },
  };

  #threadOf(id: string | null): Thread {
    const known = id === null ? undefined : this.#threads.get(id);
    const thread = known ?? new Thread(id, this.#client, this.#store, this.#events);
    if (id !== null) this.#threads.set(id, thread);
    return thread;
  }

  open(id: string | null): void {
    this.notice = null;
    if (id === null && this.thread.id === null && this.thread.messages.length === 0) return;
    this.thread = this.#threadOf(id);
    this.#store.write("open", id);
    void this.thread.open();
  }

  /** Why nothing can be sent now, or null. */
  get blocked(): string | null {
    if (this.needsKey) return "The server needs an API key: open the settings.";
    if (this.health === "away") return "The server does not answer. Your text stays here.";
    if (this.health === "restarting") return "The engine is starting. Your text stays here.";
    if (this.thread.loading) return "Loading the conversation…";
    if (this.thread.loadProblem !== null) return "This conversation could not be loaded.";
    if (this.model === null) return "Waiting for the server…";
    return null;
  }

  async send(text: string): Promise<void> {
    const question = text.trim();
    const { thread } = this;
    if (question === "") return;
    await this.#with((model) => {
      thread.draft = "";
      return thread.send(question, model, this.settings);
    });
  }

  /** Asks something else in place of a question. */
  async edit(message: UserMessage, text: string): Promise<void> {
    const question = text.trim();
    if (question !== "") await this.#with((model) => this.thread.edit(message, question, model, this.settings));
  }

  /** Has a question answered (again). */
  async answer(message: Message): Promise<void> {
    await this.#with((model) => this.thread.answer(message, model, this.settings));
  }

  /** Asks a question again in a new conversation, for the server has lost this one. */
  async askAnew(at: number): Promise<void> {
    const message = this.thread.messages[at];
    if (message?.role !== "user") return;
    if (this.thread.id !== null) this.#forget(this.thread.id);
    this.open(null);
    if (this.blocked === null) await this.send(message.text);
    else this.thread.draft = message.text;
  }

  async #with(work: (model: string) => Promise<void>): Promise<void> {
    if (this.blocked !== null || this.model === null || this.thread.busy) return;
    await work(this.model);
  }

  /** Opens a conversation of a search at what was found. */
  openAt(id: string, itemId: string): void {
    this.open(id);
    void this.thread.reveal(itemId);
  }

  /** Copies the conversation up to a message into a new one, and opens that. */
  async fork(message: Message): Promise<void> {
    const { id } = this.thread;
    if (id === null || message.place.last === null) return;
    try {
      const fork = await this.#client.fork(id, message.place.last, `${this.title} (fork)`.slice(-MAX_TITLE_CHARS));
      this.list.put(fork);
      this.open(fork.id);
      void this.list.changed();
    } catch (error) {
      this.#events.failed(problemOf(error), "The conversation could not be forked");
    }
  }

  async rename(id: string, title: string): Promise<void> {
    await this.list.rename(id, title.trim().slice(0, MAX_TITLE_CHARS));
  }

  async remove(id: string): Promise<void> {
    if (!(await this.list.remove(id))) return;
    this.#threads.get(id)?.leave();
    this.#forget(id);
  }

  #forget(id: string): void {
    this.#threads.delete(id);
    this.#store.forget(id);
    if (this.thread.id !== id) return;
    this.thread = this.#threadOf(null);
    this.#store.write("open", null);
  }

  saveSettings(settings: Settings): void {
    this.settings = settings;
    this.#store.write("settings", settings);
  }

  saveKey(key: string): void {
    const clean = key.trim() === "" ? null : key.trim();
    if (clean === this.apiKey) return;
    this.#store.write("key", clean);
    this.#useKey(clean);
    this.needsKey = false;
    this.list.clear();
    void this.#loadModels();
  }

  #useKey(key: string | null): void {
    this.apiKey = key;
    this.#client.apiKey = key;
  }
}

function named(problem: Problem, what: string): Problem {
  return { ...problem, title: what, detail: `${problem.title}. ${problem.detail}` };
}

export function createChat(): Chat {
  let storage: Storage | null = null;
  try {
    storage = window.localStorage;
  } catch {
    // Forbidden by the browser's settings.
  }
  return new Chat(new Client(new URL("./", document.baseURI).href), new BrowserStore(storage));
}
