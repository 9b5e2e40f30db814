"""An HTTP/1.1 server that shows whether bodies stream, of the standard library only.

usage: streams.py PORT

GET  /drip    sends one line, then a second one only after GET /release was called
POST /echo    sends each chunk of the request body back as it comes
GET  /size/N  sends N bytes of zeros
GET  /headers sends the request's headers back as JSON
"""

import http.server
import json
import sys
import threading

released = threading.Event()


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def start(self, kind="text/plain"):
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()

    def chunk(self, data):
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
        self.wfile.flush()

    def whole(self, data, kind="text/plain"):
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self):
        if self.path == "/drip":
            self.start("text/event-stream")
            self.chunk(b"data: one\n\n")
            released.wait(30)
            self.chunk(b"data: two\n\n")
            self.chunk(b"")
        elif self.path == "/release":
            released.set()
            self.whole(b"released")
        elif self.path.startswith("/size/"):
            left = int(self.path[6:])
            self.send_response(200)
            self.send_header("Content-Length", str(left))
            self.end_headers()
            while left > 0:
                part = b"\0" * min(left, 1 << 20)
                self.wfile.write(part)
                left -= len(part)
        elif self.path == "/headers":
            self.whole(json.dumps(dict(self.headers)).encode(), "application/json")
        else:
            self.whole(self.path.encode())

    def do_POST(self):
        self.start()
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            while size := int(self.rfile.readline(), 16):
                self.chunk(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
        else:
            left = int(self.headers.get("Content-Length", 0))
            while left > 0:
                part = self.rfile.read(min(left, 1 << 16))
                left -= len(part)
                self.chunk(part)
        self.chunk(b"")


http.server.ThreadingHTTPServer(("0.0.0.0", int(sys.argv[1])), Handler).serve_forever()
