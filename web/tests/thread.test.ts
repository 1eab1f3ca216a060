import { describe, expect, it } from "vitest";
import { BrowserStore } from "../src/lib/storage";
import { fromItems, lastExchange, titleFrom, withoutStored, withPending, withTurn, type Note } from "../src/lib/thread";
import { newTurn } from "../src/lib/turn";
import type { Item } from "../src/lib/wire";

const user = (id: string, text: string): Item => ({ id, type: "message", role: "user", content: [{ type: "input_text", text }] });
const answer = (id: string, text: string, status = "completed"): Item => ({
  id, type: "message", role: "assistant", status, content: [{ type: "output_text", text }],
});
const note: Note = { ttft_s: 0.1, tokensPerSecond: 20, outputTokens: 9, phase: "cancelled", reason: null };

describe("fromItems", () => {
  it("shows stored messages with the figures this browser kept", () => {
    const messages = fromItems([user("u1", "Hi"), answer("a1", "Hello", "incomplete"), { id: "r", type: "reasoning" }], { a1: note });
    expect(messages.map(({ role, key }) => [role, key])).toEqual([["user", "u1"], ["assistant", "a1"]]);
    expect(messages[1]).toMatchObject({ stats: { tokensPerSecond: 20 }, turn: { phase: "cancelled", text: "Hello" } });
  });

  it("never takes a stored incomplete answer for a whole one", () => {
    const phases = (status: string, phase: Note["phase"] | null) =>
      fromItems([answer("a", "x", status)], phase === null ? {} : { a: { ...note, phase } }).map((m) => m.role === "assistant" && m.turn.phase);
    expect(phases("incomplete", null)).toEqual(["incomplete"]);
    expect(phases("incomplete", "completed")).toEqual(["incomplete"]);
    expect(phases("completed", "broken")).toEqual(["completed"]);
  });
});

describe("a turn that outlived the page", () => {
  const turn = newTurn(null, "resp_1");

  it("is appended to its question, stored or not", () => {
    const stored = fromItems([user("u1", "Hi")], {});
    expect(withPending(stored, "Hi", "t", turn).map(({ key }) => key)).toEqual(["u1", "t"]);
    expect(withPending([], "Hi", "t", turn).map(({ role }) => role)).toEqual(["user", "assistant"]);
  });

  it("takes the place of its own stored copy", () => {
    const stored = fromItems([user("u0", "A"), answer("a0", "B"), user("u1", "Hi"), answer("msg_1", "Hello")], {});
    const both = withPending(stored, "Hi", "t", turn);
    expect(withoutStored(both, "msg_1").map(({ key }) => key)).toEqual(["u0", "a0", "t-question", "t"]);
    expect(withoutStored(both, "other")).toHaveLength(both.length);
  });

  it("is updated in its place", () => {
    const messages = withTurn(withPending([], "Hi", "t", turn), "t", { ...turn, text: "Hel" });
    expect(messages[1]).toMatchObject({ turn: { text: "Hel" } });
  });
});

describe("lastExchange", () => {
  const earlier = [user("u0", "A"), answer("a0", "B")];
  it("is the answer and its question", () => {
    expect(lastExchange([...earlier, user("u1", "Hi"), answer("a1", "Hello")], "Hi", "a1")).toEqual(["a1", "u1"]);
  });
  it("is the question alone when it was stopped before the first word", () => {
    expect(lastExchange([...earlier, user("u1", "Hi")], "Hi", null)).toEqual(["u1"]);
  });
  it("is nothing when the server stored nothing", () => {
    expect(lastExchange(earlier, "Hi", null)).toEqual([]);
    expect(lastExchange(earlier, "Hi", "a1")).toEqual([]);
    expect(lastExchange([], "Hi", null)).toEqual([]);
  });
});

describe("titleFrom", () => {
  it.each([
    ["  Hi  there\n", "Hi there"],
    ["", "New chat"],
    ["What should I wear if it rains all day tomorrow in town?", "What should I wear if it rains all day tomorrow…"],
  ])("%j", (question, title) => expect(titleFrom(question)).toBe(title));
  it("cuts long words too", () => expect(titleFrom("x".repeat(80))).toBe("x".repeat(48) + "…"));
});

describe("BrowserStore", () => {
  it("keeps conversations, pending turns and figures, and forgets them together", () => {
    localStorage.clear();
    const store = new BrowserStore(localStorage);
    store.saveConversations([{ id: "c", title: "t", createdAt: 1, updatedAt: 2 }]);
    store.savePending("c", { question: "q", responseId: null, seen: null });
    store.saveNote("c", "a", note);
    const again = new BrowserStore(localStorage);
    expect(again.conversations()).toHaveLength(1);
    expect(again.pending("c")).toEqual({ question: "q", responseId: null, seen: null });
    expect(again.notes("c")).toEqual({ a: note });
    again.forget("c");
    expect([again.conversations(), again.pending("c"), again.notes("c")]).toEqual([[], null, {}]);
    expect(localStorage.getItem("millrace.pending")).toBeNull();
  });

  it("stands rubbish and storage that is forbidden", () => {
    localStorage.setItem("millrace.conversations", '[{"id":3},7,null]');
    localStorage.setItem("millrace.pending", "{");
    expect(new BrowserStore(localStorage).conversations()).toEqual([]);
    expect(new BrowserStore(localStorage).pending("c")).toBeNull();
    const none = new BrowserStore(null);
    none.saveNote("c", "a", note);
    expect(none.conversations()).toEqual([]);
  });
});
