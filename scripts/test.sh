#!/usr/bin/env bash
# Runs every test: `make test`. GO is the go command, bin/wrenn is built.
set -euo pipefail
cd "$(dirname "$0")/.."

# Templates are kept between runs and shared by checkouts: they take minutes.
export WRENN_TEST_DATA=${WRENN_TEST_DATA:-/var/tmp/wrenn-test}
mkdir -p "$WRENN_TEST_DATA" .cache

# The JavaScript SDK wants Node.js 20, and Debian 12 has 18. The npm registry has
# node itself as a package.
node_major() { node --version 2>/dev/null | sed -E 's/^v([0-9]+).*/\1/'; }
if [ "$(node_major)" -lt 20 ]; then
	if [ ! -x .cache/node/node_modules/node/bin/node ]; then
		echo "node $(node --version) is too old for the JavaScript SDK; installing a newer one into .cache/node"
		npm install --silent --no-audit --no-fund --prefix .cache/node node@22
	fi
	PATH=$PWD/.cache/node/node_modules/node/bin:$PATH
fi

# Every package is tested under the race detector but those that have gVisor in
# them: the sandbox kernel runs in an empty root directory and takes no C library.
# Virtual machines without KVM are emulated: tests of them have the machine for
# themselves, and no race detector, which would slow down only the test.
machines=./internal/runtime/microvm/qemu
packages=$("$GO" list ./... | grep -v -e /test/e2e -e /microvm/qemu)
gvisor=$("$GO" list -deps -test -f '{{if not .Standard}}{{.ImportPath}} {{join .Deps " "}}{{end}}' ./... |
	awk '/gvisor\.dev\/gvisor/ { print $1 }' | sed -E 's/ .*//; s/(_test|\.test)$//' | sort -u)
race=$(comm -23 <(sort -u <<<"$packages") <(echo "$gvisor"))
plain=$(comm -12 <(sort -u <<<"$packages") <(echo "$gvisor"))

echo "Preparing the base template in $WRENN_TEST_DATA"
(cd test/e2e && CGO_ENABLED=0 "$GO" test -run '^$')

# The summary needs each run's results even when one before it failed; it is what
# decides the exit code.
results=.cache/test-results.json
: >"$results"
run() {
	"$GO" test -json -count=1 "$@" 2>&1 | tee -a "$results" | .tools/testsummary -live || true
}
"$GO" build -o .tools/testsummary ./scripts/testsummary
started=$SECONDS
# shellcheck disable=SC2086 # lists of packages
{
	CGO_ENABLED=1 run -race -timeout 10m $race
	CGO_ENABLED=0 run -timeout 10m $plain
}
CGO_ENABLED=0 run -timeout 25m $machines
# With the C library's resolver, which knows names below .localhost.
CGO_ENABLED=1 run -timeout 25m ./test/e2e
echo "Tests took $((SECONDS - started)) s."
.tools/testsummary <"$results"
