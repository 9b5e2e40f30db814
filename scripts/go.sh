#!/usr/bin/env bash
# Prints the path of a go command that can build this project, getting one when
# the machine has none. What it says goes to standard error.
#
# A go command from 1.21 on fetches the version that go.mod asks for by itself
# (GOTOOLCHAIN). Debian 12 ships 1.19, which cannot, but it can download that
# version as the module that later ones use for it, checked against the checksum
# database all the same.
set -euo pipefail
cd "$(dirname "$0")/.."

say() { echo "$@" >&2; }

want=$(awk '$1 == "go" { print $2 }' go.mod)
export GOTOOLCHAIN=auto

# minor prints N of the "go1.N.M" that a go command says of itself.
minor() { (cd / && GOTOOLCHAIN=local "$1" version) | sed -E 's/^go version go1\.([0-9]+).*/\1/'; }

go=$(command -v go || true)
[ -n "$go" ] || { [ ! -x /usr/local/go/bin/go ] || go=/usr/local/go/bin/go; }
if [ -z "$go" ]; then
	if ! command -v apt-get >/dev/null; then
		say "Go is missing: install Go 1.21 or newer ($want will be fetched by it), then try again."
		exit 1
	fi
	say "Go is missing; installing the distribution's"
	apt-get update -q >&2
	DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends golang-go ca-certificates >&2
	go=$(command -v go)
fi
if [ "$(minor "$go")" -lt 21 ]; then
	say "$go is older than 1.21; using it to fetch Go $want"
	dir=$(cd / && "$go" env GOMODCACHE)/golang.org/toolchain@v0.0.1-go$want.$(cd / && "$go" env GOOS)-$(cd / && "$go" env GOARCH)
	if [ ! -x "$dir/bin/go" ]; then
		module=$(mktemp -d)
		trap 'rm -rf "$module"' EXIT
		printf 'module fetch\n\ngo 1.19\n' >"$module/go.mod"
		(cd "$module" && "$go" mod download "golang.org/toolchain@$(basename "$dir" | sed 's/^toolchain@//')") >&2
		# Modules carry no modes. bin/go last: it tells that the rest is done.
		chmod -R +x "$dir"/pkg/tool "$dir"/bin/gofmt
		chmod +x "$dir"/bin/go
	fi
	go=$dir/bin/go
fi
echo "$go"
