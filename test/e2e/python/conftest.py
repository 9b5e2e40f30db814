"""What the tests share. The platform is named by the variables that E2B's SDK
reads itself; MODE says which way it is reached: "plain" (http, two URL
variables) or "tls" (domain mode)."""

import os
import pathlib
import ssl
import time
import urllib.error
import urllib.request

import pytest
from e2b import Sandbox

MODE = os.environ["MODE"]
assert MODE in ("plain", "tls")
TESTDATA = pathlib.Path(os.environ["TESTDATA"])


def origin(sandbox, port, scheme="http"):
    """Base URL of a port of the sandbox, as a person would open it."""
    return f"{scheme}{'s' if MODE == 'tls' else ''}://{sandbox.get_host(port)}"


def fetch(url, data=None, headers={}):
    """GET or POST; gives status and body whatever the status is."""
    request = urllib.request.Request(url, data=data, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            return response.status, response.read()
    except urllib.error.HTTPError as err:
        return err.code, err.read()


def eventually(what, check, seconds=15):
    """Calls check until it gives something true, and returns that."""
    deadline = time.monotonic() + seconds
    last = None
    while True:
        try:
            if got := check():
                return got
        except (OSError, AssertionError) as err:
            last = err
        if time.monotonic() > deadline:
            raise AssertionError(f"{what}: not within {seconds} s") from last
        time.sleep(0.05)  # between two looks at the condition


def tls_context():
    return ssl.create_default_context() if MODE == "tls" else None


@pytest.fixture(scope="session")
def sandbox():
    sandbox = Sandbox.create("base", timeout=300)
    yield sandbox
    sandbox.kill()
