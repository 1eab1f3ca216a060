import { describe, expect, it } from "vitest";
import { speakUpTo, spokenText } from "../src/lib/announce";
import { byDay } from "../src/lib/days";
import { guessLanguage } from "../src/lib/language";
import { explain, explainBody } from "../src/lib/problem";
import { DEFAULTS, NUMBER_FIELDS, readNumber, readSettings, requestFields } from "../src/lib/settings";
import { SseParser } from "../src/lib/sse";
import { formatRate, formatSeconds, formatTokens, measure } from "../src/lib/stats";
import { newTurn } from "../src/lib/turn";

describe("SseParser", () => {
  const STREAM = 'event: a\r\nid: 1\r\ndata: {"x":1}\r\n\r\n: keep-alive\n\ndata: two\ndata: lines\n\ndata:tight\n\ndata\n\n';
  const EVENTS = ['{"x":1}', "two\nlines", "tight", ""];

  it("finds the same events wherever the text is cut", () => {
    for (let cut = 0; cut <= STREAM.length; cut++) {
      const parser = new SseParser();
      expect([...parser.push(STREAM.slice(0, cut)), ...parser.push(STREAM.slice(cut))]).toEqual(EVENTS);
    }
  });

  it("holds back an event that is not complete", () => {
    const parser = new SseParser();
    expect(parser.push("data: half")).toEqual([]);
    expect(parser.push("\n\n")).toEqual(["half"]);
  });
});

describe("announcements", () => {
  it("speak whole sentences once", () => {
    const text = "It is 3.5 km. Then turn";
    const upTo = speakUpTo(text, 0, false);
    expect(text.slice(0, upTo)).toBe("It is 3.5 km.");
    expect(speakUpTo(text, upTo, false)).toBe(upTo);
    expect(speakUpTo(text, upTo, true)).toBe(text.length);
  });

  it("know the full stops of Chinese", () => expect(speakUpTo("你好。我们", 0, false)).toBe(3));
  it("leave code and signs out", () => expect(spokenText("**Hi** `x`\n```py\nprint()\n```\nbye")).toBe("Hi x (code) bye"));
});

describe("guessLanguage", () => {
  it.each([
    ["你好！你会说中文吗？", "zh"],
    ["こんにちは、元気ですか", "ja"],
    ["안녕하세요", "ko"],
    ["Hello there", undefined],
    ["The word 你好 means hello in Chinese", undefined],
    ["", undefined],
  ])("%s", (text, language) => expect(guessLanguage(text)).toBe(language));
});

describe("byDay", () => {
  it("groups by calendar day, newest first", () => {
    const now = new Date(2026, 2, 30, 12).getTime();
    const at = (days: number, hour = 12) => ({ updatedAt: new Date(2026, 2, 30 - days, hour).getTime() });
    const groups = byDay([at(1, 23), at(0, 1), at(3), at(0, 11), at(20), at(80)], now);
    expect(groups.map(({ label, entries }) => [label, entries.length])).toEqual([
      ["Today", 2], ["Yesterday", 1], ["Friday", 1], ["This month", 1], ["January 2026", 1],
    ]);
    expect(groups[0]?.entries[0]).toEqual(at(0, 11));
  });
});

describe("settings", () => {
  it("send only what was set", () => {
    expect(requestFields(DEFAULTS)).toEqual({});
    expect(requestFields({ ...DEFAULTS, system: "Be brief.", temperature: 0, topP: 0.9, topK: 20, maxTokens: 64, seed: 7 })).toEqual({
      instructions: "Be brief.", temperature: 0, top_p: 0.9, top_k: 20, max_output_tokens: 64, seed: 7,
    });
  });

  it("survive any rubbish in storage", () => {
    for (const rubbish of [null, 3, "x", [], { temperature: "hot", topP: 7, seed: -1, model: 3, system: null }]) {
      expect(readSettings(rubbish)).toEqual(DEFAULTS);
    }
    expect(readSettings({ temperature: 0.5 }).temperature).toBe(0.5);
  });

  it("refuse what the server would refuse", () => {
    const [temperature, , topK] = NUMBER_FIELDS;
    if (temperature === undefined || topK === undefined) throw new Error("fields moved");
    expect(readNumber(temperature, "0.7")).toEqual({ value: 0.7, error: null });
    expect(readNumber(temperature, " ")).toEqual({ value: null, error: null });
    expect(readNumber(temperature, "3").error).toMatch(/between 0 and 2/);
    expect(readNumber(temperature, "warm").error).toMatch(/number/);
    expect(readNumber(topK, "1.5").error).toMatch(/whole/);
  });
});

describe("stats", () => {
  it("measure the first token apart from the rate of the rest", () => {
    const usage = { input_tokens: 1, output_tokens: 100 };
    const turn = { ...newTurn(1000), text: "x".repeat(200), firstTextLength: 20, firstTextAt: 1250, lastTextAt: 3250, usage };
    expect(measure(turn)).toEqual({ ttft_s: 0.25, tokensPerSecond: 45, outputTokens: 100 });
  });

  it("claim nothing they did not see", () => {
    expect(measure(newTurn(null))).toEqual({ ttft_s: null, tokensPerSecond: null, outputTokens: null });
    const resumed = { ...newTurn(null), text: "x", usage: { input_tokens: 1, output_tokens: 20 } };
    expect(measure(resumed).tokensPerSecond).toBeNull();
  });

  it("give no absurd rate for an answer that came at once", () => {
    const usage = { input_tokens: 1, output_tokens: 20 };
    const burst = { ...newTurn(0), text: "all at once", firstTextLength: 11, firstTextAt: 200, lastTextAt: 200, usage };
    expect(measure(burst).tokensPerSecond).toBe(100);
    expect(measure({ ...burst, firstTextLength: 3, lastTextAt: 201 }).tokensPerSecond).toBeCloseTo(99.5);
  });

  it("read well", () => {
    expect([formatSeconds(0.0421), formatSeconds(1.234), formatSeconds(12.34)]).toEqual(["42 ms", "1.23 s", "12.3 s"]);
    expect([formatRate(7.25), formatRate(1234.6)]).toEqual(["7.3 tokens/s", "1,235 tokens/s"]);
    expect([formatTokens(1), formatTokens(1200)]).toEqual(["1 token", "1,200 tokens"]);
  });
});

describe("explain", () => {
  it.each([
    [{ status: 401, code: null, message: "no key" }, "key"],
    [{ status: 429, code: null, message: "" }, "busy"],
    [{ status: 409, code: "conversation_busy", message: "" }, "busy"],
    [{ status: 503, code: null, message: "" }, "restarting"],
    [{ status: 404, code: null, message: "" }, "gone"],
    [{ status: 400, code: "context_length_exceeded", message: "" }, "context"],
    [{ status: 400, code: null, message: "longer than the context" }, "context"],
    [{ status: 400, code: "invalid_value", message: "temperature" }, "request"],
    [{ status: 500, code: null, message: "" }, "server"],
    [{ status: null, code: "engine_died", message: "" }, "restarting"],
  ])("%j is %s", (facts, kind) => expect(explain(facts).kind).toBe(kind));

  it("reads OpenAI's error body, and stands anything else", () => {
    expect(explainBody(400, '{"error":{"message":"bad top_p","code":"invalid_value"}}').detail).toBe("bad top_p");
    expect(explainBody(502, "<html>").kind).toBe("restarting");
    expect(explainBody(500, '{"error":3}').kind).toBe("server");
  });
});
