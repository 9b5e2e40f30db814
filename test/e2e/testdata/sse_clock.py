"""A clock that sends events (Server-Sent Events), of the standard library only.

usage: sse_clock.py PORT

GET /        a page to open an EventSource from
GET /clock   an event every 100 ms with the time as data; its id counts on from
             Last-Event-ID. ?limit=N ends the stream after N events.

It says on standard output how each stream ended.
"""

import http.server
import sys
import time
import urllib.parse


class Clock(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_GET(self):
        path, _, query = self.path.partition("?")
        if path != "/clock":
            page = b"<title>clock</title>"
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.send_header("Content-Length", str(len(page)))
            self.end_headers()
            self.wfile.write(page)
            return
        limit = int(urllib.parse.parse_qs(query).get("limit", ["1000"])[0])
        last = int(self.headers.get("Last-Event-ID") or 0)
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Cache-Control", "no-store")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        try:
            self.chunk("retry: 50\n\n")
            for number in range(last + 1, last + 1 + limit):
                self.chunk(f"id: {number}\ndata: {time.time()}\n\n")
                time.sleep(0.1)
            self.chunk("")
            print("ended", flush=True)
        except OSError:
            print("left", flush=True)
            self.close_connection = True

    def chunk(self, text):
        self.wfile.write(b"%x\r\n%s\r\n" % (len(text), text.encode()))


http.server.ThreadingHTTPServer(("0.0.0.0", int(sys.argv[1])), Clock).serve_forever()
