/**
 * Calls `flush` with the newest value at most once a frame; in a hidden tab, four times a second.
 */
export class FrameBatch<T> {
  readonly #flush: (value: T) => void;
  #next: { value: T } | null = null;
  #scheduled = false;

  constructor(flush: (value: T) => void) {
    this.#flush = flush;
  }

  push(value: T): void {
    this.#next = { value };
    if (this.#scheduled) return;
    this.#scheduled = true;
    if (document.hidden) setTimeout(() => this.now(), 250);
    else requestAnimationFrame(() => this.now());
  }

  now(): void {
    this.#scheduled = false;
    const next = this.#next;
    this.#next = null;
    if (next !== null) this.#flush(next.value);
  }
}
