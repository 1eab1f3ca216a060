import { svelte } from "@sveltejs/vite-plugin-svelte";
import type { Plugin } from "vite";
import { defineConfig } from "vitest/config";

const POLICY = [
  "default-src 'none'",
  "script-src 'self'",
  "style-src 'self'",
  "img-src 'self' data:",
  "font-src 'self'",
  "connect-src 'self'",
  "base-uri 'none'",
  "form-action 'none'",
].join("; ");

/**
 * Adds the content security policy to the built page: nothing but the server's own files. Vite's
 * development server needs inline scripts and styles, so there the page goes without.
 */
function contentSecurityPolicy(): Plugin {
  return {
    name: "content-security-policy",
    apply: "build",
    transformIndexHtml: () => [
      { tag: "meta", attrs: { "http-equiv": "Content-Security-Policy", content: POLICY }, injectTo: "head-prepend" },
    ],
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
