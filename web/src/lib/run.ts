/**
 * Sees one turn through: sends it, follows it across broken connections, stops it.
 *
 * Reads from a Transport and publishes states; knows nothing of sockets, HTTP or the page.
 */
import { LOST, UNCONFIRMED, UNREACHABLE, type Problem } from "./problem";
import { advance, breakOff, fail, isEnded, newTurn, resume, stop, type TurnState } from "./turn";
import type { TurnEvent } from "./wire";

/** The server (or the network before it) refused in so many words. */
export class Refused extends Error {
  constructor(readonly problem: Problem) {
    super(problem.title);
  }
}

export interface Transport {
  /** Starts a turn. Throws Refused if the server said no; ends or throws otherwise if it broke. */
  create(body: Record<string, unknown>, signal: AbortSignal): AsyncIterable<TurnEvent>;
  /** Follows a turn from the event after `after` (null: from its first). */
  resume(responseId: string, after: number | null, signal: AbortSignal): AsyncIterable<TurnEvent>;
  cancel(responseId: string): Promise<void>;
}

export interface Clock {
  now(): number;
  sleep(ms: number): Promise<void>;
}

/** Waits between tries to pick a stream up again: a minute and a half in all. */
const DELAYS_MS = [0, 300, 700, 1500, 3000, 5000, 5000, 10_000, 10_000, 10_000, 15_000, 15_000, 15_000];
const CANCEL_TRIES = 3;

export class TurnRun {
  state: TurnState;
  readonly #transport: Transport;
  readonly #clock: Clock;
  readonly #publish: (state: TurnState) => void;
  readonly #abort = new AbortController();
  #cancelling = false;

  constructor(transport: Transport, clock: Clock, publish: (state: TurnState) => void, responseId: string | null = null) {
    this.#transport = transport;
    this.#clock = clock;
    this.#publish = publish;
    this.state = newTurn(responseId === null ? clock.now() : null, responseId);
  }

  /** Sends a new turn and follows it to its end. */
  async create(body: Record<string, unknown>): Promise<TurnState> {
    try {
      if (await this.#read(this.#transport.create(body, this.#abort.signal))) return this.state;
    } catch (error) {
      if (error instanceof Refused) return this.#set(fail(this.state, error.problem));
    }
    if (this.state.responseId === null) return this.#set(fail(this.state, UNCONFIRMED));
    this.#set(resume(this.state));
    return this.follow();
  }

  /** Follows a turn that is already known to the server. */
  async follow(): Promise<TurnState> {
    let tries = 0;
    while (!isEnded(this.state.phase)) {
      const { responseId, lastSequence } = this.state;
      if (responseId === null || tries >= DELAYS_MS.length) return this.#set(breakOff(this.state, LOST));
      await this.#clock.sleep(DELAYS_MS[tries] ?? 0);
      tries += 1;
      try {
        if (await this.#read(this.#transport.resume(responseId, lastSequence, this.#abort.signal))) break;
      } catch (error) {
        if (error instanceof Refused && !error.problem.retryable) return this.#set(breakOff(this.state, error.problem));
      }
      if (this.state.lastSequence !== lastSequence) {
        tries = 0;
        this.#set(resume(this.state));
      }
    }
    return this.state;
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

  /** Applies events until the turn has ended (true) or the stream has to be picked up again. */
  async #read(events: AsyncIterable<TurnEvent>): Promise<boolean> {
    for await (const event of events) {
      const [next, verdict] = advance(this.state, event, this.#clock.now());
      if (verdict === "gap") return false;
      if (next !== this.state) this.#set(next);
      if (isEnded(this.state.phase)) return true;
      // Stop was pressed before the server had named the turn.
      if (this.state.stopping) void this.#cancel();
    }
    return isEnded(this.state.phase);
  }

  async #cancel(): Promise<void> {
    const { responseId } = this.state;
    if (responseId === null || this.#cancelling) return;
    this.#cancelling = true;
    for (let tries = 0; tries < CANCEL_TRIES; tries++) {
      try {
        await this.#transport.cancel(responseId);
        return;
      } catch (error) {
        // Refused means that the turn is over or unknown; its stream will say so.
        if (error instanceof Refused && error.problem !== UNREACHABLE) return;
        await this.#clock.sleep(DELAYS_MS[tries + 1] ?? 0);
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
