import { describe, expect, it } from "vitest";
import { BrowserStore } from "../src/lib/storage";
import { messagesOf, messagesWith, titleFrom, withTurn, type Message, type Note } from "../src/lib/thread";
import { Tree, type TreeItem } from "../src/lib/tree";
import { newTurn } from "../src/lib/turn";
import { answer, chain, question } from "./items";

const note: Note = { ttft_s: 0.1, tokensPerSecond: 20, outputTokens: 9, phase: "cancelled", reason: null };
const NONE = new Map();

/** Texts of a branch, with the versions of each message. */
function shown(messages: readonly Message[]): string[] {
  return messages.map(({ place, ...message }) => `${message.role === "user" ? message.text : message.turn.text} ${place.at + 1}/${place.count}`);
}

/** Two questions at the root; the second has two answers, and the first of these goes on. */
const ITEMS: TreeItem[] = [
  question("u1", null, "Hi"),
  answer("a1", "u1", "Hello"),
  question("u2", null, "Hey"),
  answer("a2", "u2", "Hey you"),
  question("u3", "a2", "More"),
  answer("a3", "u2", "Hey there"),
];

describe("Tree", () => {
  it("shows the path to its head, and every item on some path", () => {
    const ids = (head: string | null) => new Tree(ITEMS, head).path().map(({ id }) => id);
    expect(ids("u3")).toEqual(["u2", "a2", "u3"]);
    expect(ids("a1")).toEqual(["u1", "a1"]);
    expect([ids(null), ids("unknown")]).toEqual([[], []]);
    expect(new Tree(ITEMS, "a1").withHead("a3").path("nowhere").map(({ id }) => id)).toEqual(["u2", "a3"]);
  });

  it("ends its walks even in a tree that cannot be", () => {
    const loop = [question("x", "y", ""), answer("y", "x", "")];
    expect(new Tree(loop, "x").path().length).toBeLessThan(4);
    expect(new Tree([question("x", "gone", "")], "x").path().map(({ id }) => id)).toEqual(["x"]);
  });
});

describe("messagesOf", () => {
  it("tells of each message which of its versions it is", () => {
    expect(shown(messagesOf(new Tree(ITEMS, "u3"), {}, NONE))).toEqual(["Hey 2/2", "Hey you 1/2", "More 1/1"]);
    expect(shown(messagesOf(new Tree(ITEMS, "a3"), {}, NONE))).toEqual(["Hey 2/2", "Hey there 2/2"]);
    const [first] = messagesOf(new Tree(ITEMS, "a1"), {}, NONE);
    expect(first?.place).toEqual({ first: "u1", last: "u1", parent: null, siblings: ["u1", "u2"], at: 0, count: 2 });
  });

  it("shows stored messages with the figures this browser kept", () => {
    const messages = messagesOf(chain([question("u1", null, "Hi"), answer("a1", null, "Hello", "incomplete")]), { a1: note }, NONE);
    expect(messages[1]).toMatchObject({ stats: { tokensPerSecond: 20 }, turn: { phase: "cancelled", text: "Hello" }, again: true });
  });

  it("prefers what this page saw of an answer", () => {
    const seen = { ...newTurn(null, "resp_1"), phase: "completed" as const, text: "Hello", resumed: 2 };
    expect(messagesOf(new Tree(ITEMS, "a1"), {}, new Map([["a1", seen]]))[1]).toMatchObject({ turn: { resumed: 2 } });
  });

  it("never takes a stored incomplete answer for a whole one", () => {
    const phases = (status: string, phase: Note["phase"] | null) =>
      messagesOf(chain([answer("a", null, "x", status)]), phase === null ? {} : { a: { ...note, phase } }, NONE).map((m) => m.role === "assistant" && m.turn.phase);
    expect(phases("incomplete", null)).toEqual(["incomplete"]);
    expect(phases("incomplete", "completed")).toEqual(["incomplete"]);
    expect(phases("completed", "broken")).toEqual(["completed"]);
  });

  it("lets only what answers a question be made anew", () => {
    const [, first, second] = messagesOf(chain([question("u", null, "Hi"), answer("a", null, "x"), answer("b", null, "y")]), {}, NONE);
    expect([first, second]).toMatchObject([{ again: true }, { again: false }]);
  });
});

describe("messagesWith", () => {
  const tree = new Tree(ITEMS, "u3");
  const state = newTurn(null, "resp_1");

  it("puts a new question and its answer where they go, as another version", () => {
    expect(shown(messagesWith(tree, {}, NONE, { question: "Yo", after: null, state }))).toEqual(["Yo 3/3", " 1/1"]);
    expect(shown(messagesWith(tree, {}, NONE, { question: "On", after: "a2", state }))).toEqual(["Hey 2/2", "Hey you 1/2", "On 2/2", " 1/1"]);
  });

  it("puts a new answer beside those that the question has", () => {
    expect(shown(messagesWith(tree, {}, NONE, { question: null, after: "u2", state }))).toEqual(["Hey 2/2", " 3/3"]);
  });

  it("goes on from the head where the item it goes after was deleted", () => {
    expect(shown(messagesWith(tree, {}, NONE, { question: "?", after: "gone", state }))).toHaveLength(5);
  });

  it("is updated at its end", () => {
    const messages = withTurn(messagesWith(tree, {}, NONE, { question: null, after: "u2", state }), { ...state, text: "Hel" });
    expect(shown(messages)).toEqual(["Hey 2/2", "Hel 3/3"]);
  });
});

describe("titleFrom", () => {
  it.each([
    ["  Hi  there\n", "Hi there"],
    ["", "New chat"],
    ["What should I wear if it rains all day tomorrow in the old town?", "What should I wear if it rains all day tomorrow in the old…"],
  ])("%j", (question, title) => expect(titleFrom(question)).toBe(title));
  it("cuts long words too", () => expect(titleFrom("x".repeat(80))).toBe("x".repeat(60) + "…"));
});

describe("BrowserStore", () => {
  it("keeps turns that run and figures, and forgets them together", () => {
    localStorage.clear();
    const store = new BrowserStore(localStorage);
    store.savePending("c", { question: null, after: "u", responseId: null, seen: null });
    store.saveNote("c", "a", note);
    const again = new BrowserStore(localStorage);
    expect(again.pending("c")).toEqual({ question: null, after: "u", responseId: null, seen: null });
    expect(again.notes("c")).toEqual({ a: note });
    again.forget("c");
    expect([again.pending("c"), again.notes("c")]).toEqual([null, {}]);
    expect(localStorage.getItem("millrace.pending")).toBeNull();
  });

  it("keeps only the last few turns, the one that was saved last among them", () => {
    localStorage.clear();
    const store = new BrowserStore(localStorage);
    const pending = { question: "q", after: null, responseId: null, seen: null };
    for (const id of ["first", ..."abcdefgh", "first", "last"]) store.savePending(id, pending);
    expect(["first", "a", "b", "c", "h", "last"].map((id) => store.pending(id) !== null)).toEqual([true, false, false, true, true, true]);
  });

  it("finds the list that earlier pages kept, oldest first", () => {
    const list = [{ id: "b", title: "B", createdAt: 1, updatedAt: 9 }, { id: "a", title: "A", createdAt: 1, updatedAt: 2 }];
    localStorage.setItem("millrace.conversations", JSON.stringify(list));
    expect(new BrowserStore(localStorage).oldConversations().map(({ id }) => id)).toEqual(["a", "b"]);
  });

  it("stands rubbish and storage that is forbidden", () => {
    localStorage.setItem("millrace.conversations", '[{"id":3},7,null]');
    localStorage.setItem("millrace.pending", "{");
    expect(new BrowserStore(localStorage).oldConversations()).toEqual([]);
    expect(new BrowserStore(localStorage).pending("c")).toBeNull();
    const none = new BrowserStore(null);
    none.saveNote("c", "a", note);
    expect(none.oldConversations()).toEqual([]);
  });
});
