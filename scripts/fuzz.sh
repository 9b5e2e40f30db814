#!/usr/bin/env bash
# Runs every fuzz target for a while: fuzz.sh TIME. GO is the go command.
set -euo pipefail
cd "$(dirname "$0")/.."

grep -rlE --include='*_test.go' '^func Fuzz' cmd internal bench | while read -r file; do
	grep -oE '^func Fuzz[A-Za-z0-9_]*' "$file" | sed 's/^func //' | while read -r target; do
		echo "== $(dirname "$file") $target"
		"$GO" test -run '^$' -fuzz "^$target\$" -fuzztime "$1" "./$(dirname "$file")"
	done
done
