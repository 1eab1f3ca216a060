import { createHash } from "node:crypto";
import { svelte } from "@sveltejs/vite-plugin-svelte";
import type { Plugin } from "vite";
import { defineConfig } from "vitest/config";

/**
 * Adds the page's content security policy to the built page: nothing but the server's own files,
 * and inline scripts only by their hash. Vite's development server needs inline styles, so it goes
 * without.
 */
function contentSecurityPolicy(): Plugin {
  return {
    name: "content-security-policy",
    apply: "build",
    transformIndexHtml: {
      order: "post",
      handler(html) {
        const inline = [...html.matchAll(/<script>([\s\S]*?)<\/script>/g)].map((match) => match[1] ?? "");
        const hashes = inline.map((code) => `'sha256-${createHash("sha256").update(code).digest("base64")}'`);
        const policy = [
          "default-src 'none'",
          ["script-src 'self'", ...hashes].join(" "),
          "style-src 'self'",
          "img-src 'self' data:",
          "font-src 'self'",
          "connect-src 'self'",
          "base-uri 'none'",
          "form-action 'none'",
        ].join("; ");
        return html.replace(
          "<meta charset=\"utf-8\" />",
          `<meta charset="utf-8" />\n    <meta http-equiv="Content-Security-Policy" content="${policy}" />`,
        );
      },
    },
  };
}

const server = process.env["MILLRACE_URL"] ?? "http://127.0.0.1:8000";

export default defineConfig({
  plugins: [svelte(), contentSecurityPolicy()],
  base: "./",
  build: { target: "es2022", modulePreload: { polyfill: false }, reportCompressedSize: true },
  server: {
    proxy: {
      "/v1": { target: server, ws: true },
      "/ready": server,
    },
  },
  test: { environment: "jsdom", include: ["tests/**/*.test.ts"], testTimeout: 60_000 },
});
