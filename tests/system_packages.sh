#!/bin/sh
# The tests use a real Redis and a real Chromium. Take the installed ones, install Debian's packages
# where we are root, and otherwise say in one line what is missing.
set -eu

missing=""
command -v redis-server >/dev/null || command -v valkey-server >/dev/null || missing="redis-server"
[ -n "${MILLRACE_CHROMIUM:-}" ] || command -v chromium >/dev/null || command -v chromium-browser >/dev/null ||
	command -v google-chrome >/dev/null || missing="$missing chromium"
[ -n "$missing" ] || exit 0

if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
	export DEBIAN_FRONTEND=noninteractive
	apt-get update -qq
	# Without fonts for Chinese the page's screenshots show boxes.
	# shellcheck disable=SC2086
	apt-get install -y -qq --no-install-recommends $missing fonts-noto-cjk >/dev/null
else
	echo "make test needs these programs, which are not installed:$missing" >&2
	exit 1
fi
