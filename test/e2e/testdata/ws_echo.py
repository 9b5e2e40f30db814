"""A WebSocket echo server of nothing but the standard library (RFC 6455).

usage: ws_echo.py PORT [BIND]

It answers pings, echoes text and binary messages frame by frame, closes with the
code that the client closed with, and says on standard output how each
connection ended. It speaks the first subprotocol that the client offers. The text
"close CODE" makes it close with that code, "split TEXT" send TEXT in a frame for
each letter. To who wants no WebSocket it shows a page.
"""

import base64
import hashlib
import socketserver
import struct
import sys

GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"


class Echo(socketserver.StreamRequestHandler):
    def handle(self):
        headers = {}
        self.rfile.readline()
        while line := self.rfile.readline().strip():
            name, _, value = line.partition(b":")
            headers[name.strip().lower()] = value.strip()
        if b"sec-websocket-key" not in headers:
            self.wfile.write(
                b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nConnection: close\r\n\r\n<title>echo</title>"
            )
            return
        accept = base64.b64encode(hashlib.sha1(headers[b"sec-websocket-key"] + GUID).digest())
        self.wfile.write(
            b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\n"
            b"Connection: Upgrade\r\nSec-WebSocket-Accept: " + accept + b"\r\n"
        )
        if offered := headers.get(b"sec-websocket-protocol"):
            self.wfile.write(b"Sec-WebSocket-Protocol: " + offered.split(b",")[0].strip() + b"\r\n")
        self.wfile.write(b"\r\n")
        self.closing = False
        try:
            while self.echo_frame():
                pass
            print("closed", flush=True)
        except (EOFError, OSError):
            print("dropped", flush=True)

    def echo_frame(self):
        first, second = self.exactly(2)
        length = second & 0x7F
        if length == 126:
            (length,) = struct.unpack(">H", self.exactly(2))
        elif length == 127:
            (length,) = struct.unpack(">Q", self.exactly(8))
        mask = self.exactly(4)
        data = self.exactly(length)
        whole = int.from_bytes(data, "big") ^ int.from_bytes(
            (mask * (length // 4 + 1))[:length], "big"
        )
        data = whole.to_bytes(length, "big")
        opcode = first & 0x0F
        if opcode == 0x9:  # ping
            first = 0x80 | 0xA
        if opcode == 0xA:  # pong
            return True
        if opcode == 0x8 and self.closing:
            return False
        if first == 0x81 and data.startswith(b"close "):
            self.closing = True
            self.frame(0x88, struct.pack(">H", int(data[6:])) + b"as you say")
            return True
        if first == 0x81 and data.startswith(b"split "):
            letters = data[6:]
            for i in range(len(letters)):
                last = i == len(letters) - 1
                self.frame((0x80 if last else 0) | (0 if i else 1), letters[i : i + 1])
            return True
        self.frame(first, data)
        return opcode != 0x8  # close

    def frame(self, first, data):
        length = len(data)
        if length < 126:
            head = struct.pack(">BB", first, length)
        elif length < 1 << 16:
            head = struct.pack(">BBH", first, 126, length)
        else:
            head = struct.pack(">BBQ", first, 127, length)
        self.wfile.write(head + data)

    def exactly(self, n):
        data = self.rfile.read(n)
        if len(data) < n:
            raise EOFError
        return data


class Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True


bind = sys.argv[2] if len(sys.argv) > 2 else "0.0.0.0"
with Server((bind, int(sys.argv[1])), Echo) as server:
    print("listening", flush=True)
    server.serve_forever()
