/**
 * Sees one turn through: sends it, follows it across broken connections, stops it.
 *
 * Reads from a Transport and publishes states; knows nothing of sockets, HTTP or the page. As long as
 * the server may have the answer, the run goes on trying: only an event that ends the turn, or the
 * server's word that it has no such turn, ends it.
 */
import { backoff } from "./backoff";
import { GONE, UNCONFIRMED, UNREACHABLE, type Problem } from "./problem";
import { advance, breakOff, fail, isEnded, reconnected, resume, settle, stop, type TurnState } from "./turn";
import type { ResponseObject, TurnEvent } from "./wire";

/** The server (or the network before it) refused in so many words. */
export class Refused extends Error {
  constructor(readonly problem: Problem) {
    super(problem.title);
  }
}

/** Nothing was heard for so long that the connection may be dead, though nobody closed it. */
export class Silent extends Error {}

export interface Transport {
  /** Starts a turn. Throws Refused if the server said no; ends or throws otherwise if it broke. */
  create(body: Record<string, unknown>, signal: AbortSignal): AsyncIterable<TurnEvent>;
  /** Follows a turn from the event after `after` (null: from its first); calls `opened` once it does. */
  resume(responseId: string, after: number | null, signal: AbortSignal, opened: () => void): AsyncIterable<TurnEvent>;
  response(responseId: string): Promise<ResponseObject>;
  cancel(responseId: string): Promise<void>;
}

export interface Clock {
  now(): number;
  /** Waits; ends early, without an error, when `signal` is aborted. */
  sleep(ms: number, signal: AbortSignal): Promise<void>;
  /** In [0, 1). */
  random(): number;
}

/** How the reading of one stream ended; a Problem is the server's refusal. */
type Outcome = "ended" | "broken" | "silent" | Problem;

const CANCEL_TRIES = 3;
/** What comes within this time on a new connection was kept back by the old one: that one was dead. */
const OVERDUE_MS = 1000;
/** A stream that spoke within this time is left alone when the page wakes up. */
const FRESH_MS = 1000;

export class TurnRun {
  state: TurnState;
  readonly #transport: Transport;
  readonly #clock: Clock;
  readonly #publish: (state: TurnState) => void;
  readonly #abort = new AbortController();
  #wake = new AbortController();
  #reading: AbortController | null = null;
  #heardAt = 0;
  #tries = 0;
  #cancelling = false;

  /** `state` is that of a new turn, or of one that is known to the server (with its `responseId`). */
  constructor(transport: Transport, clock: Clock, publish: (state: TurnState) => void, state: TurnState) {
    this.#transport = transport;
    this.#clock = clock;
    this.#publish = publish;
    this.state = state;
  }

  /** Sends a new turn and follows it to its end. */
  async create(body: Record<string, unknown>): Promise<TurnState> {
    const outcome = await this.#read((signal) => this.#transport.create(body, signal));
    if (isEnded(this.state.phase)) return this.state;
    if (this.state.responseId === null) return this.#set(fail(this.state, typeof outcome === "object" ? outcome : UNCONFIRMED));
    return this.follow(outcome === "silent");
  }

  /**
   * Follows a turn that is already known to the server, until it ends or is left. `quiet`: the last
   * connection was only silent, so nothing is said of it unless the next one shows that it was dead.
   */
  async follow(quiet = false): Promise<TurnState> {
    while (!isEnded(this.state.phase) && !this.#abort.signal.aborted) {
      if (!quiet) await this.#pause();
      const { responseId, lastSequence } = this.state;
      if (responseId === null) return this.#set(fail(this.state, UNCONFIRMED));
      let openedAt: number | null = null;
      const opened = (): void => {
        if (quiet) openedAt = this.#clock.now();
        else this.#set(reconnected(this.state));
      };
      const heard = (now: number): void => {
        if (openedAt !== null && now - openedAt < OVERDUE_MS) this.#set(reconnected(this.state));
        openedAt = null;
      };
      const outcome = await this.#read((signal) => this.#transport.resume(responseId, lastSequence, signal, opened), heard);
      if (typeof outcome === "object" && !outcome.retryable) return this.#giveUp(responseId, outcome);
      if (this.state.lastSequence !== lastSequence) this.#tries = 0;
      quiet = outcome === "silent";
    }
    return this.state;
  }

  /** Waits for the next try; `nudge` ends the wait. */
  async #pause(): Promise<void> {
    const delay = backoff(this.#tries, this.#clock.random());
    this.#set(resume(this.state, { at: this.#clock.now() + delay, tries: this.#tries }));
    this.#tries += 1;
    this.#wake = new AbortController();
    await this.#clock.sleep(delay, AbortSignal.any([this.#wake.signal, this.#abort.signal]));
  }

  /** The network or the page is back: tries again at once, and no longer trusts a stream that is silent. */
  nudge(): void {
    this.#tries = 0;
    this.#wake.abort();
    if (this.state.responseId !== null && this.#clock.now() - this.#heardAt > FRESH_MS) this.#reading?.abort();
  }

  /** The server has no such stream. It may still have the answer. */
  async #giveUp(responseId: string, problem: Problem): Promise<TurnState> {
    if (problem.kind !== "gone") return this.#set(breakOff(this.state, problem));
    try {
      const settled = settle(this.state, await this.#transport.response(responseId));
      if (settled !== null) return this.#set(settled);
    } catch {
      // It has not.
    }
    return this.#set(breakOff(this.state, GONE));
  }

  /** Asks the server to stop; asked a second time, the page leaves without waiting for it. */
  stop(): void {
    if (isEnded(this.state.phase)) return;
    if (this.state.stopping) {
      this.#set(breakOff(this.state, stoppedHere));
      this.#abort.abort();
      return;
    }
    this.#set(stop(this.state));
    void this.#cancel();
  }

  /** Stops reading without stopping the turn (the page goes elsewhere). */
  leave(): void {
    this.#abort.abort();
  }

  /** Applies events until the turn has ended or the stream has to be picked up again. */
  async #read(open: (signal: AbortSignal) => AsyncIterable<TurnEvent>, heard: (now: number) => void = () => {}): Promise<Outcome> {
    const reading = new AbortController();
    this.#reading = reading;
    this.#heardAt = this.#clock.now();
    try {
      for await (const event of open(AbortSignal.any([this.#abort.signal, reading.signal]))) {
        this.#heardAt = this.#clock.now();
        heard(this.#heardAt);
        const [next, verdict] = advance(this.state, event, this.#heardAt);
        if (verdict === "gap" || verdict === "break") return "broken";
        if (next !== this.state) this.#set(next);
        if (isEnded(this.state.phase)) return "ended";
        // Stop was pressed before the server had named the turn.
        if (this.state.stopping) void this.#cancel();
      }
    } catch (error) {
      if (error instanceof Silent) return "silent";
      if (error instanceof Refused && !reading.signal.aborted) return error.problem;
    } finally {
      this.#reading = null;
    }
    return reading.signal.aborted ? "silent" : "broken";
  }

  async #cancel(): Promise<void> {
    const { responseId } = this.state;
    if (responseId === null || this.#cancelling) return;
    this.#cancelling = true;
    for (let tries = 1; tries <= CANCEL_TRIES; tries++) {
      try {
        await this.#transport.cancel(responseId);
        return;
      } catch (error) {
        // Refused means that the turn is over or unknown; its stream will say so.
        if (error instanceof Refused && error.problem !== UNREACHABLE) return;
        await this.#clock.sleep(backoff(tries, this.#clock.random()), this.#abort.signal);
      }
    }
    if (isEnded(this.state.phase)) return;
    this.#set(breakOff(this.state, stoppedHere));
    this.#abort.abort();
  }

  #set(state: TurnState): TurnState {
    this.state = state;
    this.#publish(state);
    return state;
  }
}

const stoppedHere: Problem = {
  kind: "lost",
  title: "Stopped on this page only",
  detail: "The server could not be told, and may still be writing.",
  retryable: true,
};
