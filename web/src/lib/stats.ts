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

/** A rate over less time than this would say more about the connection than about the model. */
const MIN_SPAN_S = 0.05;

export function measure(turn: TurnState): Stats {
  const { sentAt, firstTextAt, usage } = turn;
  return {
    ttft_s: sentAt !== null && firstTextAt !== null ? (firstTextAt - sentAt) / 1000 : null,
    tokensPerSecond: rate(turn),
    outputTokens: usage?.output_tokens ?? null,
  };
}

/**
 * The rate of what came after the first text, whose own time is in `ttft_s`. Where all came at
 * once, it is the rate of the whole, the wait included: too low rather than absurd.
 */
function rate({ sentAt, firstTextAt, lastTextAt, firstTextLength, text, usage }: TurnState): number | null {
  if (usage === null || sentAt === null || firstTextAt === null || lastTextAt === null) return null;
  const span_s = (lastTextAt - firstTextAt) / 1000;
  const later = usage.output_tokens * (1 - firstTextLength / Math.max(text.length, 1));
  return span_s >= MIN_SPAN_S && later > 0 ? later / span_s : usage.output_tokens / ((lastTextAt - sentAt) / 1000);
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
