import { describe, expect, it } from "vitest";
import { advance, breakOff, fail, isEnded, newTurn, reconnected, resume, settle, stop, type TurnState } from "../src/lib/turn";
import { GONE, UNCONFIRMED } from "../src/lib/problem";
import { answerEvents, delta } from "./events";
import type { TurnEvent } from "../src/lib/wire";

function play(events: readonly TurnEvent[], from: TurnState = newTurn(0)): TurnState {
  return events.reduce((state, event, at) => advance(state, event, 100 + at)[0], from);
}

describe("advance", () => {
  it("puts an answer together from its events", () => {
    const state = play(answerEvents(["Hel", "lo ", "you"]));
    expect(state.phase).toBe("completed");
    expect(state.text).toBe("Hello you");
    expect(state.responseId).toBe("resp_1");
    expect(state.itemId).toBe("msg_1");
    expect(state.usage?.output_tokens).toBe(3);
  });

  it("drops events it already has and refuses gaps, so that resuming never doubles text", () => {
    const events = answerEvents(["a", "b", "c"]);
    const half = play(events.slice(0, 5));
    expect(half.text).toBe("a");
    for (const again of events.slice(0, 5)) expect(advance(half, again, 0)).toEqual([half, "duplicate"]);
    const later = events[7];
    if (later === undefined) throw new Error("too few events");
    expect(advance(half, later, 0)).toEqual([half, "gap"]);
    expect(play(events, half).text).toBe("abc");
  });

  it("takes deltas that the server merged for a reader that lags", () => {
    const events = answerEvents(["a", "b", "c"]);
    const [state, verdict] = advance(play(events.slice(0, 5)), delta("bc", 6), 0);
    expect([state.text, state.lastSequence, verdict]).toEqual(["abc", 6, "applied"]);
    expect(play(events, state)).toMatchObject({ text: "abc", phase: "completed" });
  });

  it("gives the same text wherever the stream is cut and resumed", () => {
    const events = answerEvents(["one ", "two ", "three"]);
    for (let cut = 1; cut < events.length; cut++) {
      const resumed = reconnected(resume(play(events.slice(0, cut))));
      const after = resumed.lastSequence;
      const state = play(events.filter((event) => after === null || (event.sequence_number ?? 0) > after), resumed);
      expect(state.text).toBe("one two three");
      expect(state.phase).toBe("completed");
      expect(state.resumed).toBe(1);
    }
  });

  it("takes nothing after the terminal event", () => {
    const state = play(answerEvents(["x"]));
    expect(advance(state, delta("y", (state.lastSequence ?? 0) + 1), 0)[0]).toBe(state);
  });

  it.each([
    ["response.cancelled", "cancelled"],
    ["response.incomplete", "incomplete"],
    ["response.failed", "failed"],
  ] as const)("never shows an answer that ended with %s as complete", (type, phase) => {
    const events = answerEvents(["half of"]).slice(0, -1);
    const response = { id: "resp_1", error: { code: "server_error", message: "no memory" }, incomplete_details: { reason: "max_output_tokens" } };
    const state = play([...events, { type, sequence_number: events.length, response }]);
    expect(state.phase).toBe(phase);
    expect(state.text).toBe("half of");
    expect(state.problem !== null).toBe(phase === "failed");
    expect(state.incompleteReason).toBe("max_output_tokens");
  });

  it("ends on an error event, flat or nested", () => {
    const flat = advance(newTurn(0), { type: "error", message: "too long", code: "context_length_exceeded" }, 0)[0];
    expect(flat.problem?.kind).toBe("context");
    const nested = advance(newTurn(0), { type: "error", status: 429, error: { message: "slow down" } }, 0)[0];
    expect([nested.phase, nested.problem?.kind]).toEqual(["failed", "busy"]);
  });

  it("does not end on an error of the stream: the turn goes on", () => {
    const half = play(answerEvents(["a"]).slice(0, 5));
    expect(advance(half, { type: "error", message: "the store does not answer", sequence_number: 0 }, 0)).toEqual([half, "break"]);
  });

  it("shows lost history as a hole, which the whole answer at the end fills", () => {
    const events = answerEvents(["one ", "two ", "three"]);
    const gap = { type: "response.millrace.discontinuity", sequence_number: 5, first_lost: 5, last_lost: 5 };
    const holed = play([...events.slice(0, 5), gap, ...events.slice(6, 7)]);
    expect([holed.text, holed.hole, holed.phase]).toEqual(["one three", true, "streaming"]);
    const failed = play([{ type: "response.failed", sequence_number: 7, response: { id: "resp_1", error: { code: "history_lost" } } }], holed);
    expect([failed.text, failed.hole, failed.phase]).toEqual(["one three", true, "failed"]);
    const output = [{ id: "msg_1", type: "message", role: "assistant", content: [{ type: "output_text", text: "one two three" }] }];
    const healed = play([{ type: "response.completed", sequence_number: 7, response: { id: "resp_1", output } }], holed);
    expect([healed.text, healed.hole, healed.phase]).toEqual(["one two three", false, "completed"]);
  });

  it("ends by a stored response only if that has ended", () => {
    const half = play(answerEvents(["half"]).slice(0, 5));
    expect(settle(half, { id: "resp_1", status: "in_progress" })).toBeNull();
    expect(settle(half, { id: "resp_1", status: "failed", error: { code: "takeover_failed", message: "gone" } })).toMatchObject({
      phase: "failed", text: "half", problem: { detail: "gone" },
    });
  });

  it("ignores events it does not know, and still counts them", () => {
    const [state, verdict] = advance(newTurn(0), { type: "response.millrace.prompt", sequence_number: 0 }, 0);
    expect([state.lastSequence, verdict]).toEqual([0, "applied"]);
  });
});

describe("phases", () => {
  it("cannot leave an end", () => {
    const done = play(answerEvents(["x"]));
    for (const change of [(s: TurnState) => fail(s, UNCONFIRMED), (s: TurnState) => breakOff(s, GONE), resume, stop]) {
      expect(change(done)).toBe(done);
    }
    expect(isEnded(done.phase)).toBe(true);
  });

  it("tells text that came in one burst from text that was written over time", () => {
    const events = answerEvents(["one ", "two ", "three"]);
    const at = (times: readonly number[]): TurnState =>
      events.slice(0, 7).reduce((state, event, index) => advance(state, event, times[index - 4] ?? 0)[0], newTurn(0));
    expect(at([100, 105, 110])).toMatchObject({ firstTextAt: 100, lastTextAt: 110, firstTextLength: 13 });
    expect(at([100, 150, 200])).toMatchObject({ firstTextAt: 100, lastTextAt: 200, firstTextLength: 4 });
  });

  it("does not time what it did not see", () => {
    const followed = play(answerEvents(["a", "b"]), newTurn(null, "resp_1"));
    expect([followed.firstTextAt, followed.lastTextAt]).toEqual([null, null]);
    expect(resume(play(answerEvents(["a", "b"]).slice(0, 6))).firstTextAt).toBeNull();
  });
});
