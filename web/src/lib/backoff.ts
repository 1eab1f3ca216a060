/**
 * How long to wait before another try: at once, then twice as long each time, up to a bound.
 */
const FIRST_MS = 500;
export const LONGEST_MS = 30_000;

/**
 * Returns the wait before try number `tries` (from 0), in milliseconds. `random` is in [0, 1): half of
 * a wait is drawn, so that the clients of a server that comes back do not all return at once.
 */
export function backoff(tries: number, random: number): number {
  if (tries <= 0) return 0;
  const longest = Math.min(LONGEST_MS, FIRST_MS * 2 ** Math.min(tries - 1, 30));
  return longest * (0.5 + random / 2);
}
