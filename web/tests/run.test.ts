import { describe, expect, it } from "vitest";
import { explain, UNREACHABLE } from "../src/lib/problem";
import { Refused, Silent, TurnRun, type Clock, type Transport } from "../src/lib/run";
import type { ResponseObject, TurnEvent } from "../src/lib/wire";
import { newTurn, type TurnState } from "../src/lib/turn";
import { answerEvents } from "./events";

const EVENTS = answerEvents(["one ", "two ", "three"]);
const GONE = explain({ status: 404, code: null, message: "unknown" });

class TestClock implements Clock {
  time = 0;
  slept: number[] = [];
  now(): number {
    return ++this.time;
  }
  random(): number {
    return 0;
  }
  async sleep(ms: number, _signal: AbortSignal): Promise<void> {
    this.slept.push(ms);
  }
}

/** Events, then what happens: an error is thrown; nothing, and the stream simply ends. */
interface Script {
  events: TurnEvent[];
  error?: Error;
  /** The connection is there before the first event. */
  opens?: boolean;
  /** Called before the end; a promise is waited for. */
  then?: (signal: AbortSignal) => unknown;
}

/** Plays one script a call; the server is away when there is none left. */
class ScriptedTransport implements Transport {
  asked: (number | null)[] = [];
  cancelled: string[] = [];
  cancelError: Error | null = null;
  stored: ResponseObject | null = null;
  constructor(readonly scripts: Script[]) {}

  async *#next(signal: AbortSignal, opened: () => void): AsyncGenerator<TurnEvent> {
    const script = this.scripts.shift();
    if (script === undefined) throw new Refused(UNREACHABLE);
    if (script.events.length > 0 || script.opens === true) opened();
    for (const event of script.events) {
      await Promise.resolve();
      yield event;
    }
    await script.then?.(signal);
    if (script.error !== undefined) throw script.error;
  }
  create(_body: unknown, signal: AbortSignal): AsyncIterable<TurnEvent> {
    return this.#next(signal, () => {});
  }
  resume(_id: string, after: number | null, signal: AbortSignal, opened: () => void): AsyncIterable<TurnEvent> {
    this.asked.push(after);
    return this.#next(signal, opened);
  }
  async response(): Promise<ResponseObject> {
    if (this.stored === null) throw new Refused(GONE);
    return this.stored;
  }
  async cancel(id: string): Promise<void> {
    this.cancelled.push(id);
    if (this.cancelError !== null) throw this.cancelError;
  }
}

function start(scripts: Script[], from: TurnState = newTurn(0)) {
  const transport = new ScriptedTransport(scripts);
  const states: TurnState[] = [];
  const clock = new TestClock();
  const run = new TurnRun(transport, clock, (state) => states.push(state), from);
  return { transport, states, clock, run };
}

/** The distinct phases, in order. */
function phases(states: readonly TurnState[]): string[] {
  return states.map(({ phase }) => phase).filter((phase, at, all) => phase !== all[at - 1]);
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

  it("never gives up on a server that is away, waits longer each time, and says when it tries again", async () => {
    const away: Script[] = Array.from({ length: 20 }, () => ({ events: [], error: new Refused(UNREACHABLE) }));
    const { run, states, clock } = start([{ events: EVENTS.slice(0, 5) }, ...away, { events: EVENTS.slice(5) }]);
    const state = await run.create({});
    expect([state.phase, state.text, state.resumed]).toEqual(["completed", "one two three", 1]);
    expect(clock.slept.slice(0, 5)).toEqual([0, 250, 500, 1000, 2000]);
    expect(Math.max(...clock.slept)).toBe(15_000);
    expect(states.filter(({ phase }) => phase === "resuming").map(({ retry }) => retry?.tries).slice(0, 4)).toEqual([0, 1, 2, 3]);
    expect(state.retry).toBeNull();
  });

  it("tries again at once when the page or the network is back", async () => {
    const setup = start([{ events: EVENTS.slice(0, 5) }, { events: [] }, { events: [] }, { events: EVENTS.slice(5) }]);
    const woken: number[] = [];
    setup.clock.sleep = (ms, signal) =>
      new Promise<void>((resolve) => {
        woken.push(ms);
        signal.addEventListener("abort", () => resolve());
        setTimeout(() => setup.run.nudge(), 0);
      });
    expect((await setup.run.create({})).phase).toBe("completed");
    expect(woken).toEqual([0, 0, 0]);
  });

  it("leaves a silent stream for another one without a word, if nothing was kept back", async () => {
    const { run, states, transport, clock } = start([
      { events: EVENTS.slice(0, 5), error: new Silent() },
      { events: [], opens: true, then: () => (clock.time += 5000), error: new Silent() },
      { events: [], opens: true, then: () => (clock.time += 5000) },
      { events: EVENTS.slice(5) },
    ]);
    // The third stream ends without a terminal event: that is a break, and is said.
    const state = await run.create({});
    expect([state.text, state.resumed]).toEqual(["one two three", 1]);
    expect(transport.asked).toEqual([4, 4, 4]);
    expect(clock.slept).toEqual([0]);
    expect(phases(states)).toEqual(["waiting", "streaming", "resuming", "streaming", "completed"]);
  });

  it("says that a silent stream was dead, if the next one brings what it kept back", async () => {
    const { run, states } = start([{ events: EVENTS.slice(0, 5), error: new Silent() }, { events: EVENTS.slice(5) }]);
    expect(await run.create({})).toMatchObject({ phase: "completed", resumed: 1 });
    expect(phases(states)).not.toContain("resuming");
  });

  it("drops a stream that says nothing when the page wakes up", async () => {
    const setup = start([
      { events: EVENTS.slice(0, 5), then: (signal) => {
        setup.clock.time += 5000;
        setTimeout(() => setup.run.nudge(), 0);
        return new Promise((_, reject) => signal.addEventListener("abort", () => reject(new Error("aborted"))));
      } },
      { events: EVENTS.slice(5) },
    ]);
    expect((await setup.run.create({})).text).toBe("one two three");
    expect(setup.transport.asked).toEqual([4]);
  });

  it("keeps what had arrived of a turn that the server no longer knows, and marks it as cut off", async () => {
    const { run, transport } = start([{ events: EVENTS.slice(0, 5) }, { events: [], error: new Refused(GONE) }]);
    const state = await run.create({});
    expect([state.phase, state.problem?.kind, state.text]).toEqual(["broken", "gone", "one "]);
    expect(transport.asked).toEqual([4]);
  });

  it("takes the stored answer where only its events are gone", async () => {
    const { run, transport } = start([{ events: EVENTS.slice(0, 5) }, { events: [], error: new Refused(GONE) }]);
    const output = [{ id: "msg_1", type: "message", role: "assistant", content: [{ type: "output_text", text: "one two three" }] }];
    transport.stored = { id: "resp_1", status: "completed", output };
    expect(await run.create({})).toMatchObject({ phase: "completed", text: "one two three" });
  });

  it("does not take an error of the stream for the end of the turn", async () => {
    const trouble = { type: "error", code: "server_error", message: "the store does not answer", sequence_number: 0 };
    const { run } = start([{ events: [...EVENTS.slice(0, 5), trouble] }, { events: EVENTS.slice(5) }]);
    expect(await run.create({})).toMatchObject({ phase: "completed", text: "one two three" });
  });

  it("ends quietly when it is left", async () => {
    const setup = start([{ events: EVENTS.slice(0, 5), then: () => setup.run.leave() }]);
    expect((await setup.run.create({})).phase).toBe("streaming");
    expect(setup.transport.asked).toEqual([]);
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
    const { run, transport } = start([{ events: EVENTS }], newTurn(null, "resp_1"));
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
