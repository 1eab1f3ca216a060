import { describe, expect, it } from "vitest";
import { explain, UNREACHABLE } from "../src/lib/problem";
import { Refused, TurnRun, type Clock, type Transport } from "../src/lib/run";
import type { TurnEvent } from "../src/lib/wire";
import type { TurnState } from "../src/lib/turn";
import { answerEvents } from "./events";

const EVENTS = answerEvents(["one ", "two ", "three"]);
const GONE = explain({ status: 404, code: null, message: "unknown" });

class TestClock implements Clock {
  time = 0;
  slept: number[] = [];
  now(): number {
    return ++this.time;
  }
  async sleep(ms: number): Promise<void> {
    this.slept.push(ms);
  }
}

/** Plays one script a call: events, then an error to throw, or none to simply end. */
class ScriptedTransport implements Transport {
  asked: (number | null)[] = [];
  cancelled: string[] = [];
  cancelError: Error | null = null;
  constructor(readonly scripts: { events: TurnEvent[]; error?: Error }[]) {}

  async *#next(): AsyncGenerator<TurnEvent> {
    const script = this.scripts.shift();
    if (script === undefined) throw new Refused(UNREACHABLE);
    for (const event of script.events) {
      await Promise.resolve();
      yield event;
    }
    if (script.error !== undefined) throw script.error;
  }
  create(): AsyncIterable<TurnEvent> {
    return this.#next();
  }
  resume(_id: string, after: number | null): AsyncIterable<TurnEvent> {
    this.asked.push(after);
    return this.#next();
  }
  async cancel(id: string): Promise<void> {
    this.cancelled.push(id);
    if (this.cancelError !== null) throw this.cancelError;
  }
}

function start(scripts: ScriptedTransport["scripts"], responseId: string | null = null) {
  const transport = new ScriptedTransport(scripts);
  const states: TurnState[] = [];
  const clock = new TestClock();
  const run = new TurnRun(transport, clock, (state) => states.push(state), responseId);
  return { transport, states, clock, run };
}

describe("TurnRun", () => {
  it("follows an answer to its end", async () => {
    const { run, states, transport } = start([{ events: EVENTS }]);
    const state = await run.create({});
    expect([state.phase, state.text]).toEqual(["completed", "one two three"]);
    expect(states.map(({ text }) => text)).toContain("one two ");
    expect(transport.asked).toEqual([]);
  });

  it("picks a broken stream up after the last event it had, however often it breaks", async () => {
    const { run, states, transport } = start([
      { events: EVENTS.slice(0, 5), error: new Error("reset") },
      { events: EVENTS.slice(5, 6) },
      { events: [], error: new Refused(UNREACHABLE) },
      { events: EVENTS.slice(6) },
    ]);
    const state = await run.create({});
    expect([state.phase, state.text]).toEqual(["completed", "one two three"]);
    expect(transport.asked).toEqual([4, 5, 5]);
    expect(states.some(({ phase }) => phase === "resuming")).toBe(true);
  });

  it("asks again for what a gap left out", async () => {
    const { run, transport } = start([{ events: [...EVENTS.slice(0, 5), ...EVENTS.slice(7)] }, { events: EVENTS.slice(5) }]);
    expect((await run.create({})).text).toBe("one two three");
    expect(transport.asked).toEqual([4]);
  });

  it("gives up on a server that stays away, and says that the answer is not whole", async () => {
    const { run, clock } = start([{ events: EVENTS.slice(0, 5) }]);
    const state = await run.create({});
    expect([state.phase, state.text, state.problem?.kind]).toEqual(["broken", "one ", "lost"]);
    expect(clock.slept.length).toBeGreaterThan(5);
  });

  it("does not keep asking for a turn that the server does not know", async () => {
    const { run, transport } = start([{ events: EVENTS.slice(0, 5) }, { events: [], error: new Refused(GONE) }]);
    expect((await run.create({})).phase).toBe("broken");
    expect(transport.asked).toEqual([4]);
  });

  it("says so when the request may not have arrived", async () => {
    const state = await start([{ events: [], error: new Error("closed") }]).run.create({});
    expect([state.phase, state.problem?.kind]).toEqual(["failed", "lost"]);
  });

  it("shows the server's refusal", async () => {
    const refusal = explain({ status: 400, code: "context_length_exceeded", message: "5000 tokens" });
    const state = await start([{ events: [], error: new Refused(refusal) }]).run.create({});
    expect([state.phase, state.problem]).toEqual(["failed", refusal]);
  });

  it("reads a turn that began before the page was loaded from its first event", async () => {
    const { run, transport } = start([{ events: EVENTS }], "resp_1");
    const state = await run.follow();
    expect([state.phase, state.text, state.sentAt]).toEqual(["completed", "one two three", null]);
    expect(transport.asked).toEqual([null]);
  });

  it("tells the server to stop, once it knows the turn's name", async () => {
    const cancelled = { type: "response.cancelled", sequence_number: 5, response: { id: "resp_1" } };
    const { run, transport } = start([{ events: [...EVENTS.slice(0, 5), cancelled] }]);
    const ended = run.create({});
    run.stop();
    const state = await ended;
    expect(transport.cancelled).toEqual(["resp_1"]);
    expect([state.phase, state.text, state.stopping]).toEqual(["cancelled", "one ", false]);
  });

  it("leaves at a second stop without waiting", async () => {
    const { run } = start([{ events: EVENTS.slice(0, 5) }]);
    const ended = run.create({});
    run.stop();
    run.stop();
    expect((await ended).phase).toBe("broken");
  });
});
