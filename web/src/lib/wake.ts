/**
 * Notices that the page is back: shown again, thawed, in a network again, or after the machine slept.
 */
const TICK_MS = 5000;
/** A page that is shown ticks on time; this late, the machine was asleep. */
const LATE_MS = 15_000;

/** Calls `woken` each time; returns what ends it. */
export function onWake(woken: () => void): () => void {
  const shown = (): void => {
    if (!document.hidden) woken();
  };
  // Every page is shown once when it is loaded; only one out of the browser's cache was away.
  const restored = ({ persisted }: PageTransitionEvent): void => {
    if (persisted) woken();
  };
  let last = Date.now();
  const timer = setInterval(() => {
    const now = Date.now();
    if (now - last > LATE_MS) shown();
    last = now;
  }, TICK_MS);
  window.addEventListener("online", woken);
  window.addEventListener("pageshow", restored);
  document.addEventListener("resume", shown);
  document.addEventListener("visibilitychange", shown);
  return () => {
    clearInterval(timer);
    window.removeEventListener("online", woken);
    window.removeEventListener("pageshow", restored);
    document.removeEventListener("resume", shown);
    document.removeEventListener("visibilitychange", shown);
  };
}
