/**
 * One open conversation: its tree of messages, and the turn that is running in it.
 */
import type { Client } from "../lib/client";
import type { Conversation } from "../lib/conversations";
import { pendingOf, restored, type Pending } from "../lib/pending";
import { explain, GONE, UNCONFIRMED, type Problem } from "../lib/problem";
import { Refused, TurnRun } from "../lib/run";
import { requestFields, type Settings } from "../lib/settings";
import type { BrowserStore } from "../lib/storage";
import { messagesOf, messagesWith, noteOf, titleFrom, withTurn, type Live, type Message, type UserMessage } from "../lib/thread";
import { Tree } from "../lib/tree";
import { breakOff, fail, isEnded, newTurn, type TurnState } from "../lib/turn";
import { itemText } from "../lib/wire";
import { CLOCK } from "./clock";
import { FrameBatch } from "./frames";

/** How often what has arrived is put into storage, beside when the page is left. */
const SAVE_EVERY_MS = 1000;

export interface ThreadEvents {
  /** The server gave the conversation an id: it exists now. */
  created(thread: Thread, conversation: Conversation): void;
  /** Something was said or changed in it. */
  touched(thread: Thread): void;
  /** A stream broke: the server may be away. */
  shaken(): void;
  /** The server has no such conversation (any more). */
  gone(thread: Thread, problem: Problem): void;
  /** A call failed; `what` says which, where the thread itself does not show it. */
  failed(problem: Problem, what?: string): void;
}

export class Thread {
  id = $state<string | null>(null);
  messages = $state.raw<readonly Message[]>([]);
  loading = $state(false);
  loadProblem = $state.raw<Problem | null>(null);
  draft = $state("");
  /** Whether a turn is under way. */
  busy = $state(false);
  stopping = $state(false);
  /** The item that is to be brought into view. */
  target = $state<string | null>(null);

  readonly #client: Client;
  readonly #store: BrowserStore;
  readonly #events: ThreadEvents;
  /** Answers that this page saw being made, by their first item. */
  readonly #turns = new Map<string, TurnState>();
  #tree = new Tree();
  #live: Live | null = null;
  #run: TurnRun | null = null;
  #savedAt = 0;
  #loaded: boolean;
  /** Whether the server's tree has grown since it was read. */
  #stale = false;
  #settled: Promise<void> = Promise.resolve();

  constructor(id: string | null, client: Client, store: BrowserStore, events: ThreadEvents) {
    this.id = id;
    this.#client = client;
    this.#store = store;
    this.#events = events;
    this.#loaded = id === null;
  }

  // Loading

  /** Shows what the server has now. */
  async open(): Promise<void> {
    await (this.#loaded ? this.refresh() : this.load());
  }

  /** Reads the conversation once, and picks up a turn that was running when the page was left. */
  async load(): Promise<void> {
    if (this.#loaded || this.loading || this.id === null) return;
    this.loading = true;
    this.loadProblem = null;
    try {
      await this.#loadFrom(this.id);
      this.#loaded = true;
    } catch (error) {
      const problem = problemOf(error);
      if (problem.kind === "gone" && this.#live === null) this.#events.gone(this, problem);
      else this.loadProblem = problem;
      this.#events.failed(problem);
    } finally {
      this.loading = false;
    }
  }

  async #loadFrom(id: string): Promise<void> {
    const pending = this.#store.pending(id);
    const over = pending === null || (await this.#isOver(pending));
    try {
      this.#tree = await this.#client.tree(id);
    } catch (error) {
      if (pending !== null && problemOf(error).kind === "gone") this.#showCutOff(restored(pending));
      throw error;
    }
    if (pending !== null && !over) {
      void this.#follow(restored(pending));
      return;
    }
    this.#show();
    if (pending === null) return;
    this.#store.savePending(id, null);
    const { question, after, responseId } = pending;
    const stored = this.#tree.children(after).some((one) => itemText(this.#tree.item(one) ?? { type: "" }) === question);
    // Never confirmed and not stored: give the question back rather than lose it.
    if (question !== null && responseId === null && !stored && this.draft === "") this.draft = question;
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
  #showCutOff(live: Live): void {
    if (live.state.parts.length === 0) return;
    this.#live = { ...live, state: breakOff(live.state, GONE) };
    this.#show();
  }

  /** Reads the tree again, for instance because another page may have changed it. */
  async refresh(): Promise<void> {
    if (this.id === null || !this.#loaded || this.busy) return;
    const before = this.#tree;
    try {
      const tree = await this.#client.tree(this.id);
      // A turn that began, or ended, meanwhile knows better.
      if (this.busy || this.#tree !== before) return;
      if (this.#stale || this.#arrived(tree)) this.#live = null;
      this.#tree = tree;
      this.#stale = false;
      this.#show();
    } catch (error) {
      const problem = problemOf(error);
      if (problem.kind === "gone" && this.#live === null) this.#events.gone(this, problem);
      else this.#events.failed(problem);
    }
  }

  /** Whether a turn that the server never confirmed is in its tree all the same. */
  #arrived(tree: Tree): boolean {
    const live = this.#live;
    if (live === null || live.state.responseId !== null) return false;
    const fresh = tree.children(live.after).filter((id) => !this.#tree.has(id));
    return fresh.some((id) => live.question === null || itemText(tree.item(id) ?? { type: "" }) === live.question);
  }

  #show(): void {
    const notes = this.id === null ? {} : this.#store.notes(this.id);
    this.messages = this.#live === null ? messagesOf(this.#tree, notes, this.#turns) : messagesWith(this.#tree, notes, this.#turns, this.#live);
  }

  // Turns

  /** Asks `question` after what is shown; the answer arrives in `messages`. */
  async send(question: string, model: string, settings: Settings): Promise<void> {
    if (this.busy) return;
    try {
      await this.#settled;
      if (this.#stale && this.id !== null) this.#tree = await this.#client.tree(this.id);
      this.#stale = false;
    } catch (error) {
      // Without knowing the end of the conversation there is nothing to go on from.
      this.draft = question;
      this.#events.failed(problemOf(error), "The question could not be sent");
      return;
    }
    await this.#begin(question, this.#tree.head, model, settings);
  }

  /** Asks something else in place of a question, in a branch of its own. */
  async edit(message: UserMessage, question: string, model: string, settings: Settings): Promise<void> {
    await this.#begin(question, message.place.parent, model, settings);
  }

  /** Has a question answered (again), in a branch of its own. */
  async answer(asked: Message, model: string, settings: Settings): Promise<void> {
    await this.#settled;
    // An answer that was just made may have found its place meanwhile.
    const message = asked.place.first === null ? (this.messages.at(-1) ?? asked) : asked;
    if (message.role === "user" && message.place.first !== null) await this.#begin(null, message.place.first, model, settings);
    else if (message.place.first !== null) await this.#begin(null, message.place.parent, model, settings);
    else if (this.#live !== null) await this.#begin(this.#live.question, this.#live.after, model, settings);
  }

  async #begin(question: string | null, after: string | null, model: string, settings: Settings): Promise<void> {
    await this.#settled;
    if (this.busy) return;
    this.busy = true;
    const first = newTurn(CLOCK.now());
    this.#live = { question, after, state: first };
    this.#show();
    try {
      if (this.id === null) {
        const conversation = await this.#client.createConversation(titleFrom(question ?? ""));
        this.id = conversation.id;
        this.#events.created(this, conversation);
      }
    } catch (error) {
      await this.#settle(fail(first, problemOf(error)));
      return;
    }
    this.#store.savePending(this.id, pendingOf(this.#live));
    this.#events.touched(this);
    const input = question === null ? [] : [{ type: "message", role: "user", content: [{ type: "input_text", text: question }] }];
    const body = { model, input, conversation: { id: this.id, after }, store: true, ...requestFields(settings) };
    await this.#settle(await this.#startRun(this.#live).create(body));
  }

  async #follow(live: Live): Promise<void> {
    this.busy = true;
    this.#live = live;
    this.#show();
    await this.#settle(await this.#startRun(live).follow());
  }

  #startRun(live: Live): TurnRun {
    const frames = new FrameBatch<TurnState>((state) => {
      if (this.#run !== run) return;
      this.messages = withTurn(this.messages, state);
      this.stopping = state.stopping;
    });
    let before = live.state;
    const run = new TurnRun(this.#client, CLOCK, (state) => {
      this.#live = { ...live, state };
      if (state.responseId !== before.responseId || CLOCK.now() - this.#savedAt > SAVE_EVERY_MS) this.save();
      if (state.phase === "resuming" && before.phase !== "resuming") this.#events.shaken();
      before = state;
      frames.push(state);
    }, live.state);
    this.#run = run;
    return run;
  }

  /** Puts what has arrived of the running turn into storage. */
  save(): void {
    if (this.id === null || this.#live === null || isEnded(this.#live.state.phase)) return;
    this.#savedAt = CLOCK.now();
    this.#store.savePending(this.id, pendingOf(this.#live));
  }

  async #settle(state: TurnState): Promise<void> {
    this.#run = null;
    this.messages = withTurn(this.messages, state);
    this.busy = false;
    this.stopping = false;
    // Left, not ended: it is found again by what is in storage.
    if (this.id === null || !isEnded(state.phase)) return;
    // What broke off may still be running, and is to be found again after a reload.
    const broken = state.phase === "broken" && this.#live !== null;
    this.#store.savePending(this.id, broken ? pendingOf(this.#live as Live) : null);
    if (state.problem !== null) this.#events.failed(state.problem);
    // What failed or broke off is not (yet) stored: it stays as it is, unless it turns up after all.
    if (state.phase === "failed" || state.phase === "broken") {
      if (state.problem === UNCONFIRMED) void this.refresh();
      return;
    }
    if (state.itemId !== null) {
      this.#store.saveNote(this.id, state.itemId, noteOf(state));
      this.#turns.set(state.itemId, state);
    }
    this.#settled = this.#take(this.id);
    await this.#settled;
    this.#events.touched(this);
  }

  /** Reads the tree that a turn has grown; until then the turn stays beside it. */
  async #take(id: string): Promise<void> {
    try {
      this.#tree = await this.#client.tree(id);
      this.#live = null;
      this.#show();
    } catch {
      this.#stale = true;
    }
  }

  /** Follows once more an answer whose stream was given up. */
  async pickUp(): Promise<void> {
    if (this.busy || this.#live === null || this.#live.state.responseId === null) return;
    await this.#follow(restored(pendingOf(this.#live)));
  }

  stop(): void {
    this.#run?.stop();
  }

  /** The network or the page is back. */
  nudge(): void {
    this.#run?.nudge();
    if (this.loadProblem?.retryable === true) void this.load();
  }

  /** Leaves the running turn to itself; the server finishes it. */
  leave(): void {
    this.#run?.leave();
  }

  // Branches

  /** Shows the branch through an item, down to its newest leaf. */
  async select(itemId: string): Promise<void> {
    await this.#change("The other version could not be shown", async (id) => {
      const { head } = await this.#client.updateConversation(id, { head: itemId, descend: true });
      this.#tree = this.#tree.withHead(head);
    });
  }

  /** Brings an item into view, on whatever branch it is. */
  async reveal(itemId: string): Promise<void> {
    await this.load();
    if (!this.#loaded || this.busy) return;
    if (!this.#tree.has(itemId)) await this.refresh();
    if (!this.#tree.has(itemId)) return;
    if (!this.#tree.path().some(({ id }) => id === itemId)) await this.select(itemId);
    this.target = this.messages.find(({ place }) => place.first !== null && this.#within(place.first, place.last, itemId))?.place.first ?? null;
  }

  #within(first: string, last: string | null, itemId: string): boolean {
    const ids = this.#tree.path().map(({ id }) => id);
    const at = ids.indexOf(itemId);
    return at >= ids.indexOf(first) && at <= ids.indexOf(last ?? first);
  }

  /** Deletes a message and all that comes after it. */
  async deleteFrom(message: Message): Promise<void> {
    const { first } = message.place;
    if (first === null) {
      // Only this page has it.
      if (this.id !== null) this.#store.savePending(this.id, null);
      this.#live = null;
      this.#show();
      return;
    }
    await this.#change("The messages could not be deleted", async (id) => {
      await this.#client.deleteFrom(id, first);
      this.#tree = await this.#client.tree(id);
    });
    this.#events.touched(this);
  }

  async #change(what: string, work: (id: string) => Promise<void>): Promise<void> {
    if (this.id === null || this.busy) return;
    try {
      await work(this.id);
      this.#live = null;
      this.#show();
    } catch (error) {
      this.#events.failed(problemOf(error), what);
    }
  }
}

export function problemOf(error: unknown): Problem {
  if (error instanceof Refused) return error.problem;
  return explain({ status: null, code: null, message: error instanceof Error ? error.message : String(error) });
}
