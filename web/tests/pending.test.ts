import { describe, expect, it } from "vitest";
import { backoff, LONGEST_MS } from "../src/lib/backoff";
import { pendingOf, readPending, restored } from "../src/lib/pending";
import { advance, newTurn, type TurnState } from "../src/lib/turn";
import { answerEvents } from "./events";

const LIVE = { question: "q", after: "item" };
const LEAST = { question: "q", after: "item", responseId: null, seen: null };

function play(state: TurnState, from: number, to?: number): TurnState {
  return answerEvents(["one ", "two ", "three"]).slice(from, to).reduce((before, event) => advance(before, event, 0)[0], state);
}

describe("a turn in storage", () => {
  it("goes on after a reload, wherever that happened, as if there had been none", () => {
    for (let cut = 1; cut < 10; cut++) {
      const stored = JSON.parse(JSON.stringify(pendingOf({ ...LIVE, state: play(newTurn(0), 0, cut) })));
      const pending = readPending(stored);
      if (pending === null) throw new Error("not read");
      expect(pending.seen?.lastSequence).toBe(cut - 1);
      expect(play(restored(pending).state, cut)).toMatchObject({ phase: "completed", text: "one two three", itemId: "msg_1" });
    }
  });

  it("is read again from its first event where it was too long to keep, or has a hole", () => {
    const long = { ...newTurn(null, "r"), lastSequence: 7, parts: [{ kind: "text" as const, id: "a", text: "x".repeat(200_001), done: false }] };
    expect(pendingOf({ ...LIVE, state: long })).toEqual({ ...LEAST, responseId: "r" });
    expect(pendingOf({ ...LIVE, state: { ...long, parts: [], hole: true } }).seen).toBeNull();
    expect(restored({ ...LEAST, responseId: "r" }).state.lastSequence).toBeNull();
  });

  it("answers a question that is stored, or one that is new", () => {
    for (const question of [null, "q"]) expect(restored(readPending({ ...LEAST, question }) ?? LEAST)).toMatchObject({ question, after: "item" });
  });

  it.each([null, 7, {}, { question: 1 }, []])("is no use as %j", (stored) => expect(readPending(stored)).toBeNull());

  it.each([
    { itemId: 3, lastSequence: 1, parts: [] },
    { itemId: null, lastSequence: "1", parts: [] },
    { itemId: null, lastSequence: 1, parts: [{ kind: "text", id: "a", done: true }] },
    { itemId: null, lastSequence: 1, parts: [{ kind: "call", id: "a", done: true, name: 1 }] },
    { itemId: null, lastSequence: 1, parts: [null] },
  ])("loses what was seen rather than trust %j", (seen) => {
    expect(readPending({ question: "q", responseId: "r", seen })).toEqual({ ...LEAST, after: null, responseId: "r" });
  });

  it("has seen nothing of a turn that was never confirmed", () => {
    expect(readPending({ question: "q", responseId: null, seen: { itemId: null, lastSequence: 1, parts: [] } })?.seen).toBeNull();
  });
});

describe("backoff", () => {
  it("grows, is drawn from half to the whole of its wait, and never passes its bound", () => {
    expect([0, 1, 2, 3].map((tries) => backoff(tries, 0))).toEqual([0, 250, 500, 1000]);
    for (let tries = 1; tries < 2000; tries = tries * 2 + 1) {
      const [low, high] = [backoff(tries, 0), backoff(tries, 0.999)];
      expect(high).toBeGreaterThan(low);
      expect(high).toBeLessThanOrEqual(LONGEST_MS);
    }
  });
});
