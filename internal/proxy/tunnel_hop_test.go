package proxy_test

import (
	"fmt"
	"testing"
)

func TestTunnelsLeadToSandboxesOnOtherHosts(t *testing.T) {
	eachWay(t, func(t *testing.T, w *world, open func(testing.TB, *world, uint16) end) {
		w.behindAgent(t)
		checkEcho(t, open(t, w, tcpServer(t, echoBytes)))
	})
}

func TestFailureOfTheHostAgentIsTheFronts(t *testing.T) {
	w := newWorld(t)
	w.behindAgent(t)
	port := closedPort(t)
	res, body, err := w.raw(t, fmt.Sprintf("CONNECT %d-%s.wrenn.test:80 HTTP/1.1\r\nHost: x\r\n\r\n", port, idA))
	want := fmt.Sprintf(`{"sandboxId":"%s","message":"The sandbox is running but port is not open","port":%d,"code":502}`+"\n", idA, port)
	if err != nil || res.StatusCode != 502 || body != want {
		t.Errorf("answer = %v %q, %v", res, body, err)
	}
}
