/**
 * Markdown to safe HTML, block by block, so that a streaming answer only redraws its last block.
 *
 * Two walls against hostile text: raw HTML is shown as text, and everything goes through DOMPurify
 * with a short list of what may pass. Images become links, so that no answer makes the browser
 * fetch anything.
 */
import DOMPurify from "dompurify";
import { Marked, type Token, type TokensList } from "marked";
import type { Highlighter } from "./highlight";

export interface Block {
  /** Stable while the block keeps its place. */
  key: number;
  html: string;
}

const ESCAPES: Record<string, string> = { "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;", "'": "&#39;" };

function escape(text: string): string {
  return text.replace(/[&<>"']/g, (char) => ESCAPES[char] ?? char);
}

/** Bounded, so that a line of brackets costs no more than its length. */
const LINK_DEFINITION = /^ {0,3}\[[^\]\n]{1,999}\]:/m;

const SAFE_LINK = /^(?:https?:|mailto:)/i;

const SANITISE = {
  ALLOWED_TAGS: [
    "p", "br", "hr", "strong", "em", "del", "code", "pre", "blockquote", "ul", "ol", "li", "a", "span", "div",
    "h3", "h4", "h5", "h6", "table", "thead", "tbody", "tr", "th", "td", "button",
  ],
  ALLOWED_ATTR: [
    "class", "href", "title", "target", "rel", "start", "align", "scope", "type", "tabindex", "role", "aria-label", "data-copy",
  ],
  ADD_URI_SAFE_ATTR: ["target", "rel", "start", "align", "scope", "type", "tabindex", "aria-label", "data-copy"],
  ALLOWED_URI_REGEXP: SAFE_LINK,
  ALLOW_DATA_ATTR: false,
  ALLOW_ARIA_ATTR: false,
};

/** A wide table scrolls by itself, and by keyboard. */
const TABLE_START = '<div class="table" role="region" aria-label="Table" tabindex="0">';

function anchor(href: string, inner: string, title?: string | null): string {
  if (!SAFE_LINK.test(href)) return inner;
  const named = title ? ` title="${escape(title)}"` : "";
  return `<a href="${escape(href)}"${named} target="_blank" rel="noopener noreferrer nofollow">${inner}</a>`;
}

function codeBlock(code: string, language: string, highlighter: Highlighter | null): string {
  const body = (language && highlighter?.highlight(code, language)) || escape(code);
  const label = language || "text";
  return (
    `<div class="code"><div class="code-head"><span class="code-lang">${escape(label)}</span>` +
    `<button type="button" class="code-copy" data-copy="code" aria-label="Copy this ${escape(label)} code">Copy</button></div>` +
    `<pre tabindex="0" role="region" aria-label="${escape(label)} code"><code>${body}\n</code></pre></div>`
  );
}

function createMarked(highlighter: Highlighter | null): Marked {
  const marked = new Marked({ gfm: true, breaks: true });
  marked.use({
    renderer: {
      html: ({ text }) => escape(text),
      image: ({ href, text }) => anchor(href, escape(text || href)),
      link({ href, title, tokens }) {
        return anchor(href, this.parser.parseInline(tokens), title);
      },
      code: ({ text, lang }) => codeBlock(text, /^[\w+#.-]{1,24}/.exec(lang ?? "")?.[0].toLowerCase() ?? "", highlighter),
      checkbox: ({ checked }) => (checked ? "☑ " : "☐ "),
      heading({ tokens, depth }) {
        // The page's own headings are h1 and h2.
        const level = Math.min(depth + 2, 6);
        return `<h${level}>${this.parser.parseInline(tokens)}</h${level}>\n`;
      },
    },
  });
  return marked;
}

interface Lexed {
  text: string;
  tokens: Token[];
}

/** Renders one growing text; keep one for each answer. */
export class MarkdownStream {
  #marked: Marked;
  #lexed: Lexed = { text: "", tokens: [] };
  #cache = new Map<string, string>();
  #hasHighlighter: boolean;

  constructor(highlighter: Highlighter | null = null) {
    this.#marked = createMarked(highlighter);
    this.#hasHighlighter = highlighter !== null;
  }

  /** Returns the blocks of `text`, which usually begins with the text of the last call. */
  render(text: string): Block[] {
    const source = text.replace(/\r\n?/g, "\n");
    const tokens = this.#lex(source);
    const links = (tokens as Partial<TokensList>).links ?? {};
    const fresh = new Map<string, string>();
    const blocks: Block[] = [];
    for (const token of tokens) {
      if (token.type === "space" || token.type === "def") continue;
      const cached = Object.keys(links).length === 0 ? this.#cache.get(token.raw) : undefined;
      const html = cached ?? this.#html(token);
      fresh.set(token.raw, html);
      blocks.push({ key: blocks.length, html });
    }
    this.#cache = fresh;
    return blocks;
  }

  /** Whether a highlighter would change what `render` returned last. */
  get wantsHighlighter(): boolean {
    return !this.#hasHighlighter && [...this.#cache.values()].some((html) => html.includes('class="code"'));
  }

  #html(token: Token): string {
    const html = this.#marked
      .parser([token])
      .replaceAll("<table>", `${TABLE_START}<table>`)
      .replaceAll("</table>", "</table></div>");
    return DOMPurify.sanitize(html, SANITISE);
  }

  /**
   * Text that grows changes only its last block, so only that is lexed again. Link definitions act
   * backwards; a text that has one is lexed whole.
   */
  #lex(text: string): Token[] {
    const { text: before, tokens: known } = this.#lexed;
    let tokens: Token[];
    if (before !== "" && text.startsWith(before) && !LINK_DEFINITION.test(text)) {
      const kept = known.slice(0, known.findLastIndex((token) => token.type !== "space"));
      const offset = kept.reduce((sum, token) => sum + token.raw.length, 0);
      tokens = [...kept, ...this.#marked.lexer(text.slice(offset))];
    } else {
      tokens = this.#marked.lexer(text);
    }
    this.#lexed = { text, tokens };
    return tokens;
  }
}
