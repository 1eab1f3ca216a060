import { describe, expect, it } from "vitest";
import { highlighter } from "../src/lib/languages";
import { MarkdownStream } from "../src/lib/markdown";

function html(text: string): string {
  return new MarkdownStream().render(text).map((block) => block.html).join("\n");
}

function page(text: string): HTMLElement {
  const element = document.createElement("div");
  element.innerHTML = html(text);
  return element;
}

const SAMPLE = `# Title

A paragraph with **bold**, \`code\` and
a second line.

- one
- two
  - nested

  still two

1. first

   \`\`\`python
   print("x < y")
   \`\`\`

> quoted
> more

| a | b |
|---|--:|
| 1 | 2 |

Setext
======

\`\`\`js
const a = "</code><script>";
\`\`\`

    indented

***

Last [link](https://example.org) line`;

describe("MarkdownStream", () => {
  it("renders a growing text as it would render the whole", () => {
    const stream = new MarkdownStream();
    for (let end = 0; end <= SAMPLE.length; end++) {
      const text = SAMPLE.slice(0, end);
      const grown = stream.render(text).map((block) => block.html).join("\n");
      // Rendering the whole is slow under jsdom; the ends of lines are where blocks change.
      if (text.endsWith("\n") || end % 9 === 0) expect(grown).toBe(html(text));
    }
  });

  it("does so for any mixture of blocks", () => {
    const PIECES = ["text\n", "\n", "\tcode\n", "- a\n", "  b\n", "1. x\n", "> q\n", "```\n", "| a |\n|---|\n", "===\n", "  \n", "<b>\n", "[x]: /y\n", "é 你\r\n"];
    let seed = 7;
    const draw = (): number => (seed = (seed * 16807) % 2147483647);
    for (let round = 0; round < 25; round++) {
      const stream = new MarkdownStream();
      let text = "";
      for (let step = 0; step < 8; step++) {
        text += PIECES[draw() % PIECES.length] ?? "";
        expect(stream.render(text).map((block) => block.html).join("\n"), JSON.stringify(text)).toBe(html(text));
      }
    }
  });

  it("follows a text that is replaced", () => {
    const stream = new MarkdownStream();
    stream.render("one\n\ntwo");
    expect(stream.render("**three**")[0]?.html).toContain("<strong>three</strong>");
  });

  it("resolves link definitions that come after their use", () => {
    const stream = new MarkdownStream();
    stream.render("See [it][1].\n\n");
    expect(stream.render("See [it][1].\n\n[1]: https://example.org\n")[0]?.html).toContain('href="https://example.org"');
  });

  it("keeps the page's own headings to itself", () => {
    expect([...page("# a\n\n## b\n\n###### c").querySelectorAll("h3,h4,h6")].map(({ textContent }) => textContent)).toEqual(["a", "b", "c"]);
  });

  it("labels code and colours it once a highlighter is there", () => {
    const plain = new MarkdownStream();
    const text = "```python\ndef f():\n    return 1\n```";
    const before = plain.render(text)[0]?.html ?? "";
    expect(before).toContain(">python<");
    expect(plain.wantsHighlighter).toBe(true);
    const after = new MarkdownStream(highlighter).render(text)[0]?.html ?? "";
    expect(after).toContain('<span class="hljs-keyword">def</span>');
    const element = document.createElement("div");
    element.innerHTML = after;
    expect(element.querySelector("pre")?.textContent).toBe("def f():\n    return 1\n");
  });

  it("never lets a highlighter see a language it does not know", () => {
    expect(highlighter.highlight("x", "klingon")).toBeNull();
  });
});

describe("hostile Markdown", () => {
  const ATTACKS = [
    "<script>alert(1)</script>",
    '<img src=x onerror="alert(1)">',
    "[a](javascript:alert(1))",
    "[a](JaVaScRiPt&colon;alert(1))",
    "[a](data:text/html;base64,PHNjcmlwdD4=)",
    "[a](vbscript:x)",
    "<a href=\"java\nscript:alert(1)\">x</a>",
    "![x](https://evil.example/track.png)",
    "![x](javascript:alert(1))",
    "<svg onload=alert(1)><script>alert(1)</script></svg>",
    "<style>body{display:none}</style>",
    "<iframe src=https://evil.example></iframe>",
    "<form action=https://evil.example><input name=q></form>",
    "<math><mtext><table><mglyph><style><img src=x onerror=alert(1)>",
    "```\"><img src=x onerror=alert(1)>\ncode\n```",
    "```html\n<img src=x onerror=alert(1)>\n```",
    '[a](https://x "\\" onmouseover=\\"alert(1)")',
    "[a](https://x'onmouseover='alert(1))",
    "| <img src=x onerror=alert(1)> |\n|---|\n| <svg/onload=alert(1)> |",
    "<div style=\"position:fixed;inset:0\">x</div>",
    "<p id=app class=veil>x</p>",
    "<https://x/\"onclick=alert(1)>",
    "- [x] <input autofocus onfocus=alert(1)>",
  ];
  const ELEMENTS = "script,img,svg,style,iframe,form,input,math,object,embed,link,meta,base,video,audio";

  it.each(ATTACKS)("is inert: %s", (attack) => {
    const element = page(`before\n\n${attack}\n\nafter`);
    expect(element.querySelector(ELEMENTS)).toBeNull();
    for (const node of element.querySelectorAll("*")) {
      for (const { name, value } of node.attributes) {
        expect(name).not.toMatch(/^on|^style$|^id$|^src/);
        if (name === "href") expect(value).toMatch(/^(https?:|mailto:)/);
      }
    }
    expect(element.textContent).toContain("after");
  });

  it("shows raw HTML as what it is", () => {
    expect(page("a <b>c</b>").textContent?.trim()).toBe("a <b>c</b>");
  });

  it("opens links elsewhere, without saying where from", () => {
    const link = page("[a](https://example.org/?a=1&b=2)").querySelector("a");
    expect(link?.getAttribute("rel")).toContain("noopener");
    expect(link?.getAttribute("target")).toBe("_blank");
    expect(link?.href).toBe("https://example.org/?a=1&b=2");
  });
});
