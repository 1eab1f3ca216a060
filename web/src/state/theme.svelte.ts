/**
 * Light or dark: as the system says, until someone chooses.
 */
const KEY = "millrace.theme";

export class Theme {
  dark = $state(false);
  readonly #system = window.matchMedia("(prefers-color-scheme: dark)");

  constructor() {
    this.#apply();
    this.#system.addEventListener("change", () => this.#apply());
  }

  toggle(): void {
    const next = this.dark ? "light" : "dark";
    const system = this.#system.matches ? "dark" : "light";
    // Going back to what the system says makes the page follow it again.
    if (next === system) delete document.documentElement.dataset["theme"];
    else document.documentElement.dataset["theme"] = next;
    try {
      if (next === system) localStorage.removeItem(KEY);
      else localStorage.setItem(KEY, JSON.stringify(next));
    } catch {
      // Not remembered, still applied.
    }
    this.#apply();
  }

  #apply(): void {
    const chosen = document.documentElement.dataset["theme"];
    this.dark = chosen === undefined ? this.#system.matches : chosen === "dark";
  }
}
