/**
 * One open conversation: its messages, and the turn that is running in it.
 */
import { explain, type Problem } from "../lib/problem";
import { Refused, TurnRun } from "../lib/run";
import { requestFields, type Settings } from "../lib/settings";
import { answerOf, fromItems, lastExchange, noteOf, withoutStored, withPending, withTurn, type Message } from "../lib/thread";
import { isEnded, fail, newTurn, type TurnState } from "../lib/turn";
import type { BrowserStore } from "../lib/storage";
import type { Client } from "../lib/client";
import { FrameBatch } from "./frames";

const CLOCK = {
  now: () => performance.now(),
  sleep: (ms: number) => new Promise<void>((resolve) => setTimeout(resolve, ms)),
};

let count = 0;

export interface ThreadEvents {
  /** The server gave the conversation an id: it exists now. */
  created(thread: Thread, question: string): void;
  /** Something was said in it. */
  touched(thread: Thread): void;
  /** A stream broke: the server may be away. */
  shaken(): void;
  /** A call failed; `what` says which, where the thread itself does not show it. */
  failed(problem: Problem, what?: string): void;
}

export class Thread {
  id = $state<string | null>(null);
  messages = $state.raw<Message[]>([]);
  loading = $state(false);
  loadProblem = $state.raw<Problem | null>(null);
  draft = $state("");
  /** Whether a turn is under way. */
  busy = $state(false);
  stopping = $state(false);

  readonly #client: Client;
  readonly #store: BrowserStore;
  readonly #events: ThreadEvents;
  #run: TurnRun | null = null;
  #loaded: boolean;

  constructor(id: string | null, client: Client, store: BrowserStore, events: ThreadEvents) {
    this.id = id;
    this.#client = client;
    this.#store = store;
    this.#events = events;
    this.#loaded = id === null;
  }

  /** Fetches the stored items once, and picks up a turn that was running when the page was left. */
  async load(): Promise<void> {
    if (this.#loaded || this.loading || this.id === null) return;
    this.loading = true;
    this.loadProblem = null;
    try {
      await this.#loadFrom(this.id);
      this.#loaded = true;
    } catch (error) {
      this.loadProblem = problemOf(error);
      this.#events.failed(this.loadProblem);
    } finally {
      this.loading = false;
    }
  }

  async #loadFrom(id: string): Promise<void> {
    const pending = this.#store.pending(id);
    const running = pending?.responseId ? await this.#isRunning(pending.responseId) : false;
    this.messages = fromItems(await this.#client.items(id), this.#store.notes(id));
    if (pending === null) return;
    if (running && pending.responseId !== null) {
      void this.#follow(pending.question, pending.responseId);
      return;
    }
    this.#store.savePending(id, null);
    const stored = this.messages.some(({ role }, at) => role === "user" && textAt(this.messages, at) === pending.question);
    // Never confirmed and not stored: give the question back rather than lose it.
    if (pending.responseId === null && !stored && this.draft === "") this.draft = pending.question;
  }

  async #isRunning(responseId: string): Promise<boolean> {
    try {
      const { status } = await this.#client.response(responseId);
      return status === "in_progress" || status === "queued";
    } catch (error) {
      if (error instanceof Refused && error.problem.kind === "gone") return false;
      throw error;
    }
  }

  /** Asks `question`; the answer arrives in `messages`. */
  async send(question: string, model: string, settings: Settings): Promise<void> {
    if (this.busy) return;
    const key = `turn-${++count}`;
    this.busy = true;
    const first = newTurn(CLOCK.now());
    this.messages = [...this.messages, { role: "user", key: `${key}-question`, text: question }, answerOf(key, first)];
    try {
      if (this.id === null) {
        this.id = await this.#client.createConversation();
        this.#events.created(this, question);
      }
    } catch (error) {
      this.#settle(key, fail(first, problemOf(error)));
      return;
    }
    const conversation = this.id;
    this.#store.savePending(conversation, { question, responseId: null });
    this.#events.touched(this);
    const run = this.#startRun(key, question, null);
    const input = [{ type: "message", role: "user", content: [{ type: "input_text", text: question }] }];
    const body = { model, input, conversation, store: true, ...requestFields(settings) };
    this.#settle(key, await run.create(body));
  }

  async #follow(question: string, responseId: string): Promise<void> {
    const key = `turn-${++count}`;
    this.busy = true;
    this.messages = withPending(this.messages, question, key, newTurn(null, responseId));
    this.#settle(key, await this.#startRun(key, question, responseId).follow());
  }

  #startRun(key: string, question: string, responseId: string | null): TurnRun {
    const frames = new FrameBatch<TurnState>((state) => {
      this.messages = withTurn(this.messages, key, state);
      this.stopping = state.stopping;
    });
    let known = responseId;
    let item: string | null = null;
    let resumed = 0;
    const run = new TurnRun(this.#client, CLOCK, (state) => {
      if (state.responseId !== known && this.id !== null) {
        known = state.responseId;
        this.#store.savePending(this.id, { question, responseId: known });
      }
      if (state.itemId !== null && state.itemId !== item) {
        item = state.itemId;
        this.messages = withoutStored(this.messages, item);
      }
      if (state.resumed > resumed) {
        resumed = state.resumed;
        this.#events.shaken();
      }
      frames.push(state);
    }, responseId);
    this.#run = run;
    return run;
  }

  #settle(key: string, state: TurnState): void {
    this.messages = withTurn(this.messages, key, state);
    this.busy = false;
    this.stopping = false;
    this.#run = null;
    if (this.id !== null) {
      // What broke off may still be running, and can be found again after a reload.
      if (state.phase !== "broken") this.#store.savePending(this.id, null);
      if (state.itemId !== null) this.#store.saveNote(this.id, state.itemId, noteOf(state));
      this.#events.touched(this);
    }
    if (state.problem !== null) this.#events.failed(state.problem);
  }

  stop(): void {
    this.#run?.stop();
  }

  /** Takes the last question and its answer off the page and, where they were stored, off the server. */
  async takeBack(): Promise<string | null> {
    const at = this.messages.findLastIndex(({ role }) => role === "user");
    const question = textAt(this.messages, at);
    if (this.busy || question === null) return null;
    const answer = this.messages[at + 1];
    const itemId = answer?.role === "assistant" ? answer.turn.itemId : null;
    this.busy = true;
    try {
      if (this.id !== null) await this.#deleteExchange(this.id, question, itemId);
    } catch (error) {
      this.#events.failed(problemOf(error), "The last answer could not be taken back");
      return null;
    } finally {
      this.busy = false;
    }
    this.messages = this.messages.slice(0, at);
    return question;
  }

  async #deleteExchange(conversationId: string, question: string, itemId: string | null): Promise<void> {
    const items = await this.#client.items(conversationId);
    for (const id of lastExchange(items, question, itemId)) await this.#client.deleteItem(conversationId, id);
  }

  /** Leaves the running turn to itself; the server finishes it. */
  leave(): void {
    this.#run?.leave();
  }

  get ended(): boolean {
    const last = this.messages.at(-1);
    return last?.role !== "assistant" || isEnded(last.turn.phase);
  }
}

function textAt(messages: readonly Message[], at: number): string | null {
  const message = messages[at];
  return message?.role === "user" ? message.text : null;
}

export function problemOf(error: unknown): Problem {
  if (error instanceof Refused) return error.problem;
  return explain({ status: null, code: null, message: error instanceof Error ? error.message : String(error) });
}
