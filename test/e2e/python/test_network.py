import asyncio
import json
import os

import pytest
from e2b import Sandbox
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed

from conftest import MODE, TESTDATA, eventually, fetch, origin, tls_context


@pytest.fixture(scope="module")
def serving(sandbox):
    sandbox.files.write("ws_echo.py", (TESTDATA / "ws_echo.py").read_text())
    sandbox.commands.run("mkdir -p www/sub && echo index > www/index.html && echo inner > www/sub/page")
    sandbox.commands.run("exec python3 -m http.server 8000 -d www", background=True, timeout=0)
    start_echo(sandbox)
    eventually("http.server", lambda: fetch(origin(sandbox, 8000))[0] == 200)
    return sandbox


def start_echo(sandbox):
    """Starts the echo server on port 9000 and returns when it listens."""
    server = sandbox.commands.run("exec python3 ws_echo.py 9000", background=True, timeout=0)
    assert next(iter(server))[0] == "listening\n"


def websocket(sandbox):
    # Not the client of websockets.sync: it reads in one thread what it writes in
    # another, which OpenSSL does not allow of one connection. When the server's
    # session tickets come in while the request is being written, the request is
    # lost and the handshake hangs.
    return connect(origin(sandbox, 9000, "ws"), ssl=tls_context(), proxy=None, max_size=4 << 20)


def test_http_server_is_reached_by_get_host(serving):
    assert fetch(origin(serving, 8000)) == (200, b"index\n")
    assert fetch(origin(serving, 8000) + "/sub/page") == (200, b"inner\n")
    assert b"page" in fetch(origin(serving, 8000) + "/sub")[1]


def test_websocket_echoes_text_binary_and_a_megabyte(serving):
    async def main():
        async with websocket(serving) as ws:
            await ws.send("grüße €")
            assert await ws.recv() == "grüße €"
            for size in (0, 200, 70_000, 1 << 20):
                data = os.urandom(size)
                await ws.send(data)
                assert await ws.recv() == data
            await (await ws.ping())

    asyncio.run(asyncio.wait_for(main(), 60))


def test_websocket_is_cut_when_the_sandbox_is_killed():
    async def main(victim):
        async with websocket(victim) as ws:
            victim.kill()
            with pytest.raises(ConnectionClosed):
                await asyncio.wait_for(ws.recv(), 15)

    with Sandbox.create("base", timeout=60) as victim:
        victim.files.write("ws_echo.py", (TESTDATA / "ws_echo.py").read_text())
        start_echo(victim)
        asyncio.run(main(victim))


def test_closed_port_is_told_from_missing_sandbox(serving):
    status, body = fetch(origin(serving, 8999))
    assert status == 502
    assert json.loads(body)["message"] == "The sandbox is running but port is not open"
    missing = origin(serving, 8000).replace(serving.sandbox_id, "a" * len(serving.sandbox_id))
    status, body = fetch(missing)
    assert status == 502
    assert json.loads(body)["message"] == "The sandbox was not found"


def test_signed_urls_upload_and_download(sandbox):
    # With E2B_SANDBOX_URL a signed URL does not say which sandbox it is for.
    headers = {}
    if MODE == "plain":
        headers = {"E2b-Sandbox-Id": sandbox.sandbox_id, "E2b-Sandbox-Port": "49983"}
    upload = sandbox.upload_url("py signed.txt", use_signature_expiration=60)
    status, body = fetch(upload, data=b"signed content", headers={**headers, "Content-Type": "application/octet-stream"})
    assert status == 200, body
    assert sandbox.files.read("py signed.txt") == "signed content"
    assert fetch(sandbox.download_url("py signed.txt"), headers=headers) == (200, b"signed content")
    status, body = fetch(sandbox.download_url("py signed.txt", use_signature_expiration=-10), headers=headers)
    assert status == 401 and b"signature is already expired" in body
