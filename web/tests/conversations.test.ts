import { describe, expect, it } from "vitest";
import { conversationOf, findWords, merged, type Conversation } from "../src/lib/conversations";

function found(text: string, query: string): string {
  return findWords(text, query).map(({ text: piece, found: hit }) => (hit ? `[${piece}]` : piece)).join("");
}

describe("findWords", () => {
  it.each([
    ["A river runs", "river", "A [river] runs"],
    ["A River, RIVERS", "river", "A [River], [RIVER]S"],
    ["Café au lait", "cafe LAIT", "[Café] au [lait]"],
    ["ﬁnally ﬁne", "fin", "[ﬁn]ally [ﬁn]e"],
    ["aaa", "aa a", "[aaa]"],
    ["你好世界", "世界", "你好[世界]"],
    ["a 👍🏽 b", "b", "a 👍🏽 [b]"],
    ["nothing", "  ", "nothing"],
    ["<b>", "<b>", "[<b>]"],
  ])("%s for %s", (text, query, marked) => expect(found(text, query)).toBe(marked));

  it("loses nothing of the text", () => {
    for (const query of ["", "a", "é x", "ß"]) {
      for (const text of ["", "Straße é x a", "é decomposed"]) {
        expect(findWords(text, query).map(({ text: piece }) => piece).join("")).toBe(text);
      }
    }
  });
});

describe("the list", () => {
  const entry = (id: string, title = id): Conversation => ({ id, title, updatedAt: 0, head: null, match: null });

  it("takes what is new over what is known, without doubles", () => {
    const list = merged([entry("a"), entry("b")], [entry("c"), entry("a", "renamed")]);
    expect(list.map(({ id, title }) => `${id} ${title}`)).toEqual(["c c", "a renamed", "b b"]);
  });

  it("reads the API's object", () => {
    expect(conversationOf({ id: "c", title: null, updated_at: 7, head: null })).toEqual({
      id: "c", title: "New chat", updatedAt: 7000, head: null, match: null,
    });
  });
});
