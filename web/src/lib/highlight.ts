/**
 * Code highlighting, loaded when the first code block appears.
 */
export interface Highlighter {
  /** Returns safe HTML, or null for a language that is not known. */
  highlight(code: string, language: string): string | null;
}

let loading: Promise<Highlighter> | null = null;

export function loadHighlighter(): Promise<Highlighter> {
  loading ??= import("./languages").then(({ highlighter }) => highlighter);
  return loading;
}
