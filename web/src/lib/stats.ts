/**
 * The figures under an answer.
 */
import type { TurnState } from "./turn";

export interface Stats {
  /** From sending the question to the first text on this page, in seconds. */
  ttft_s: number | null;
  tokensPerSecond: number | null;
  outputTokens: number | null;
}

export function measure(turn: TurnState): Stats {
  const { sentAt, firstTextAt, lastTextAt, usage } = turn;
  const outputTokens = usage?.output_tokens ?? null;
  const span_s = firstTextAt !== null && lastTextAt !== null ? (lastTextAt - firstTextAt) / 1000 : 0;
  return {
    ttft_s: sentAt !== null && firstTextAt !== null ? (firstTextAt - sentAt) / 1000 : null,
    // The first token's time is in ttft_s; the rate is of those that follow it.
    tokensPerSecond: outputTokens !== null && outputTokens > 1 && span_s > 0 ? (outputTokens - 1) / span_s : null,
    outputTokens,
  };
}

export function formatSeconds(seconds: number): string {
  if (seconds < 1) return `${Math.round(seconds * 1000)} ms`;
  return `${seconds.toFixed(seconds < 10 ? 2 : 1)} s`;
}

export function formatRate(rate: number): string {
  return `${rate < 10 ? rate.toFixed(1) : Math.round(rate).toLocaleString("en")} tokens/s`;
}

export function formatTokens(count: number): string {
  return `${count.toLocaleString("en")} ${count === 1 ? "token" : "tokens"}`;
}
