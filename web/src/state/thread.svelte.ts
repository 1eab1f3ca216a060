/**
 * One open conversation: its messages, and the turn that is running in it.
 */
import { pendingOf, restored, type Pending } from "../lib/pending";
import { explain, GONE, type Problem } from "../lib/problem";
import { Refused, TurnRun } from "../lib/run";
import { requestFields, type Settings } from "../lib/settings";
import { answerOf, fromItems, lastExchange, noteOf, withoutStored, withPending, withTurn, type Message } from "../lib/thread";
import { breakOff, fail, isEnded, newTurn, type TurnState } from "../lib/turn";
import type { BrowserStore } from "../lib/storage";
import type { Client } from "../lib/client";
import { CLOCK } from "./clock";
import { FrameBatch } from "./frames";

/** How often what has arrived is put into storage, beside when the page is left. */
const SAVE_EVERY_MS = 1000;

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
  #question = "";
  #savedAt = 0;
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
    const over = pending === null || (await this.#isOver(pending));
    try {
      this.messages = fromItems(await this.#client.items(id), this.#store.notes(id));
    } catch (error) {
      if (pending !== null && problemOf(error).kind === "gone") this.#showCutOff(pending);
      throw error;
    }
    if (pending === null) return;
    if (!over) {
      void this.#follow(pending.question, restored(pending));
      return;
    }
    this.#store.savePending(id, null);
    const stored = this.messages.some(({ role }, at) => role === "user" && textAt(this.messages, at) === pending.question);
    // Never confirmed and not stored: give the question back rather than lose it.
    if (pending.responseId === null && !stored && this.draft === "") this.draft = pending.question;
  }

  /** Whether all that came of a turn is among the conversation's items. A turn that failed leaves none there. */
  async #isOver({ responseId, seen }: Pending): Promise<boolean> {
    if (responseId === null) return true;
    try {
      const { status } = await this.#client.response(responseId);
      return status === "completed" || status === "incomplete" || status === "cancelled";
    } catch (error) {
      // Followed once more, for the run to say so, where there is something to lose.
      if (error instanceof Refused && error.problem.kind === "gone") return seen === null;
      throw error;
    }
  }

  /** The server has lost the conversation; what this browser saw of the last answer is kept on the page. */
  #showCutOff(pending: Pending): void {
    const turn = restored(pending);
    if (turn.parts.length === 0) return;
    this.messages = withPending([], pending.question, `turn-${++count}`, breakOff(turn, GONE));
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
    this.#store.savePending(conversation, pendingOf(question, first));
    this.#events.touched(this);
    const run = this.#startRun(key, question, first);
    const input = [{ type: "message", role: "user", content: [{ type: "input_text", text: question }] }];
    const body = { model, input, conversation, store: true, ...requestFields(settings) };
    this.#settle(key, await run.create(body));
  }

  async #follow(question: string, state: TurnState): Promise<void> {
    const key = `turn-${++count}`;
    this.busy = true;
    this.messages = withPending(this.messages, question, key, state);
    if (state.itemId !== null) this.messages = withoutStored(this.messages, state.itemId);
    this.#settle(key, await this.#startRun(key, question, state).follow());
  }

  #startRun(key: string, question: string, from: TurnState): TurnRun {
    const frames = new FrameBatch<TurnState>((state) => {
      this.messages = withTurn(this.messages, key, state);
      this.stopping = state.stopping;
    });
    let before = from;
    const run = new TurnRun(this.#client, CLOCK, (state) => {
      if (state.responseId !== before.responseId) this.save(state);
      else if (CLOCK.now() - this.#savedAt > SAVE_EVERY_MS) this.save(state);
      if (state.itemId !== null && state.itemId !== before.itemId) this.messages = withoutStored(this.messages, state.itemId);
      if (state.phase === "resuming" && before.phase !== "resuming") this.#events.shaken();
      before = state;
      frames.push(state);
    }, from);
    this.#run = run;
    this.#question = question;
    return run;
  }

  /** Puts what has arrived of the running turn into storage. */
  save(state: TurnState | undefined = this.#run?.state): void {
    if (this.id === null || state === undefined || isEnded(state.phase)) return;
    this.#savedAt = CLOCK.now();
    this.#store.savePending(this.id, pendingOf(this.#question, state));
  }

  #settle(key: string, state: TurnState): void {
    this.messages = withTurn(this.messages, key, state);
    this.busy = false;
    this.stopping = false;
    this.#run = null;
    // Left, not ended: it is found again by what is in storage.
    if (!isEnded(state.phase)) return;
    if (this.id !== null) {
      // What broke off may still be running, and can be found again after a reload.
      if (state.phase !== "broken") this.#store.savePending(this.id, null);
      if (state.itemId !== null) this.#store.saveNote(this.id, state.itemId, noteOf(state));
      this.#events.touched(this);
    }
    if (state.problem !== null) this.#events.failed(state.problem);
  }

  /** The network or the page is back. */
  nudge(): void {
    this.#run?.nudge();
    if (this.loadProblem?.retryable === true) void this.load();
  }

  /** Follows once more an answer whose stream was given up. */
  async pickUp(): Promise<void> {
    const last = this.messages.at(-1);
    const question = textAt(this.messages, this.messages.length - 2);
    if (this.busy || question === null || last?.role !== "assistant" || last.turn.responseId === null) return;
    this.messages = this.messages.slice(0, -1);
    const seen = pendingOf(question, last.turn);
    await this.#follow(question, restored(seen));
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
